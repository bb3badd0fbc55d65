"""Memory that comes back when the last tensor over it goes."""

import gc

import torch

from qnext.handoff.spares import Spares

CPU = torch.device("cpu")


def test_memory_is_used_again_once_nobody_looks_at_it() -> None:
    spares = Spares(10_000)
    first = spares.take(5000, CPU)
    place, part = first.data_ptr(), first[100:200].view(torch.float32)
    del first
    gc.collect()
    second = spares.take(4000, CPU)
    assert second.data_ptr() != place  # a part of it is looked at
    part.fill_(3.0)
    del part
    gc.collect()
    third = spares.take(4999, CPU)
    assert third.data_ptr() == place and third.shape == (4999,) and third.dtype == torch.uint8


def test_the_smallest_that_fits_is_taken_and_no_more_is_kept_than_may_be() -> None:
    spares = Spares(10_000)
    small, large, more = (spares.take(n, CPU) for n in (2000, 7000, 6000))
    places = [tensor.data_ptr() for tensor in (small, large, more)]
    del small, large
    gc.collect()
    del more  # 15,000 would be too many
    gc.collect()
    assert spares.take(1500, CPU).data_ptr() == places[0]
    assert spares.take(2001, CPU).data_ptr() == places[1]
    assert sum(memory.nbytes for memory in spares._kept) <= 10_000

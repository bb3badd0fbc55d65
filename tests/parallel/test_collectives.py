"""Collectives between four ranks, and whom a rank blames when others are gone."""

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional import ops
from qnext.functional.mesh import TP
from qnext.runtime.ranks import BEAT, Channel
from tests.parallel.models import joined
from tests.parallel.ranks import WORLD, Ranks


def given(rank: int) -> Tensor:
    return torch.arange(8 * 3, dtype=torch.float32).view(8, 3) + 100 * rank


def made(name: str) -> Tensor:
    mesh = joined(WORLD, 1, 0, ())
    x, before = given(mesh.rank), given(mesh.rank)
    result: Tensor = getattr(ops, name)(x=x, group=mesh.group(TP), size=WORLD)
    assert x.equal(before), "an argument was written to"
    return result


def test_collectives(ranks: Ranks) -> None:
    """Each against the same of all ranks' tensors in one process; two rows a rank."""
    every = [given(rank) for rank in range(WORLD)]
    total, runs = torch.stack(every).sum(0), [x.chunk(WORLD) for x in every]
    wanted = {
        "all_reduce": [total] * WORLD,
        "all_gather": [torch.cat(every, dim=1)] * WORLD,
        "reduce_scatter": total.chunk(WORLD),
        "all_to_all": [torch.cat([theirs[rank] for theirs in runs]) for rank in range(WORLD)],
    }
    for name, want in wanted.items():
        for got, mine in zip(ranks.run(made, name), want, strict=True):
            assert got.equal(mine), name


def blamed(what: str) -> str | None:
    """What the first of four ranks says once a call has failed; rank 2 did what is told."""
    mesh = joined(WORLD, 1, 0, ())
    channel = Channel(mesh)
    torch.distributed.barrier()
    if mesh.rank == 2 and what == "failed":
        channel.failed(ValueError("no such row"))
    if mesh.rank == 2 and what == "gone":
        channel.close()  # no sign of life any more
    torch.distributed.barrier()
    told = None
    if mesh.rank == 0:
        channel._over.wait(1.5 * BEAT)
        told = str(channel.blame(RuntimeError("connection closed")))
    torch.distributed.barrier()
    channel._over.set()
    return told


@pytest.mark.parametrize(
    ("what", "want"),
    [
        ("gone", "rank 2 is gone"),
        ("nothing", "a call of rank 0 failed: connection closed"),
        ("failed", "rank 2 failed: ValueError: no such row"),  # the last: it stays said
    ],
)
def test_the_rank_that_is_at_fault_is_named(ranks: Ranks, what: str, want: str) -> None:
    assert ranks.run(blamed, what)[0] == want


def test_a_job_of_another_size_is_refused(ranks: Ranks) -> None:
    for told in ranks.run(refused):
        assert (
            told == "tp = 3 times dp = 1 takes 3 ranks, this job has 4: torchrun --nproc-per-node 3"
        )


def refused() -> str:
    with pytest.raises(qn.InputError) as error:
        qn.join(3)
    return str(error.value)

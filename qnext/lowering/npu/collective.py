"""Collectives as the NPU targets make them: one call of HCCL each, and nothing copied before."""

import torch
from torch import Tensor
from torch import distributed as dist

from qnext.functional.tree import process_group
from qnext.lowering.calls import call


@call(
    "HcclAllReduce",
    shapes=lambda *, x, **_: torch.empty_like(x),
    writes=("x",),
    flops=lambda *, x, size, **_: (size - 1) * x.numel(),
    collective=True,
)
def all_reduce(*, x: Tensor, group: str, size: int) -> Tensor:
    """The sum of every rank's x, in its place."""
    if size > 1:
        dist.all_reduce(x, group=process_group(group))
    return x


@call(
    "HcclAllGather",
    shapes=lambda *, x, size, **_: x.new_empty(size, *x.shape),
    collective=True,
)
def all_gather(*, x: Tensor, group: str, size: int) -> Tensor:
    """Every rank's x one after another: [size, *batch, part]."""
    whole = x.new_empty(size, *x.shape)
    dist.all_gather_into_tensor(whole, x, group=process_group(group))
    return whole


@call(
    "HcclReduceScatter",
    shapes=lambda *, x, size, **_: x.new_empty(x.shape[0] // size, x.shape[1]),
    flops=lambda *, x, size, **_: (size - 1) * x.numel() // size,
    collective=True,
)
def reduce_scatter(*, x: Tensor, group: str, size: int) -> Tensor:
    """This rank's run of tokens, of as many as there are ranks, of the sum of every rank's x."""
    part = x.new_empty(x.shape[0] // size, x.shape[1])
    dist.reduce_scatter_tensor(part, x, group=process_group(group))
    return part


def reduced(*, x: Tensor, group: str, size: int) -> Tensor:
    return all_reduce(x=x.contiguous(), group=group, size=size)


def gathered(*, x: Tensor, group: str, size: int) -> Tensor:
    """Two launches for several rows: HCCL puts ranks one after another, the next matrix wants them
    side by side."""
    whole = all_gather(x=x.contiguous(), group=group, size=size)
    return whole.movedim(0, -2).contiguous().flatten(-2)

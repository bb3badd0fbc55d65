"""Collectives as functions: a tensor of each rank in, a new tensor out, nothing in place.

`group` is the name of a process group of torch.distributed, `size` its ranks; of one rank a
collective changes nothing and needs no group. All ranks of a group must make the same calls in the
same order, with tensors of one shape. With gloo on CPUs, with HCCL on NPUs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import EXACT, SUMS, randn
from qnext.functional.tree import process_group


def _samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    yield {"x": randn(g, 3, 4, 7), "group": "", "size": 1}


def _flat_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    yield {"x": randn(g, 4, 7), "group": "", "size": 1}


@primitive(
    shapes=lambda *, x, **_: torch.empty_like(x),
    flops=lambda *, x, size, **_: (size - 1) * x.numel(),
    tolerance=SUMS,
    samples=_samples,
    collective=True,
)
def all_reduce(*, x: Float[Tensor, "*batch d"], group: str, size: int) -> Float[Tensor, "*batch d"]:
    """The sum of every rank's x, the same on all of them."""
    total = x.clone(memory_format=torch.contiguous_format)
    if size > 1:
        dist.all_reduce(total, group=process_group(group))
    return total


@primitive(
    shapes=lambda *, x, size, **_: x.new_empty((*x.shape[:-1], size * x.shape[-1])),
    flops=lambda **_: 0,
    tolerance=EXACT,
    samples=_samples,
    collective=True,
)
def all_gather(
    *, x: Float[Tensor, "*batch part"], group: str, size: int
) -> Float[Tensor, "*batch whole"]:
    """Every rank's x side by side along the last axis, in the order of ranks."""
    if size == 1:
        return x.clone()
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x, group=process_group(group))
    return torch.cat(parts, dim=-1)


@primitive(
    shapes=lambda *, x, size, **_: x.new_empty((x.shape[0] // size, x.shape[1])),
    flops=lambda *, x, size, **_: (size - 1) * x.numel() // size,
    tolerance=SUMS,
    samples=_flat_samples,
    collective=True,
)
def reduce_scatter(
    *, x: Float[Tensor, "tokens d"], group: str, size: int
) -> Float[Tensor, "part d"]:
    """This rank's tokens, of as many runs as there are ranks, of the sum of every rank's x."""
    if size == 1:
        return x.clone()
    part = x.new_empty((x.shape[0] // size, x.shape[1]))
    dist.reduce_scatter(part, list(x.contiguous().chunk(size)), group=process_group(group))
    return part


@primitive(
    shapes=lambda *, x, **_: torch.empty_like(x),
    flops=lambda **_: 0,
    tolerance=EXACT,
    samples=_flat_samples,
    collective=True,
)
def all_to_all(*, x: Float[Tensor, "tokens d"], group: str, size: int) -> Float[Tensor, "tokens d"]:
    """The i-th run of tokens, of as many as there are ranks, goes to rank i; what came, by rank."""
    return exchanged(x, group, size)


def exchanged(x: Tensor, group: str, size: int) -> Tensor:
    """`all_to_all` of any numbers along the first axis."""
    if size == 1:
        return x.clone()
    came = x.new_empty(x.shape)
    dist.all_to_all_single(came, x.contiguous(), group=process_group(group))
    return came

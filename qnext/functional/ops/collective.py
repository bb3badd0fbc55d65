"""Collectives as functions: a tensor of each rank in, a new tensor out, nothing in place.

`group` is the name of a process group of torch.distributed, `size` its ranks; of one rank a
collective changes nothing and needs no group. All ranks of a group must make the same calls in the
same order. With gloo on CPUs, with HCCL on NPUs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor
from torch import distributed as dist

from qnext.errors import QnextError
from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import EXACT, SUMS, randn


def _samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    yield {"x": randn(g, 3, 4, 7), "group": "", "size": 1}


def process_group(name: str) -> Any:
    """The process group of a name. Raises QnextError where this process has none."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(name)  # type: ignore[arg-type]
    except (KeyError, RuntimeError, ValueError) as error:
        raise QnextError(
            f"there is no process group {name!r} here: make the mesh with qn.join in each rank"
        ) from error


@primitive(
    shapes=lambda *, x, **_: torch.empty_like(x),
    flops=lambda *, x, size, **_: (size - 1) * x.numel(),
    tolerance=SUMS,
    samples=_samples,
)
def all_reduce(*, x: Num[Tensor, "*shape"], group: str, size: int) -> Num[Tensor, "*shape"]:
    """The sum of every rank's x, the same on all of them."""
    total = x.clone(memory_format=torch.contiguous_format)
    if size > 1:
        dist.all_reduce(total, group=process_group(group))
    return total


def _gathered(*, x: Tensor, size: int, **_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], size * x.shape[-1]))


@primitive(shapes=_gathered, flops=lambda **_: 0, tolerance=EXACT, samples=_samples)
def all_gather(
    *, x: Num[Tensor, "*shape part"], group: str, size: int
) -> Num[Tensor, "*shape whole"]:
    """Every rank's x side by side along the last axis, in the order of ranks."""
    if size == 1:
        return x.clone()
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x, group=process_group(group))
    return torch.cat(parts, dim=-1)


def _scattered(*, x: Tensor, size: int, **_: Any) -> Tensor:
    return x.new_empty((x.shape[0] // size, *x.shape[1:]))


@primitive(
    shapes=_scattered,
    flops=lambda *, x, size, **_: (size - 1) * x.numel() // size,
    tolerance=SUMS,
    samples=_samples,
)
def reduce_scatter(
    *, x: Num[Tensor, "parts ..."], group: str, size: int
) -> Num[Tensor, "part ..."]:
    """This rank's part, along the first axis, of the sum of every rank's x."""
    if size == 1:
        return x.clone()
    part = torch.empty_like(_scattered(x=x, size=size))
    dist.reduce_scatter(part, list(x.contiguous().chunk(size)), group=process_group(group))
    return part


@primitive(
    shapes=lambda *, x, **_: torch.empty_like(x),
    flops=lambda **_: 0,
    tolerance=EXACT,
    samples=_samples,
)
def all_to_all(*, x: Num[Tensor, "parts ..."], group: str, size: int) -> Num[Tensor, "parts ..."]:
    """Part i of x, along the first axis, goes to rank i; the parts that came, by rank."""
    if size == 1:
        return x.clone()
    came = x.new_empty(x.shape)
    dist.all_to_all_single(came, x.contiguous(), group=process_group(group))
    return came


@primitive(
    shapes=lambda *, x, **_: torch.empty_like(x),
    flops=lambda **_: 0,
    tolerance=EXACT,
    samples=_samples,
)
def broadcast(*, x: Num[Tensor, "*shape"], group: str, size: int) -> Num[Tensor, "*shape"]:
    """The x of the group's first rank."""
    told = x.clone(memory_format=torch.contiguous_format)
    if size > 1:
        dist.broadcast(told, group=process_group(group), group_src=0)
    return told

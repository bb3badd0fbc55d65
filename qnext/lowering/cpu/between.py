"""The cpu target's calls that are no primitives of the model: what lies between them.

Products, sums and gates of activations; and what lies around the layers: lengths, page numbers,
rows of tables, tokens. Each is defined by what it computes, in torch's operations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.functional.ops.moe import swiglu as _swiglu

# of integers and bools, in the order of kernels/small.cpp
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "floor_divide": torch.floor_divide,
    "remainder": torch.remainder,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
}


class Between(NamedTuple):
    """A call's schema, what it computes, the shapes of that, its work and the bytes it moves."""

    schema: str
    reference: Callable[..., Tensor]
    shapes: Callable[..., Any]
    flops: Callable[..., int] = lambda **_: 0
    bytes: Callable[..., int] | None = None  # None: arguments and results, all of them


def _like(name: str) -> Callable[..., Tensor]:
    return lambda **arguments: torch.empty_like(
        arguments[name], memory_format=torch.contiguous_format
    )


def _as_computed(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Shapes and dtype of what the reference yields, in memory of its own."""

    def shapes(**arguments: Any) -> Tensor:
        made = reference(**arguments)
        return made.new_empty(made.shape)

    return shapes


def _cast_shapes(*, x: Tensor, narrow: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16 if narrow else torch.float32)


def _linear_shapes(*, x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_flops(*, x: Tensor, weight: Tensor) -> int:
    return 2 * x.numel() * weight.shape[0]


def _add_up(*, x: Tensor, axis: int, running: bool, dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    return x.cumsum(axis, dtype=kind) if running else x.sum(axis, dtype=kind)


def _rows_bytes(*, x: Tensor, index: Tensor) -> int:
    return index.nbytes + 2 * index.numel() * x.shape[1] * x.itemsize


def _pick_bytes(*, x: Tensor, index: Tensor, axis: int) -> int:
    return index.nbytes + 2 * x.numel() // x.shape[axis] * index.shape[axis] * x.itemsize


def _put_bytes(*, pool: Tensor, index: Tensor, values: Tensor) -> int:
    return index.nbytes + 2 * values.nbytes


def _small(
    schema: str, reference: Callable[..., Tensor], bytes: Callable[..., int] | None = None
) -> Between:
    return Between(f"(*, {schema}) -> Tensor", reference, _as_computed(reference), bytes=bytes)


BETWEEN: dict[str, Between] = {
    "linear": Between(
        "(*, Tensor x, Tensor weight) -> Tensor",
        lambda *, x, weight: torch.nn.functional.linear(x, weight),
        _linear_shapes,
        _linear_flops,
    ),
    "swiglu": Between(
        "(*, Tensor gate, Tensor up) -> Tensor",
        lambda *, gate, up: _swiglu(torch.cat([gate, up], dim=-1)),
        _like("gate"),
        lambda *, gate, up: 5 * gate.numel(),
    ),
    "add": Between(
        "(*, Tensor a, Tensor b) -> Tensor",
        lambda *, a, b: a + b,
        _like("a"),
        lambda *, a, b: a.numel(),
    ),
    "gate": Between(
        "(*, Tensor x, Tensor gate) -> Tensor",
        lambda *, x, gate: x * gate.sigmoid(),
        _like("x"),
        lambda *, x, gate: 5 * x.numel(),
    ),
    "cast": Between(
        "(*, Tensor x, bool narrow) -> Tensor",
        lambda *, x, narrow: x.to(torch.bfloat16 if narrow else torch.float32),
        _cast_shapes,
        lambda *, x, narrow: x.numel(),
    ),
    "compute": _small(
        "Tensor a, Tensor b, str operation",
        lambda *, a, b, operation: OPERATIONS[operation](a, b),
    ),
    "choose": _small(
        "Tensor condition, Tensor x, Tensor other",
        lambda *, condition, x, other: torch.where(condition, x, other),
    ),
    "convert": _small("Tensor x, str dtype", lambda *, x, dtype: x.to(getattr(torch, dtype))),
    "add_up": _small("Tensor x, int axis, bool running, str dtype", _add_up),
    "largest": _small("Tensor x", lambda *, x: x.argmax(-1)),
    "finite": _small("Tensor x", lambda *, x: x.isfinite().all(-1)),
    "copy": _small("Tensor x", lambda *, x: x.clone()),
    "join": _small(
        "Tensor a, Tensor b, int axis", lambda *, a, b, axis: torch.cat([a, b], dim=axis)
    ),
    "rows": _small("Tensor x, Tensor index", lambda *, x, index: x[index.long()], _rows_bytes),
    "pick": _small(
        "Tensor x, Tensor index, int axis",
        lambda *, x, index, axis: x.take_along_dim(index.long(), dim=axis),
        _pick_bytes,
    ),
    "put_rows": _small(
        "Tensor pool, Tensor index, Tensor values",
        lambda *, pool, index, values: pool.index_put((index.long(),), values),
        _put_bytes,
    ),
    "write_back": _small(
        "Tensor into, Tensor values", lambda *, into, values: torch.empty_like(into).copy_(values)
    ),
}

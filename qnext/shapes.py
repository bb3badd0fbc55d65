"""Annotated trees: allocate them from their annotations, and check them against sizes or hints.

A tree is a NamedTuple whose fields are tensors annotated as `Float[Tensor, "hv dv dk"]`, trees, or
tuples of trees. The annotation is the only table of shapes: allocation, checkpoint loading and
error texts all read it. `Float[Tensor, "out in"] | Quantized` admits a tree that stands for the
tensor; the axes of that tree's tensors are `*rows columns` of it.

This module stays outside the packages that the jaxtyping hook rewrites: inside them `holds` would
get an axis scope of its own, and checks across arguments would pass unseen.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import torch
from beartype.vale import Is
from jaxtyping import Float64
from torch import Tensor

T = TypeVar("T")


class LeafHint(NamedTuple):
    """What an annotation says of a tensor: its axes by name or size, and its dtype if fixed."""

    axes: tuple[str, ...]
    dtype: torch.dtype | None  # None: any floating dtype
    label: str

    def admits(self, dtype: torch.dtype) -> bool:
        """Whether a leaf may have this dtype; for float32 float64 will do, as rounding needs it."""
        if self.dtype is None:
            return dtype.is_floating_point
        return dtype == self.dtype or (self.dtype, dtype) == (torch.float32, torch.float64)


@cache
def leaf_hint(hint: Any) -> LeafHint:
    """Read a jaxtyping annotation such as `Float32[Tensor, "hv dv"]`, or the first of several."""
    hint = _plain(hint)
    names = hint.dtypes
    dtype = getattr(torch, names[0]) if len(names) == 1 else None
    return LeafHint(tuple(hint.dim_str.split()), dtype, hint.__name__)


@cache
def _fields(cls: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(cls.__annotations__.items())


@cache
def _admitted(hint: Any) -> tuple[Any, ...]:
    """The hint and its wider twin, for isinstance."""
    hint = _plain(hint)
    wider = leaf_hint(hint).dtype == torch.float32
    return (hint, Float64[Tensor, hint.dim_str]) if wider else (hint,)


def is_leaf_hint(hint: object) -> bool:
    return hasattr(_plain(hint), "dim_str")


def _plain(hint: Any) -> Any:
    """The annotation of a tensor in `tensor | tree`; any other hint as it is."""
    return hint.__args__[0] if isinstance(hint, UnionType) else hint


def _stands_for(value: Any, hint: Any) -> bool:
    """Whether a value is the tree that an annotation admits in place of a tensor."""
    union = isinstance(hint, UnionType) and is_leaf_hint(hint)
    return union and isinstance(value, hint.__args__[1:])


@cache
def _parts(cls: Any, hint: Any) -> tuple[tuple[str, Any], ...]:
    """The fields of a tree that stands for a tensor, annotated with that tensor's axes."""
    axes = leaf_hint(hint).axes
    spelled = {"*rows": " ".join(axes[:-1]), "columns": axes[-1]}
    return tuple(
        (name, part.dtype[Tensor, " ".join(spelled[axis] for axis in part.dim_str.split())])
        for name, part in _fields(cls)
    )


def allocate(
    cls: Callable[..., T],
    sizes: Mapping[str, int],
    make: Callable[[tuple[int, ...], LeafHint], Tensor],
) -> T:
    """A tree of class `cls`, all of whose fields are tensors, each made by `make(shape, hint)`."""
    tensors = []
    for _, annotation in _fields(cls):
        hint = leaf_hint(annotation)
        tensors.append(make(tuple(_size(axis, sizes) for axis in hint.axes), hint))
    return cls(*tensors)


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    return int(axis) if axis.isdigit() else sizes[axis]


def annotated_leaves(tree: Any, path: str) -> Iterator[tuple[str, Tensor, LeafHint]]:
    """Each tensor field of a tree with its path and its annotation."""
    if not hasattr(tree, "_fields"):
        for i, part in enumerate(tree):
            yield from annotated_leaves(part, f"{path}[{i}]")
        return
    for (name, hint), value in zip(_fields(tree.__class__), tree, strict=True):
        if _stands_for(value, hint):
            for (part, part_hint), leaf in zip(_parts(value.__class__, hint), value, strict=True):
                yield f"{path}.{name}.{part}", leaf, leaf_hint(part_hint)
        elif is_leaf_hint(hint):
            yield f"{path}.{name}", value, leaf_hint(hint)
        elif isinstance(value, tuple):
            yield from annotated_leaves(value, f"{path}.{name}")


def alternatives(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Each field of a tree that may be a tensor or a tree that stands for it, with its path."""
    if not hasattr(tree, "_fields"):
        for i, part in enumerate(tree):
            yield from alternatives(part, f"{path}[{i}]")
        return
    for (name, hint), value in zip(_fields(tree.__class__), tree, strict=True):
        if isinstance(hint, UnionType) and is_leaf_hint(hint):
            yield f"{path}.{name}", value
        elif isinstance(value, tuple):
            yield from alternatives(value, f"{path}.{name}")


def mismatches(tree: Any, sizes: Mapping[str, int], path: str) -> list[str]:
    """What does not fit the annotations, a line each; unknown axes must agree with each other.

    `sizes` gives the model's axes; an axis it does not name is bound by the first tensor that has
    it. An axis is written with its size in the message, `hv=4`.
    """
    bound = dict(sizes)
    wrong = []
    for where, leaf, hint in annotated_leaves(tree, path):
        if not isinstance(leaf, Tensor):
            wrong.append(f"{where} must be a tensor, got {type(leaf).__name__}")
            continue
        if not hint.admits(leaf.dtype):
            wrong.append(f"{where} must be {hint.dtype or 'floating point'}, got {leaf.dtype}")
        shape = tuple(leaf.shape)
        fits = len(shape) == len(hint.axes) and all(
            (int(axis) if axis.isdigit() else bound.setdefault(axis, size)) == size
            for axis, size in zip(hint.axes, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(f"{a}={bound[a]}" if a in bound else a for a in hint.axes)
            wrong.append(f"{where} must be [{wanted}], got {list(shape)}")
    return wrong


def holds(tree: Any) -> bool:
    """Whether every tensor of a tree fits its annotation, in the caller's axis scope."""
    return _holds(tree, {})


def _holds(tree: Any, seen: dict[str, int]) -> bool:
    """`holds`, beside the axes of the scope that this tree has already shown, with their sizes."""
    if not hasattr(tree, "_fields"):
        return not isinstance(tree, tuple) or all(_holds(part, seen) for part in tree)
    for (_, hint), value in zip(_fields(tree.__class__), tree, strict=True):
        if _stands_for(value, hint):
            parts = zip(_parts(value.__class__, hint), value, strict=True)
            if not all(_leaf_holds(leaf, part, seen) for (_, part), leaf in parts):
                return False
        elif is_leaf_hint(hint):
            if not _leaf_holds(value, hint, seen):
                return False
        elif isinstance(value, tuple) and not _holds(value, seen):
            return False
    return True


def _leaf_holds(value: Any, hint: Any, seen: dict[str, int]) -> bool:
    """Ask jaxtyping, which takes its time, unless all axes are known and fit."""
    said = leaf_hint(hint)
    if isinstance(value, Tensor) and said.admits(value.dtype):
        sizes = tuple(map(seen.get, said.axes))
        if sizes == value.shape:
            return True
    if not isinstance(value, _admitted(hint)):
        return False
    seen.update((a, n) for a, n in zip(said.axes, value.shape, strict=True) if not a.isdigit())
    return True


if TYPE_CHECKING:
    Shaped = Annotated[T, "shapes checked"]
else:

    class Shaped:
        """`Shaped[State]`: a State whose tensors fit their annotations, checked by beartype."""

        def __class_getitem__(cls, tree):
            return Annotated[tree, Is[holds]]

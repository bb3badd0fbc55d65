"""Tracing: a pure function of trees becomes a graph over its leaves, on shapes alone."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from qnext.errors import LoweringError
from qnext.functional.tree import (
    fake_mode,
    leaves,
    leaves_with_paths,
    map_leaves,
    rebuild,
    record,
    same_structure,
)


class Leaf(NamedTuple):
    """What a compiled function wants of one tensor of its arguments."""

    path: str  # state.layers[3].window
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Trace:
    """A function on given specs: a graph from the tensors of its arguments to those of its result.

    `arguments` and `result` are the trees, specs as leaves; `leaves` names the graph's inputs in
    order, `outputs` its outputs.
    """

    function: Callable[..., Any]
    graph: GraphModule
    arguments: dict[str, Any]
    result: Any
    leaves: tuple[Leaf, ...]
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.function.__name__


def successors(arguments: dict[str, Any], result: Any, names: Collection[str]) -> dict[int, int]:
    """Where the next values of some arguments are: place among the results -> among the inputs.

    An argument's next value is the result of the same structure, shapes and dtypes.
    """
    results = result if type(result) in (tuple, list) else (result,)
    found: dict[int, int] = {}
    at_input = 0
    for name, tree in arguments.items():
        at_output, mine = 0, tensors_of(tree)
        for part in results:
            next_ones = leaves(part)
            if name in names and _alike(tree, part) and at_output not in found:
                places = range(len(next_ones))
                found |= {at_output + i: at_input + i for i in places}
                break
            at_output += len(next_ones)
        at_input += len(mine)
    return found


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors among a tree's leaves."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def _alike(tree: Any, other: Any) -> bool:
    pairs = zip(leaves(tree), leaves(other), strict=False)
    return same_structure(tree, other) and all(
        isinstance(a, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs
    )


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """Arguments by the names of the function's parameters."""
    signature, names = _signature(function)
    if not kwargs and len(args) <= len(names):
        return dict(zip(names, args, strict=False))
    try:
        return dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError as error:
        raise LoweringError(f"{function.__name__}{signature}: {error}") from None


@lru_cache(maxsize=64)  # asked anew with every step otherwise
def _signature(function: Callable[..., Any]) -> tuple[inspect.Signature, list[str]]:
    """And the names of the parameters that may be given by place."""
    signature = inspect.signature(function)
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return signature, [p.name for p in signature.parameters.values() if p.kind in by_place]


def paths(tree: Any, root: str) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths from `root`."""
    return [(root + path, leaf) for path, leaf in leaves_with_paths(tree)]


def named_leaves(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """All leaves of all arguments: `state.lengths`, `tokens`, ..."""
    return [found for name, tree in arguments.items() for found in paths(tree, name)]


def specs_of(tree: Any) -> Any:
    """The same tree with specs as leaves: what it is, and none of its memory."""

    def spec(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    return map_leaves(spec, tree)


def trace(function: Callable[..., Any], arguments: dict[str, Any]) -> Trace:
    """Record what a function does with arguments of these shapes and dtypes.

    Arguments are trees of tensors, of specs (tensors on "meta") or of fake tensors; nothing is
    computed. What is no tensor is a constant of the graph.
    """
    given = named_leaves(arguments)
    inputs = [(path, leaf) for path, leaf in given if isinstance(leaf, Tensor)]
    cell: list[Any] = []

    def flat(*values: Tensor) -> list[Any]:
        arriving = iter(values)
        filled = [next(arriving) if isinstance(leaf, Tensor) else leaf for _, leaf in given]
        result = function(**rebuild(arguments, filled))
        cell.append(result)
        return leaves(result)

    with fake_mode(), torch.no_grad():
        stand_ins = [torch.empty(leaf.shape, dtype=leaf.dtype) for _, leaf in inputs]
        graph = record(flat, stand_ins)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, (path, _) in zip(placeholders, inputs, strict=True):
        node.meta["path"] = path
    result = cell[-1]
    strange = [path for path, leaf in paths(result, "result") if not isinstance(leaf, Tensor)]
    if strange:
        raise LoweringError(
            f"{function.__name__} must return trees of tensors; {strange[0]} is none"
        )
    return Trace(
        function=function,
        graph=graph,
        arguments=specs_of(arguments),
        result=specs_of(result),
        leaves=tuple(Leaf(path, tuple(leaf.shape), leaf.dtype) for path, leaf in inputs),
        outputs=tuple(path for path, _ in paths(result, "result")),
    )

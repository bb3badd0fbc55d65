"""Calls of a target: what rules emit. Each is one operator that stays a single node of a graph.

A call is defined by a function that runs it on the target (marshalling only) and by the shapes of
its results, so that it can be lowered to on a machine that has neither the target nor its package.
In the graph a call that writes is a function all the same: it takes a pool and returns the pool;
on the target it writes in place, and `donate.settle` sees to it that nobody notices.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qnext.functional.tree import is_fake, is_tracing

NAMESPACE = "qnext_calls"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_TYPES = {int: "int", float: "float", bool: "bool", str: "str", list[int]: "int[]"}


@dataclass(frozen=True)
class Call:
    """The record of one call: the page that documents it, what it writes, what it costs."""

    name: str
    page: str  # the package's name for it, which is that of its page
    run: Callable[..., Any]
    shapes: Callable[..., Any]
    writes: tuple[str, ...]
    flops: Callable[..., int]
    bytes: Callable[..., int] | None
    launches: int = 1  # nodes of a captured graph
    # a list that the package takes from the host alone, the tensor whose values it holds, and the
    # package's name for the list
    host: tuple[str, str, str] | None = None
    collective: bool = False  # all ranks of a group make it together

    @property
    def op(self) -> Any:
        """The `torch.ops` overload that appears as a node in graphs."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


CALLS: dict[str, Call] = {}


def call(
    page: str,
    *,
    shapes: Callable[..., Any],
    writes: tuple[str, ...] = (),
    flops: Callable[..., int] = lambda **_: 0,
    bytes: Callable[..., int] | None = None,
    launches: int = 1,
    host: tuple[str, str, str] | None = None,
    collective: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define a call from the function that runs it, whose arguments are all keywords.

    `writes` names the arguments it overwrites; they are its last results, in that order. `bytes` is
    what moves, where that is not every argument and every result once.
    """

    def define(run: Callable[..., Any]) -> Callable[..., Any]:
        name = run.__name__
        record = Call(name, page, run, shapes, writes, flops, bytes, launches, host, collective)
        return register(record, _schema(run))

    return define


def register(record: Call, schema: str) -> Callable[..., Any]:
    """Make a call an operator of torch's; `schema` is what follows its name."""

    def kernel(**arguments: Any) -> Any:
        faked = any(is_fake(value) for value in arguments.values())
        return (record.shapes if faked and not is_tracing() else record.run)(**arguments)

    _LIBRARY.define(record.name + schema)
    _LIBRARY.impl(record.name, kernel, "CompositeImplicitAutograd")
    CALLS[record.name] = record
    operator = getattr(getattr(torch.ops, NAMESPACE), record.name)
    operator.__doc__ = record.run.__doc__
    return operator


def call_of(node: Node) -> Call | None:
    """The call that a node makes, if it makes one."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith(f"{NAMESPACE}::"):
        return None
    return CALLS[schema.name.partition("::")[2]]


def _schema(run: Callable[..., Any]) -> str:
    """`(*, Tensor x, float eps) -> (Tensor, Tensor)` from a function's annotations."""
    signature = inspect.signature(run)
    parts = [
        f"{_TYPES.get(parameter.annotation, 'Tensor')} {name}"
        for name, parameter in signature.parameters.items()
    ]
    results = getattr(signature.return_annotation, "__args__", ())
    outputs = f"({', '.join(['Tensor'] * len(results))})" if results else "Tensor"
    if not results and signature.return_annotation is not Tensor:
        raise TypeError(f"{run.__name__} must return Tensor or a tuple of Tensors")
    return f"(*, {', '.join(parts)}) -> {outputs}"


@call(
    "copy_",
    shapes=lambda *, into, values: torch.empty_like(into),
    writes=("into",),
    bytes=lambda *, into, values: into.nbytes + values.nbytes,
)
def write_back(*, into: Tensor, values: Tensor) -> Tensor:
    """The memory of `into`, holding `values`."""
    return into.copy_(values)

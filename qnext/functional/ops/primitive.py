"""Primitives: the operations that lowering knows by name, each defined once.

A primitive is a `torch.library` operator under `qnext::` whose implementation is its reference: a
plain, differentiable PyTorch function. In eager mode it just runs. Under `make_fx(...,
pre_dispatch=True)` it stays a single node, which is what rewriting rules match.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.functional.tree import is_fake, is_tracing

Axes = Mapping[str, int]


class Tolerance(NamedTuple):
    """Greatest relative RMS difference of a fast path from the reference, and why it may be."""

    relative_rms: float
    why: str


@dataclass(frozen=True)
class Primitive:
    """The record of one primitive.

    `reference` is the definition. `shapes` gives outputs of the right shape and dtype without
    computing. `flops` and `bytes` count one call's work from its arguments, for roofline
    estimates. `samples` makes keyword arguments for tests, no two axes of equal size. A
    `collective` is a call of torch.distributed, on every target.
    """

    name: str
    reference: Callable[..., Any]
    shapes: Callable[..., Any]
    flops: Callable[..., int]
    bytes: Callable[..., int]
    tolerance: Mapping[torch.dtype, Tolerance]
    samples: Callable[[torch.Generator], Iterator[dict[str, Any]]]
    schema: str
    collective: bool

    @property
    def op(self) -> Any:
        """The `torch.ops` overload that appears as a node in traced graphs."""
        return getattr(torch.ops.qnext, self.name).default


PRIMITIVES: dict[str, Primitive] = {}
_LIBRARY = torch.library.Library("qnext", "FRAGMENT")


def primitive(
    *,
    shapes: Callable[..., Any],
    flops: Callable[..., int],
    bytes: Callable[..., int] | None = None,
    tolerance: Mapping[torch.dtype, Tolerance],
    samples: Callable[[torch.Generator], Iterator[dict[str, Any]]],
    collective: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define `qnext::<name>` from its reference, a function of keyword-only arguments."""

    def define(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = reference.__name__
        schema = name + _schema(reference)
        _LIBRARY.define(schema)

        def kernel(**arguments: Any) -> Any:
            faked = any(is_fake(value) for value in arguments.values())
            # a trace that opens primitives records what runs here: it must be the body
            return shapes(**arguments) if faked and not is_tracing() else reference(**arguments)

        # CompositeImplicitAutograd keeps keyword-only tensors, gradients and one node a call
        _LIBRARY.impl(name, kernel, "CompositeImplicitAutograd")
        PRIMITIVES[name] = Primitive(
            name,
            reference,
            shapes,
            flops,
            bytes or partial(traffic, shapes),
            tolerance,
            samples,
            schema,
            collective,
        )
        call = getattr(torch.ops.qnext, name)
        call.__doc__ = reference.__doc__
        return call

    return define


def traffic(shapes: Callable[..., Any], **arguments: Any) -> int:
    """Bytes of a call that reads each tensor argument once and writes each output once."""
    outputs = shapes(**{k: _meta(v) for k, v in arguments.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(t.nbytes for t in (*arguments.values(), *outputs) if isinstance(t, Tensor))


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _schema(reference: Callable[..., Any]) -> str:
    """`(*, Tensor x, float eps) -> Tensor` from a function's annotations."""
    signature = inspect.signature(reference)
    words = {int: "int", float: "float", bool: "bool", str: "str"}
    parts = [f"{words.get(p.annotation, 'Tensor')} {n}" for n, p in signature.parameters.items()]
    results = getattr(signature.return_annotation, "__args__", ())
    outputs = f"({', '.join(['Tensor'] * len(results))})" if _is_tuple(signature) else "Tensor"
    return f"(*, {', '.join(parts)}) -> {outputs}"


def _is_tuple(signature: inspect.Signature) -> bool:
    return getattr(signature.return_annotation, "__origin__", None) is tuple

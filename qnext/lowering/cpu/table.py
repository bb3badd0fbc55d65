"""The rules of the cpu target: a kernel in place of each primitive, and of what lies between."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qnext.lowering.cpu.calls import BETWEEN, BOOL, INDEX, KERNELS, OPS
from qnext.lowering.cpu.library import FLOATS, MAX_DIMS, short
from qnext.lowering.cpu.small import SMALL_RULES
from qnext.lowering.graph import site_name, value
from qnext.lowering.rules import Match, Rule
from qnext.lowering.target import Target

INTEGERS = (torch.int32, torch.int64)
LONGEST_INT8 = 1 << 16  # products of unsigned by signed bytes that 32 bits hold


def _misfit(types: Mapping[str, str], given: Mapping[str, Any]) -> str | None:
    """Why a kernel does not take some tensors, or None."""
    letters: dict[str, tuple[str, torch.dtype]] = {}
    for name, wanted in types.items():
        tensor = given[name]
        if wanted == INDEX:
            wanted, good = "int32 or int64", tensor.dtype in INTEGERS
        elif len(wanted) == 1:
            wanted, good = "float32 or bfloat16", tensor.dtype in FLOATS
            first, dtype = letters.setdefault(types[name], (name, tensor.dtype))
            if good and dtype != tensor.dtype:
                return f"{name} is {short(tensor.dtype)}, {first} {short(dtype)}"
        else:
            good = short(tensor.dtype) == wanted
        if not good:
            return f"{name} is {short(tensor.dtype)}, the kernel takes {wanted}"
        if tensor.ndim > MAX_DIMS:
            return f"{name} has {tensor.ndim} axes, the kernel takes {MAX_DIMS}"
        if types[name] not in (INDEX, BOOL) and _is_scattered(tensor):
            return f"{name}'s last axis does not lie together"
    return None


def _is_scattered(tensor: Tensor) -> bool:
    return bool(tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1)


def _takes(name: str) -> Any:
    """The guard of a kernel's rule."""

    def guard(target: Target, **given: Any) -> str | None:
        return _misfit(KERNELS[name].types, given) or _limits(name, given)

    return guard


def _limits(name: str, given: Mapping[str, Any]) -> str | None:
    """What a kernel wants beyond dtypes."""
    if name == "int8_linear" and given["x"].shape[-1] > LONGEST_INT8:
        return f"{given['x'].shape[-1]} columns, the kernel sums up to {LONGEST_INT8}"
    if name == "int8_linear" and not given["x_scale"].is_contiguous():
        return "x_scale does not lie together"
    if (
        name == "int8_experts"
        and max(given["gate_up"].shape[2], given["down"].shape[2]) > LONGEST_INT8
    ):
        return f"the kernel sums up to {LONGEST_INT8} columns"
    return None


def _pair(node: Node) -> tuple[Node, Node] | None:
    """The operands of an operation, if they are two tensors and nothing else."""
    if len(node.args) == 2 and not node.kwargs and all(isinstance(a, Node) for a in node.args):
        return node.args  # type: ignore[return-value]
    return None


def _linear(node: Node) -> Match | None:
    """A product with a matrix, without a bias."""
    pair = _pair(node)
    if pair is None or value(pair[1]).ndim != 2:
        return None
    return Match({"x": pair[0], "weight": pair[1]}, (node,))


def _add(node: Node) -> Match | None:
    pair = _pair(node)
    if pair is None or not all(_alike(node, each) for each in pair):
        return None
    return Match({"a": pair[0], "b": pair[1]}, (node,))


def _alike(node: Node, other: Node) -> bool:
    return bool(value(node).shape == value(other).shape)


def _swiglu(node: Node) -> Match | None:
    """silu(gate) * up."""
    pair = _pair(node)
    for silu, up in (pair, pair[::-1]) if pair else ():
        alike = _alike(node, silu) and _alike(node, up)
        if alike and site_name(silu) == "silu" and len(silu.users) == 1:
            return Match({"gate": silu.args[0], "up": up}, (node,))
    return None


def _gate(node: Node) -> Match | None:
    """x * sigmoid(gate), a gate for each number or for each row."""
    pair = _pair(node)
    for sigmoid, x in (pair, pair[::-1]) if pair else ():
        if site_name(sigmoid) == "sigmoid" and len(sigmoid.users) == 1 and _alike(node, x):
            shape = value(node).shape
            if value(sigmoid).shape in (shape, torch.Size((*shape[:-1], 1))):
                return Match({"x": x, "gate": sigmoid.args[0]}, (node,))
    return None


def _cast(node: Node) -> Match | None:
    """A change of dtype and of nothing else."""
    x = node.args[0]
    if not isinstance(x, Node) or not isinstance(value(node), Tensor):
        return None
    if value(node).dtype not in FLOATS or value(x).dtype not in FLOATS:
        return None
    return Match({"x": x, "narrow": value(node).dtype == torch.bfloat16}, (node,))


def _rule(name: str) -> Rule:
    return Rule(name, name, OPS[name], f"kernel {name}", _takes(name))


RULES = (
    *(_rule(name) for name in KERNELS if name not in BETWEEN),
    Rule("linear", "linear", OPS["linear"], "kernel linear", _takes("linear"), _linear),
    Rule("swiglu", "mul", OPS["swiglu"], "kernel swiglu", _takes("swiglu"), _swiglu),
    Rule("gate", "mul", OPS["gate"], "kernel gate", _takes("gate"), _gate),
    Rule("add", "add", OPS["add"], "kernel add", _takes("add"), _add),
    Rule("cast", "to", OPS["cast"], "kernel cast", _takes("cast"), _cast),
    *SMALL_RULES,
)
PASSES = ()

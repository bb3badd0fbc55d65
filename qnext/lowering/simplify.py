"""Passes that change no value: static values known from shapes alone, and common nodes once."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from qnext.functional.tree import map_leaves
from qnext.lowering.graph import tensors, value

SMALL = 1 << 16  # elements; greater static values are left to be computed on the device
SHAPE_ONLY = {"aten::ones_like", "aten::zeros_like", "aten::full_like"}


def find_static(graph: Graph) -> None:
    """Note in `meta["static"]` the values that shapes alone determine: a range, ones like these.

    A decode step takes one token of every row: that all are valid follows from no value, and rules
    may rely on it as on a shape.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not tensors(value(node)):
            continue
        if sum(t.numel() for t in tensors(value(node))) > SMALL:
            continue
        schema = getattr(node.target, "_schema", None)
        name = schema.name if schema else ""
        if name in SHAPE_ONLY:
            like = value(node.args[0])
            real = torch.empty(like.shape, dtype=like.dtype)
            node.meta["static"] = node.target(real, *node.args[1:], **node.kwargs)
        elif all("static" in parent.meta for parent in node.all_input_nodes):
            args, kwargs = map_leaves(_static, (list(node.args), dict(node.kwargs)))
            node.meta["static"] = node.target(*args, **kwargs)


def _static(part: Any) -> Any:
    return part.meta["static"] if isinstance(part, Node) else part


def static_of(node: Any) -> Tensor | None:
    """A node's value where shapes alone determine it."""
    return node.meta.get("static") if isinstance(node, Node) else None


def merge_equal(graph: Graph) -> None:
    """Compute once what several nodes compute from the same inputs.

    Only for what reads tensors and makes new ones: in a graph everything does, writes included,
    but a write must keep a pool of its own, so nodes whose results are large are left alone.
    """
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = _key(node)
        if (first := seen.setdefault(key, node)) is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _key(node: Node) -> Any:
    return (node.target, _frozen(node.args), _frozen(node.kwargs))


def _frozen(part: Any) -> Any:
    if isinstance(part, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(part.items()))
    if isinstance(part, list | tuple):
        return tuple(_frozen(v) for v in part)
    # 1, 1.0 and True are equal, and not the same argument
    return part if isinstance(part, Node) else (type(part).__name__, repr(part))

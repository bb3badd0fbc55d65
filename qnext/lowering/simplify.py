"""Passes that change no value: what shapes alone determine, and common nodes once."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from qnext.functional.tree import map_leaves
from qnext.lowering.graph import insert, site_name, tensors, value

SMALL = 1 << 16  # elements; greater static values are left to be computed on the device
SHAPE_ONLY = {"aten::ones_like", "aten::zeros_like", "aten::full_like"}
DTYPE_ONLY = {"aten::new_ones", "aten::new_zeros", "aten::new_full"}


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
        if name in SHAPE_ONLY | DTYPE_ONLY:
            like = value(node.args[0])
            real = torch.empty(like.shape if name in SHAPE_ONLY else 0, dtype=like.dtype)
            node.meta["static"] = node.target(real, *node.args[1:], **node.kwargs)
        elif all("static" in parent.meta for parent in node.all_input_nodes):
            args, kwargs = map_leaves(_static, (list(node.args), dict(node.kwargs)))
            node.meta["static"] = node.target(*args, **kwargs)


def _static(part: Any) -> Any:
    return part.meta["static"] if isinstance(part, Node) else part


def static_of(node: Any) -> Tensor | None:
    """A node's value where shapes alone determine it."""
    return node.meta.get("static") if isinstance(node, Node) else None


def fold(graph: Graph) -> None:
    """Use what `find_static` found: constants depend on no argument, and idle operations go.

    A choice whose condition is known everywhere is one of its branches, and adding known zeros is
    nothing. What is left of a constant is a creation from its shape.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(value(node), Tensor):
            continue
        known = static_of(node)
        if known is not None and node.all_input_nodes and _uniform(known):
            _replace(graph, node, _filled(graph, node, known))
        elif known is None and (same := _idle(node)) is not None:
            node.replace_all_uses_with(same)
    graph.eliminate_dead_code()


def _uniform(known: Tensor) -> bool:
    return known.numel() > 0 and bool((known == known.flatten()[0]).all())


def _filled(graph: Graph, node: Node, known: Tensor) -> Node:
    fake, fill = value(node), known.flatten()[0].item()
    options = {"dtype": fake.dtype, "device": fake.device, "pin_memory": False}
    with graph.inserting_before(node):
        made = insert(graph, torch.ops.aten.full.default, list(known.shape), fill, **options)
    made.meta["static"] = known
    return made


def _replace(graph: Graph, old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _idle(node: Node) -> Node | None:
    """The input that a node passes on unchanged, if shapes tell so."""
    same: Any = None
    if site_name(node) == "where" and (known := static_of(node.args[0])) is not None:
        same = node.args[1] if known.all() else node.args[2] if not known.any() else None
    elif site_name(node) == "add" and not node.kwargs:
        a, b = node.args
        if (known := static_of(b)) is not None and not known.any():
            same = a
        elif (known := static_of(a)) is not None and not known.any():
            same = b
    if not isinstance(same, Node):
        return None
    was, now = value(node), value(same)
    return same if (was.shape, was.dtype) == (now.shape, now.dtype) else None


def merge_equal(graph: Graph) -> None:
    """Compute once what several nodes compute from the same inputs.

    In a graph everything is a function, writes included: two equal ones of a pool are one.
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

"""A view over FX graphs: which nodes are sites, what they compute, where in the model they are."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from qnext.errors import LoweringError
from qnext.functional.ops import PRIMITIVES, Primitive
from qnext.functional.tree import fake_mode_of, map_leaves

NAMESPACE = "qnext::"
NOWHERE = ("constant.", "host.")  # inputs that say nothing of the part they are used in


def tensors(value: Any) -> list[Tensor]:
    """The tensors among a node's value, which is a tensor, a tuple of them, or neither."""
    parts = value if isinstance(value, list | tuple) else (value,)
    return [part for part in parts if isinstance(part, Tensor)]


def value(node: Node) -> Any:
    """What a node yields, as fake tensors."""
    return node.meta["val"]


def primitive_of(node: Node) -> Primitive | None:
    """The primitive that a node calls, if it calls one."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.name.startswith(NAMESPACE):
        return None
    return PRIMITIVES[schema.name.removeprefix(NAMESPACE)]


def is_view(node: Node) -> bool:
    """Whether a node only looks at memory of its inputs in another way."""
    if "val" not in node.meta:
        return True
    mine = {storage_of(t) for t in tensors(value(node))}
    theirs = {storage_of(t) for parent in node.all_input_nodes for t in tensors(value(parent))}
    return mine <= theirs


def storage_of(tensor: Tensor) -> int:
    """What two tensors that look at the same memory have in common; fake ones have it too."""
    return tensor.untyped_storage()._cdata


def sites(graph: Graph) -> Iterator[Node]:
    """The nodes that compute something, in order."""
    for node in graph.nodes:
        if node.op == "call_function" and not is_view(node):
            yield node


def site_name(node: Node) -> str:
    """A site in one word: the primitive, or torch's name of the operation."""
    if found := primitive_of(node):
        return found.name
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.name.rpartition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def arguments(node: Node) -> dict[str, Any]:
    """A primitive node's keyword arguments, fake tensors in place of nodes."""
    return {k: value(v) if isinstance(v, Node) else v for k, v in node.kwargs.items()}


def argument_of(path: str) -> str:
    """The argument a leaf belongs to: `params` of `params.layers[3].mixer.conv`."""
    return path.partition(".")[0].partition("[")[0]


def scope_of(path: str) -> str:
    """The part of the model a leaf belongs to: `.layers[3]` of `params.layers[3].mixer.conv`."""
    inside = path[path.find(".") :] if "." in path else ""
    bracket = inside.find("]")
    return inside[: bracket + 1] if bracket >= 0 else ""


def scopes(graph: Graph) -> dict[Node, str]:
    """For each site the part of the model it belongs to, `""` for what all parts share.

    A site that reads a leaf of a part belongs to it; a leaf of no part (the last norm's weight)
    has its one reader in none. A site that reads neither goes with the one before it, as parts run
    one after another: what many sites read (the block table) says nothing of where they are.
    """
    owner, current = {}, ""
    for node in sites(graph):
        leaves = [parent for parent in node.all_input_nodes if parent.op == "placeholder"]
        leaves = [leaf for leaf in leaves if not leaf.meta["path"].startswith(NOWHERE)]
        found = [(scope_of(leaf.meta["path"]), len(leaf.users)) for leaf in leaves]
        if told := [scope for scope, readers in found if scope or readers == 1]:
            current = max(told, key=len)
        owner[node] = current
    return owner


def verify(graph: Graph) -> None:
    """Raise LoweringError unless every node has a fake value and uses only earlier nodes."""
    graph.lint()
    for node in graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            raise LoweringError(
                f"node {node.name} ({site_name(node)}) has no shape: a rule's fault"
            )


def insert(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node with its fake value, at the place where the graph inserts now."""
    node = graph.call_function(target, args, kwargs)
    evaluate(node, fake_mode_of(_leaves(graph)))
    return node


def _leaves(graph: Graph) -> list[Tensor]:
    return [t for n in graph.nodes if n.op == "placeholder" for t in tensors(value(n))]


def evaluate(node: Node, mode: Any) -> None:
    """Compute a node's fake value from its inputs'."""
    with mode, torch.no_grad():
        args, kwargs = map_leaves(_value_of, (list(node.args), dict(node.kwargs)))
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def propagate(graph: Graph) -> None:
    """Compute every node's fake value anew from its inputs', after a rewrite."""
    mode = fake_mode_of(_leaves(graph))
    for node in graph.nodes:
        if node.op == "call_function":
            evaluate(node, mode)


def _value_of(part: Any) -> Any:
    return value(part) if isinstance(part, Node) else part


def shape_text(tensor: Tensor) -> str:
    """`[8,32,128,128]bf16`."""
    short = {"bfloat16": "bf16", "bool": "b8"}
    name = str(tensor.dtype).removeprefix("torch.")
    name = short.get(name, name.replace("float", "f").replace("int", "i"))
    return f"[{','.join(map(str, tensor.shape))}]{name}"


def on_device(graph: Graph, device: torch.device) -> None:
    """Make a graph run on `device`.

    What depends on no input is still computed on the host, as the reference computes it, and moved:
    a device's own power or cosine would give another table of angles.
    """
    free: set[Node] = set()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if free.issuperset(node.all_input_nodes):
            free.add(node)
        elif isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": device}
    for node in free:
        bound = [user for user in node.users if user not in free]
        if bound:
            with graph.inserting_after(node):
                moved = graph.call_function(
                    torch.ops.aten._to_copy.default, (node,), {"device": device}
                )
            moved.meta["val"] = value(node)  # of its shape, wherever it is
            for user in bound:
                user.replace_input_with(node, moved)

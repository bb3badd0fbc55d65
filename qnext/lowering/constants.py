"""Partial evaluation: what depends on the weights alone is computed once, not in every step.

Packed projections, `1 + w` of a norm, tables of angles: rules write them into the graph where they
are used, and this pass moves them into a graph of their own, run when a step is bound to weights.
"""

from collections.abc import Collection

import torch
from torch.fx import Graph, GraphModule, Node

from qnext.lowering.graph import argument_of, insert, is_view, scope_of, value

PACKED = "packed"  # what constants made of weights are called among the step's inputs,
FREE = "constant"  # and those made of nothing


def take_out(module: GraphModule, weights: Collection[str]) -> GraphModule:
    """Move what depends on the leaves of `weights` (argument names) alone into a graph of its own.

    That graph takes the same inputs and returns the constants; the step takes them as further
    inputs after its own. A node that only looks at weights in another way stays: it costs nothing.
    What depends on nothing at all (a range, a mask) is a constant too.
    """
    graph = module.graph
    constant = _constant(graph, weights)
    wanted = [
        node
        for node in graph.nodes
        if node in constant
        and node.op == "call_function"
        and not _looks_at_a_leaf(node)
        and any(user not in constant for user in node.users)
    ]
    prepare = _prepare(graph, constant, wanted)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in wanted:
        with graph.inserting_before(first):
            packed = graph.placeholder(f"packed_{node.name}")
        packed.meta = {"val": value(node), "path": f"{_origin(node)}.{node.name}"}
        node.replace_all_uses_with(packed)
        _keep_to_itself(graph, packed)
    graph.eliminate_dead_code()
    module.recompile()
    return GraphModule(module, prepare)


def _keep_to_itself(graph: Graph, packed: Node) -> None:
    """A constant that is a result is returned as a copy: whoever gets it may donate it."""
    for output in [user for user in packed.users if user.op == "output"]:
        with graph.inserting_before(output):
            fresh = insert(graph, torch.ops.aten.clone.default, packed)
        output.replace_input_with(packed, fresh)


def _origin(node: Node) -> str:
    """The part of the model that a constant's weights belong to, if it has any."""
    seen = [node]
    for each in seen:
        if each.op == "placeholder":
            return PACKED + scope_of(each.meta["path"])
        seen += each.all_input_nodes
    return FREE


def _constant(graph: Graph, weights: Collection[str]) -> set[Node]:
    """The nodes whose values the weights fix."""
    fixed: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if argument_of(node.meta["path"]) in weights:
                fixed.add(node)
        elif node.op == "call_function" and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
    return fixed


def _looks_at_a_leaf(node: Node) -> bool:
    """Whether a node is a view, or a view of a view, of a leaf itself."""
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _prepare(graph: Graph, constant: set[Node], wanted: list[Node]) -> Graph:
    copy = Graph()
    known: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or node in constant:
            known[node] = copy.node_copy(node, lambda n: known[n])
    copy.output(tuple(known[node] for node in wanted))
    copy.eliminate_dead_code()
    return copy

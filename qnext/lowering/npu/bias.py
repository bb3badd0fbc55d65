"""A vector added to columns of a projection becomes the projection's bias: a launch less.

The product is rounded once, after the sum, where it was rounded before and after: never less exact.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from qnext.lowering.graph import insert, is_view, site_name, value


class Columns(NamedTuple):
    """The columns of a product's rows that a view of it shows: begin <= column < end."""

    begin: int
    end: int


def ride(graph: Graph) -> None:
    """Move each sum of a projection's columns and a vector of weights into the projection."""
    for node in list(graph.nodes):
        if node.op == "call_function" and site_name(node) == "add" and not node.kwargs:
            part, vector = node.args
            if isinstance(part, Node) and isinstance(vector, Node):
                _ride(graph, node, part, vector)


def _ride(graph: Graph, total: Node, part: Node, vector: Node) -> None:
    product = _product(part)
    if product is None or value(vector).ndim != 1 or not _from_weights(vector):
        return
    columns = _columns(part, product)
    fits = value(vector).shape[0] == value(part).shape[-1] == columns.end - columns.begin
    same = value(vector).dtype == value(part).dtype == value(total).dtype
    others = (
        user for user, seen in _readers(product) if user is not total and _meet(seen, columns)
    )
    if not fits or not same or any(True for _ in others):
        return
    with graph.inserting_before(product):
        beside = [columns.begin, value(product).shape[-1] - columns.end]
        bias = insert(graph, torch.ops.aten.constant_pad_nd.default, _again(graph, vector), beside)
    product.args = (*product.args, bias)
    total.replace_all_uses_with(part)
    graph.erase_node(total)


def _product(part: Node) -> Node | None:
    """The projection without bias whose result a node shows columns of."""
    while is_view(part) and part.op == "call_function" and part.all_input_nodes:
        part = part.all_input_nodes[0]
    return part if site_name(part) == "linear" and len(part.args) == 2 else None


def _from_weights(node: Node) -> bool:
    """Whether a node is a leaf, or made of leaves by casts and views alone."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _columns(view: Node, product: Node) -> Columns:
    width, seen = value(product).shape[-1], value(view)
    begin = seen.storage_offset() % width
    inside = zip(seen.shape, seen.stride(), strict=True)
    return Columns(begin, begin + 1 + sum((n - 1) * step for n, step in inside if step < width))


def _meet(a: Columns, b: Columns) -> bool:
    return a.begin < b.end and b.begin < a.end


def _readers(product: Node) -> Iterator[tuple[Node, Columns]]:
    """Who reads a product, through views, and which columns of it."""
    open_ends = [product]
    while open_ends:
        view = open_ends.pop()
        for user in view.users:
            if user.op == "call_function" and is_view(user):
                open_ends.append(user)
            else:
                yield user, _columns(view, product)


def _again(graph: Graph, node: Node) -> Node:
    """A copy of a chain that begins at a leaf, where the graph inserts now."""
    if node.op == "placeholder":
        return node
    before = _again(graph, node.all_input_nodes[0])
    return graph.node_copy(node, lambda _: before)

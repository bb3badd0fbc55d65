"""Operations of torch that torch_npu carries out in several launches, said so that it takes one.

A choice between a tensor and a number fills a tensor with the number first: here that tensor is a
constant. Taking along an axis wraps negative indices first: the model has none.
"""

from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from qnext.lowering.graph import insert, value

aten = torch.ops.aten


def say_plainly(graph: Graph) -> None:
    """Change such nodes in place; their verdicts stay true."""
    for node in list(graph.nodes):
        if node.op == "call_function" and (change := CHANGES.get(node.target)):
            with graph.inserting_before(node):
                change(graph, node)


def _number(graph: Graph, node: Node, at: int) -> None:
    like = value(node)
    options = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
    args = list(node.args)
    args[at] = insert(graph, aten.full.default, [], args[at], **options)
    node.target, node.args = aten.where.self, tuple(args)


def _taken(graph: Graph, node: Node) -> None:
    x, index, dim = (*node.args, *node.kwargs.values())
    assert isinstance(x, Node) and isinstance(index, Node) and isinstance(dim, int)
    shape = list(value(x).shape)
    shape[dim] = value(index).shape[dim]
    spread = insert(graph, aten.expand.default, index, shape)
    node.target, node.args, node.kwargs = aten.gather.default, (x, dim, spread), {}


CHANGES: dict[object, Callable[[Graph, Node], None]] = {
    aten.where.ScalarOther: lambda graph, node: _number(graph, node, 2),
    aten.where.ScalarSelf: lambda graph, node: _number(graph, node, 1),
    aten.take_along_dim.default: _taken,
}

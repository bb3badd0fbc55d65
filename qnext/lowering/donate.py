"""Donation: which functional writes of a graph may overwrite their argument.

A call that writes says so in its record (`writes`); in the graph it is a function all the same: it
takes a pool and returns the pool after the write. Here it is decided whether it may do that in
place: the pool is a donated leaf, or memory made in the step itself, and nothing reads the old
value afterwards. Else the pool is copied before, and the text says so.
"""

from collections.abc import Callable, Collection, Mapping
from operator import getitem
from typing import NamedTuple

from torch.fx import Graph, Node

from qnext.lowering.graph import argument_of, is_view, value

IN_PLACE = "in place"


class Write(NamedTuple):
    """One functional write: what becomes of it and why."""

    node: Node
    argument: str
    verdict: str  # IN_PLACE, or "copied"
    reason: str


def settle(
    graph: Graph,
    donated: Collection[str],
    writes_of: Callable[[Node], Collection[str]],
    copy: Callable[[Graph, Node], Node],
) -> list[Write]:
    """Decide every write of a graph; where it may not be in place, put `copy(graph, pool)` before.

    `donated` names arguments, `writes_of` the arguments that a node writes.
    """
    order = {node: at for at, node in enumerate(graph.nodes)}
    decided = []
    for node in list(graph.nodes):
        for argument in writes_of(node):
            pool = node.kwargs[argument]
            reason = _obstacle(node, pool, order, donated)
            if reason is None:
                decided.append(Write(node, argument, IN_PLACE, "donated, last use"))
                continue
            with graph.inserting_before(node):
                fresh = copy(graph, pool)
            node.kwargs = {**node.kwargs, argument: fresh}
            decided.append(Write(node, argument, "copied", reason))
    return decided


def carry(
    graph: Graph,
    successors: Mapping[int, int],
    donated: Collection[str],
    writes_of: Callable[[Node], Collection[str]],
    write_back: Callable[[Graph, Node, Node], Node],
) -> None:
    """Put the next values of donated leaves into their memory, at the end of the step.

    So a state stays where it is from step to step, and a captured graph finds it there. Pools are
    there already, as calls write them in place; what this moves are lengths and indices.
    `successors` maps places among the results to places among the inputs.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    results = list(output.args[0])
    for place, source in successors.items():
        leaf, result = inputs[source], results[place]
        maker = _owner(result)
        maker = maker.all_input_nodes[0] if _is_result(maker) else maker
        if maker.op == "placeholder" or writes_of(maker):
            continue
        with graph.inserting_before(output):
            moved = write_back(graph, leaf, result)
        order = {node: at for at, node in enumerate(graph.nodes)}
        if _obstacle(moved, leaf, order, donated) is None:
            results[place] = moved
            output.args = (results,)
        else:
            graph.erase_node(moved)


def _obstacle(
    node: Node, pool: Node, order: dict[Node, int], donated: Collection[str]
) -> str | None:
    """Why `node` may not overwrite `pool`, or None."""
    source = _owner(pool)
    if source.op == "placeholder":
        path = source.meta["path"]
        if argument_of(path) not in donated:
            return f"{path} is not donated"
    for reader in _readers(source):
        if reader is not node and order.get(reader, -1) > order[node]:
            return f"{reader.name} reads the old value later"
    if [*node.all_input_nodes].count(pool) > 1:
        return f"{node.name} reads it as another argument"
    return None


def _owner(node: Node) -> Node:
    """Whose memory a node looks at."""
    while is_view(node) and node.all_input_nodes and not _is_result(node):
        node = node.all_input_nodes[0]
    return node


def _is_result(node: Node) -> bool:
    """Whether a node is one of several results of its parent: memory of its own."""
    return (
        node.op == "call_function"
        and node.target is getitem
        and isinstance(value(node.all_input_nodes[0]), tuple | list)
    )


def _readers(source: Node) -> list[Node]:
    """The users of a node's memory, through views."""
    found: list[Node] = []
    open_ends = [source]
    while open_ends:
        for user in open_ends.pop().users:
            (open_ends if is_view(user) and user.op != "output" else found).append(user)
    return found

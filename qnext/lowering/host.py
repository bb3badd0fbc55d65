"""Host arguments: what a call takes from the host alone, as typed arguments of a compiled step.

A fused attention takes its lengths as a list. Whoever runs a step knows them, so they are arguments
of the compiled step beside those of the function: no length is read back from the device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from qnext.errors import LoweringError
from qnext.lowering.calls import call_of

HOST = "host"  # what host arguments are called among the step's inputs, and at its call


class HostArgument(NamedTuple):
    """A list of integers, one a row, each in 0..most: the values of a tensor of the step."""

    name: str
    rows: int
    most: int


def take_host_arguments(graph: Graph) -> tuple[HostArgument, ...]:
    """Make the host lists of a graph's calls inputs of the graph, after all others.

    Calls whose lists stand for the values of the same tensor share one argument, which is named as
    the call names that tensor. The lists that lowering put there are the greatest allowed.
    """
    taken: dict[Node, Node] = {}
    found: list[HostArgument] = []
    for node in list(graph.nodes):
        called = call_of(node)
        if called is None or called.host is None:
            continue
        listed, tensor, _ = called.host
        source = node.kwargs[tensor]
        if source not in taken:
            most = list(node.kwargs[listed])
            name = tensor if not found else f"{tensor}_{len(found) + 1}"
            found.append(HostArgument(name, len(most), max(most)))
            taken[source] = _input(graph, name, most)
        node.kwargs = {**node.kwargs, listed: taken[source]}
    return tuple(found)


def _input(graph: Graph, name: str, most: list[int]) -> Node:
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        added = graph.placeholder(f"{HOST}_{name}")
    added.meta = {"val": most, "path": f"{HOST}.{name}"}
    return added


def updates(graph: Graph) -> list[tuple[str, str]]:
    """For each call with a host list, in order: our name for the list, and the package's."""
    order = []
    for node in graph.nodes:
        called = call_of(node)
        if called is not None and called.host is not None:
            source = node.kwargs[called.host[0]]
            assert isinstance(source, Node)
            order.append((source.meta["path"].partition(".")[2], called.host[2]))
    return order


def checked(wanted: Sequence[HostArgument], given: Any, function: str) -> list[list[int]]:
    """The lists for a call, in order; LoweringError names what is absent or out of range."""
    if given is None and not wanted:
        return []
    given = {} if given is None else given
    if not isinstance(given, Mapping) or given.keys() != {argument.name for argument in wanted}:
        names = ", ".join(f"{a.name!r}: [{a.rows} integers]" for a in wanted)
        need = f"call it with host={{{names}}}" if wanted else "it takes none"
        told = sorted(given) if isinstance(given, Mapping) else repr(given)
        raise LoweringError(f"{function} was given host arguments {told}: {need}")
    return [_checked(argument, given[argument.name]) for argument in wanted]


def _checked(argument: HostArgument, values: Any) -> list[int]:
    good = isinstance(values, list | tuple) and len(values) == argument.rows
    if not good or not all(type(v) is int and 0 <= v <= argument.most for v in values):
        raise LoweringError(
            f"host[{argument.name!r}] must be {argument.rows} integers in 0..{argument.most}, "
            f"got {values!r}"
        )
    return list(values)

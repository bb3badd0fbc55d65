"""A compiled graph as a list of calls: what a step for the cpu runs, and what is kept on disk.

A graph that can be rewritten knows names, users and code made of it; to make these anew takes
several times as long as to read the calls.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Value:
    """Among arguments, what stands for an input or a call's result; inputs are numbered first."""

    at: int


class Call(NamedTuple):
    """A function, or a program, on values and constants."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    last: tuple[int, ...]  # values that nothing asks for after it: their memory is given back


class Plan(NamedTuple):
    """Calls in order, from so many inputs to the results."""

    inputs: int
    calls: tuple[Call, ...]
    results: Any

    def __call__(self, *given: Any) -> Any:
        assert len(given) == self.inputs
        values: list[Any] = list(given)

        def known(part: Any) -> Any:
            return values[part.at] if type(part) is Value else part

        for target, args, kwargs, last in self.calls:
            values.append(target(*_mapped(known, args), **_mapped(known, kwargs)))
            for at in last:
                values[at] = None
        return _mapped(known, self.results)

    @property
    def inputs_used(self) -> list[int]:
        """Which inputs are asked for."""
        asked = _values([self.results, *((call.args, call.kwargs) for call in self.calls)])
        return sorted(at for at in asked if at < self.inputs)


def planned(module: GraphModule) -> Plan:
    """The plan of a graph. Tensors of the graph's own are constants of its calls."""
    *nodes, output = module.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    calls = [node for node in nodes if node.op in ("call_function", "call_module")]
    place = {node: Value(at) for at, node in enumerate([*inputs, *calls])}

    def known(part: Any) -> Any:
        if not isinstance(part, Node):
            return part
        return attrgetter(str(part.target))(module) if part.op == "get_attr" else place[part]

    results = _mapped(known, output.args[0])
    later, made = _values(results), []
    for node in reversed(calls):
        inside = node.op == "call_module"
        target: Any = module.get_submodule(str(node.target)) if inside else node.target
        args, kwargs = _mapped(known, node.args), _mapped(known, node.kwargs)
        here = {place[node].at} | _values((args, kwargs))
        made.append(Call(target, args, kwargs, tuple(sorted(here - later))))
        later |= here
    return Plan(len(inputs), tuple(reversed(made)), results)


def _mapped(known: Callable[[Any], Any], part: Any) -> Any:
    """Arguments with others in their places."""
    if isinstance(part, tuple):
        return tuple([_mapped(known, each) for each in part])
    if isinstance(part, list):
        return [_mapped(known, each) for each in part]
    if isinstance(part, dict):
        return {key: _mapped(known, each) for key, each in part.items()}
    if isinstance(part, slice):
        return slice(*_mapped(known, (part.start, part.stop, part.step)))
    return known(part)


def _values(part: Any) -> set[int]:
    """The values that arguments ask for."""
    found: set[int] = set()

    def note(each: Any) -> None:
        if isinstance(each, Value):
            found.add(each.at)

    _mapped(note, part)
    return found

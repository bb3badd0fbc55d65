"""Steps that are one program, called again and again, each where the one before it ended.

A step of a large model reads far more than the caches hold, so what Python touches between two of
them comes from memory anew: 30 us of work take 200. Hence little is touched: of a call that goes on
with what the last one returned, weights are the same tree, and neither their places nor the shapes
of what was returned are looked at again.
"""

from collections.abc import Collection, Sequence
from operator import getitem, is_
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor

from qnext.functional.tree import is_any_given_up
from qnext.lowering.cpu.plan import Plan
from qnext.lowering.cpu.step import Step, Weights
from qnext.lowering.trace import successors, tensors_of


class Last(NamedTuple):
    """A call, for one that goes on from it."""

    trees: dict[str, Any]  # its weights
    weights: Weights  # what the program took of them
    results: dict[str, list[ref[Tensor]]]  # by argument: leaves that are its next value

    def returned(self, name: str, leaves: list[Any]) -> bool:
        """Whether an argument is what this call returned."""
        known = self.results.get(name, [])
        return len(known) == len(leaves) and all(map(is_, [each() for each in known], leaves))


class _Places(NamedTuple):
    """Tensors among those that a call is given; of results, those, or ~i of the program's own."""

    moving: list[int]
    results: list[int]

    def without(self, left_out: Collection[int]) -> "_Places":
        """The same where some of those tensors are not given. They must not be asked for."""

        def place(at: int) -> int:
            return at - sum(0 <= other < at for other in left_out)

        return _Places([*map(place, self.moving)], [*map(place, self.results)])


class Chain:
    """A step that is one program, and what its last call left."""

    def __init__(
        self,
        step: Step,
        fixed: list[int],
        places: _Places,
        weights: dict[str, range],
        after: dict[str, list[int]],
    ) -> None:
        """`weights` tells where those arguments' tensors are among all that are given, `after`
        which results are the next value of which argument."""
        self._step, self._fixed, self._places = step, fixed, places
        self._weights, self._after = weights, after
        self._rest = places.without({at for span in weights.values() for at in span})
        self.last: Last | None = None

    def call(self, given: Sequence[Tensor], trees: dict[str, Any]) -> list[Tensor]:
        """The results, as objects of their own; `trees` are the weights that another call knows."""
        weights = self._step.bind([given[i] for i in self._fixed])
        return self._run(weights, given, self._places, trees)

    def go_on(self, leaves: dict[str, list[Any]], last: Last) -> list[Tensor] | None:
        """The same of a call that goes on from the last; None where a leaf was given up."""
        if any(map(is_any_given_up, leaves.values())):
            return None
        others = (part for name, part in leaves.items() if name not in self._weights)
        given = [leaf for part in others for leaf in part if isinstance(leaf, Tensor)]
        return self._run(last.weights, given, self._rest, last.trees)

    def _run(
        self, weights: Weights, given: Sequence[Tensor], places: _Places, trees: dict[str, Any]
    ) -> list[Tensor]:
        made = self._step.run(weights, [given[i] for i in places.moving])
        results = [(given[at] if at >= 0 else made[~at]).detach() for at in places.results]
        self.last = None
        if self._after and trees.keys() == self._weights.keys():
            known = {name: [ref(results[i]) for i in at] for name, at in self._after.items()}
            self.last = Last(trees, weights, known)
        return results


def chain_of(
    plan: Plan,
    arguments: dict[str, Any],
    result: Any,
    donate: Collection[str],
    weights: Collection[str],
) -> Chain | None:
    """A plan as one program, if it is one and nothing else."""
    calls = dict(enumerate(plan.calls, start=plan.inputs))
    others = {at: call for at, call in calls.items() if call.target is not getitem}
    if len(others) != 1:
        return None
    ((place, step),) = others.items()
    items = {at: call.args for at, call in calls.items() if call is not step}
    if not isinstance(step.target, Step) or any(of.at != place for of, _ in items.values()):
        return None
    given = [value.at for value in step.args]
    results = [~items[v.at][1] if v.at in items else v.at for v in plan.results]
    places = _Places([given[i] for i in step.target.moving], results)
    spans = _spans(arguments)
    known = {name: spans[name] for name in weights if name in spans}
    asked = {*places.moving, *results}
    after = _after(arguments, result, donate, spans)
    if any(at in asked for span in known.values() for at in span):
        after = {}  # a weight is a result: no call goes on without a look at it
    return Chain(step.target, [given[i] for i in step.target.fixed], places, known, after)


def _spans(arguments: dict[str, Any]) -> dict[str, range]:
    """Where the tensors of each argument are among those of all."""
    spans, begin = {}, 0
    for name, tree in arguments.items():
        count = len(tensors_of(tree))
        spans[name] = range(begin, begin + count)
        begin += count
    return spans


def _after(
    arguments: dict[str, Any], result: Any, donate: Collection[str], spans: dict[str, range]
) -> dict[str, list[int]]:
    """Which results are the next value of each donated argument; none if one has no such."""
    place = {at: i for i, at in successors(arguments, result, donate).items()}
    found = {n: [place[at] for at in spans[n] if at in place] for n in donate if n in spans}
    return found if all(len(at) == len(spans[name]) for name, at in found.items()) else {}

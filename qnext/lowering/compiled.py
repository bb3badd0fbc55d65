"""A compiled step: a callable for exactly the trees, shapes and dtypes it was made for."""

import operator
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from qnext.errors import LoweringError, donated
from qnext.functional.tree import (
    Template,
    give_up,
    given_up_to,
    is_any_given_up,
    is_frozen,
    leaves,
    same_structure,
)
from qnext.lowering.cpu.plan import Plan
from qnext.lowering.host import HostArgument, checked
from qnext.lowering.target import Target
from qnext.lowering.trace import Trace, bind, named_leaves

if TYPE_CHECKING:
    from qnext.lowering.cpu.chain import Chain, Last
    from qnext.lowering.npu.capture import Captured
    from qnext.lowering.stages import Lowered

SHOWN = 8  # differences an error lists
Runnable: TypeAlias = GraphModule | Plan  # a plan for the cpu
Host = Any  # None or {name: integers}; checked by `host.checked`, whose errors say more


class Left(NamedTuple):
    """A primitive that no rule of the target took."""

    site: str
    why: str


class Made(NamedTuple):
    """What a compiled step was made of and for; trees have specs as leaves."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    result: Any
    donate: tuple[str, ...]
    weights: tuple[str, ...]
    target: Target
    host: tuple[HostArgument, ...]  # what the step takes from the host beside its arguments
    left: tuple[Left, ...]

    @property
    def name(self) -> str:
        return self.function.__name__


class Parts(NamedTuple):
    """All that running a compiled step takes."""

    made: Made
    graph: Runnable
    prepare: Runnable | None  # from the arguments to the constants that the graph takes


class Fit(NamedTuple):
    """Arguments that a step was compiled for."""

    leaves: dict[str, list[Any]]  # by argument
    last: "Last | None"  # the call that they go on from, if they do


class Compiled:
    """A function bound to a target. Calls are checked by path; donated leaves are used up.

    Call it as the function itself. Where lowering made host arguments (`lowered.host`), give their
    values as `host={"context": [17, 4, 230]}`.
    """

    def __init__(self, parts: Parts, lower: Callable[[], "Lowered"]) -> None:
        self.parts, self._lower = parts, lower
        self.made, self._run, self._prepare = made, graph, prepare = parts
        self._chain = _chain(graph, made) if isinstance(graph, Plan) else None
        self._weights = _inputs_used(prepare) if prepare else []
        fits = self._fits
        self._trees = {name: Template(tree, fits) for name, tree in made.arguments.items()}
        self._result = Template(made.result, fits)
        self._seen: dict[str, tuple[Any, list[Any]]] = {}  # weights that fit, and their leaves
        # the arguments of the call under way, and their leaves: a call asks for them three times
        self._current: tuple[dict[str, Any], Fit] | None = None
        # the weights that constants were made of, and the constants
        self._packed: tuple[list[Tensor], tuple[Tensor, ...]] = [], ()

    @cached_property
    def lowered(self) -> "Lowered":
        """What it was compiled from, to be read. A step that was stored is lowered anew for it."""
        return self._lower()

    @property
    def graph(self) -> GraphModule:
        """What runs; not of a step for the cpu, which has a plan instead (`parts.graph`)."""
        assert isinstance(self.parts.graph, GraphModule), "a plan is no graph"
        return self.parts.graph

    @property
    def trace(self) -> Trace:
        return self.lowered.trace

    def __call__(self, *args: Any, host: Host = None, **kwargs: Any) -> Any:
        arguments = bind(self.made.function, args, kwargs)
        self.check(arguments)
        return self.call(arguments, host)

    def capture(self, *args: Any, pool: Any = None, **kwargs: Any) -> "Captured":
        """The step as one graph of the device, on these arguments' memory; nothing is computed.

        Weights, and pools that the step writes, must stay where they are; other arguments may come
        from anywhere and are copied. Row 0 of every pool must be scratch: warming up writes there.
        `pool` (of another `Captured`) shares the memory of what lives only within a step. Raises
        LoweringError for a target without graphs, and for a site that reads values on the host.
        """
        if self.made.target.kind != "npu":
            raise LoweringError(
                f"target {self.made.target.name!r} has no graphs to capture: lower for an npu "
                "target, or call the compiled step as it is"
            )
        from qnext.lowering.npu.capture import Captured

        arguments = bind(self.made.function, args, kwargs)
        self.check(arguments)
        return Captured(self, arguments, pool)

    def check(self, arguments: dict[str, Any]) -> None:
        """Raise LoweringError unless arguments are of the trees, shapes and dtypes of the trace."""
        if wrong := self.differences(arguments):
            more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise LoweringError(
                f"{self.made.name} was compiled for other arguments:\n  "
                + "\n  ".join(wrong[:SHOWN])
                + f"{more}\ntrace, lower and compile it for these, or call jit({self.made.name})"
            )

    def differences(self, arguments: dict[str, Any]) -> list[str]:
        """What keeps arguments from being those it was compiled for, a line each."""
        if self._fitting(arguments) is not None:
            return []
        wanted, given = dict(named_leaves(self.made.arguments)), dict(named_leaves(arguments))
        wrong = [f"{path} is missing" for path in wanted if path not in given]
        wrong += [f"{path} is unexpected" for path in given if path not in wanted]
        for path, want in wanted.items():
            got = given.get(path, want)
            if not isinstance(want, Tensor) or not isinstance(got, Tensor):
                if type(got) is not type(want) or got != want:
                    wrong.append(f"{path} must be {_text(want)}, got {_text(got)}")
            elif (got.shape, got.dtype) != (want.shape, want.dtype):
                wrong.append(f"{path} must be {_text(want)}, got {_text(got)}")
        if not wrong and not same_structure(arguments, self.made.arguments):
            wrong.append("a constant of the trees differs, such as params.config")
        return wrong or self._elsewhere(given)

    def _fitting(self, arguments: dict[str, Any]) -> "Fit | None":
        """The leaves of arguments by name; None if they are not what it was compiled for."""
        current = self._current
        if current and current[0] is arguments:
            return current[1]
        if arguments.keys() != self._trees.keys():
            return None
        found: dict[str, list[Any]] = {}
        last = self._chain.last if self._chain else None
        for name, tree in arguments.items():
            seen = self._seen.get(name)
            if seen and seen[0] is tree:
                found[name] = seen[1]
                last = last if last and last.trees.get(name) is tree else None
                continue
            mine = self._trees[name].take(tree)
            if mine is None:
                return None
            found[name] = mine
            if last and last.returned(name, mine):
                continue
            if not self._trees[name].fits(mine):
                return None
            if name in self.made.weights and is_frozen(tree):
                self._seen[name] = tree, mine
            if name in self.made.weights or name in self.made.donate:
                last = None
        fit = Fit(found, last)
        self._current = arguments, fit
        return fit

    def _fits(self, want: Any) -> Callable[[Any], bool]:
        """What an argument in the place of a traced one must be."""
        if not isinstance(want, Tensor):
            return lambda got: type(got) is type(want) and bool(got == want)
        shape, dtype, kind = want.shape, want.dtype, self.made.target.kind

        def check(got: Any) -> bool:
            if not isinstance(got, Tensor) or got.shape != shape or got.dtype != dtype:
                return False
            if kind == "cpu":
                return got.is_cpu
            return kind == "reference" or got.device.type == kind

        return check

    def _elsewhere(self, given: dict[str, Any]) -> list[str]:
        """Tensors that are not on the target's device."""
        kind = self.made.target.kind
        if kind == "reference":
            return []
        return [
            f"{path} must be on {kind!r}, got {leaf.device.type!r}: qn.place(tree, {kind!r})"
            for path, leaf in given.items()
            if isinstance(leaf, Tensor) and leaf.device.type != kind
        ]

    def call(self, arguments: dict[str, Any], host: Host = None) -> Any:
        """Run on arguments that fit."""
        lists = checked(self.made.host, host, self.made.name)
        if self._chain:
            return self._call_chained(self._chain, arguments)
        given = self.take(arguments)
        with torch.no_grad():
            results = self._run(*given, *self.packed(given), *lists)
        passed = {id(leaf) for leaf in given}
        # results are objects of their own, for a donated object stays marked as such
        return self.give(arguments, [r.detach() if id(r) in passed else r for r in results])

    def _call_chained(self, chain: "Chain", arguments: dict[str, Any]) -> Any:
        """The same of a graph that is one program."""
        fit = self._fitting(arguments)
        results = chain.go_on(fit.leaves, fit.last) if fit and fit.last else None
        if results is None:
            given = self.take(arguments)
            trees = {n: arguments[n] for n in self.made.weights if is_frozen(arguments.get(n, []))}
            results = chain.call([*given, *self.packed(given)], trees)
        return self.give(arguments, results)

    def take(self, arguments: dict[str, Any]) -> list[Tensor]:
        """The tensors of arguments, in the graph's order; DonatedError if one was given away."""
        fit = self._fitting(arguments)
        found = chain(*fit.leaves.values()) if fit else leaves(arguments)
        given = [leaf for leaf in found if isinstance(leaf, Tensor)]
        if is_any_given_up(given):
            path, leaf = next(pair for pair in named_leaves(arguments) if given_up_to(pair[1]))
            raise donated(path, given_up_to(leaf))
        return given

    def give(self, arguments: dict[str, Any], results: list[Tensor]) -> Any:
        """The result's tree; the donated arguments are given up with it."""
        fit, self._current = self._fitting(arguments), None
        known = fit.leaves if fit else {}
        for name in self.made.donate:
            for leaf in known.get(name) or leaves(arguments[name]):
                give_up(leaf, self.made.name)
        return self._result.rebuild(results)

    def packed(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The constants of these weights, computed when other weights come."""
        if self._prepare is None:
            return ()
        weights, (bound, constants) = [given[i] for i in self._weights], self._packed
        same = len(weights) == len(bound) and all(map(operator.is_, weights, bound))
        if not same or (not weights and not constants):
            constants = tuple(self._prepare(*given))
            self._packed = weights, constants
        return constants


def _chain(graph: Plan, made: Made) -> "Chain | None":
    from qnext.lowering.cpu.chain import chain_of

    return chain_of(graph, made.arguments, made.result, made.donate, made.weights)


def _inputs_used(graph: Runnable) -> list[int]:
    """Which inputs a graph reads."""
    if isinstance(graph, Plan):
        return graph.inputs_used
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return [i for i, node in enumerate(inputs) if node.users]


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)

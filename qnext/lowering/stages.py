"""The stages of a function: jit -> trace -> lower -> compile -> call.

    step = jit(decode, donate="state")
    lowered = step.trace(*specs(config, batch=8, capacity=4096)).lower(target="npu:910b")
    compiled = lowered.compile()
    logits, state = compiled(params, state, tokens)

A trace and a lowered step need neither weights nor a device.
"""

import inspect
import warnings
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qnext.errors import LoweringError, TargetError
from qnext.lowering import text
from qnext.lowering.calls import CALLS, call_of
from qnext.lowering.compiled import Compiled, Left, Made, Parts, Runnable
from qnext.lowering.constants import take_out
from qnext.lowering.cost import analyse
from qnext.lowering.donate import Write, carry, settle
from qnext.lowering.graph import insert, on_device, primitive_of, propagate, verify
from qnext.lowering.host import HOST, HostArgument, take_host_arguments
from qnext.lowering.memory import memory
from qnext.lowering.rules import Rule, Verdict, rewrite
from qnext.lowering.simplify import find_static, fold, merge_equal
from qnext.lowering.target import Target, resolve
from qnext.lowering.trace import Trace, bind, successors, trace


def jit(
    function: Callable[..., Any],
    donate: str | Collection[str] = (),
    weights: str | Collection[str] = "params",
    target: str | Target = "reference",
) -> "Wrapped":
    """A function of trees, to be traced and compiled.

    `donate` names parameters whose tensors the function may overwrite: their memory becomes that
    of the results, and the trees passed in must not be used again. `weights` names parameters that
    stay the same over many calls: what depends on them alone is computed once. Where a call for the
    cpu goes on with the donated trees that the last one returned and the same weights, these are
    not looked at again: `weight.data = other` is seen by the next call with another state. Calling
    the result compiles for `target` on first use and again for other shapes. Raises LoweringError.
    """
    return Wrapped(function, _names(donate), _names(weights), target)


def _names(names: str | Collection[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


class Wrapped:
    """A function that can be traced, or called."""

    def __init__(
        self,
        function: Callable[..., Any],
        donate: tuple[str, ...],
        weights: tuple[str, ...],
        target: str | Target,
    ) -> None:
        if HOST in inspect.signature(function).parameters:
            raise LoweringError(
                f"{function.__name__} has an argument {HOST!r}, which is what compiled steps call "
                "their host arguments: name it otherwise"
            )
        self.function, self.donate, self.weights, self.target = function, donate, weights, target
        self._compiled: list[Compiled] = []

    def trace(self, *args: Any, **kwargs: Any) -> "Traced":
        """The function's graph on arguments or their specs; nothing is computed."""
        arguments = bind(self.function, args, kwargs)
        if unknown := [name for name in self.donate if name not in arguments]:
            raise LoweringError(
                f"donate={unknown[0]!r} is no argument of this call of {self.function.__name__}; "
                f"its arguments are {', '.join(arguments)}"
            )
        return Traced(trace(self.function, arguments), self.donate, self.weights)

    def compile(
        self,
        *args: Any,
        target: str | Target | None = None,
        strict: bool = False,
        host_lengths: bool = False,
        **kwargs: Any,
    ) -> Compiled:
        """`trace`, `lower` and `compile` in one, for arguments or their specs.

        `target` is the function's own unless another is named. What target "cpu" made of a
        function of this package lies in the user's cache directory, and the next process reads it
        from there.
        """
        target = self.target if target is None else target
        target = resolve(target) if isinstance(target, str) else target
        target = replace(target, host_lengths=True) if host_lengths else target

        if target.kind != "cpu":
            return self.trace(*args, **kwargs).lower(target, strict).compile()
        from qnext.lowering.cpu import store

        arguments = bind(self.function, args, kwargs)
        file = store.place(self.function, arguments, self.donate, self.weights, target)
        parts = store.read(file, self.function, target) if file else None
        if parts and not (strict and parts.made.left):
            made = parts.made
            return Compiled(parts, lambda: self.trace(**made.arguments).lower(target, strict))
        compiled = self.trace(*args, **kwargs).lower(target, strict).compile()
        if file and compiled.made.target == target:
            store.write(file, compiled.parts)
        return compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = bind(self.function, args, kwargs)
        for compiled in self._compiled:
            if not compiled.differences(arguments):
                return compiled.call(arguments)
        fresh = self.compile(*args, **kwargs)
        self._compiled.append(fresh)
        return fresh.call(arguments)


@dataclass(frozen=True, eq=False)
class Traced:
    """A function on given shapes, as a graph of primitives."""

    trace: Trace
    donate: tuple[str, ...]
    weights: tuple[str, ...]

    def lower(
        self,
        target: str | Target = "reference",
        strict: bool = False,
        require: Collection[str] = (),
        host_lengths: bool = False,
    ) -> "Lowered":
        """Rewrite by the target's rules. Nothing falls back in silence: `report()` tells all.

        `strict` makes any primitive left on its reference an error, `require` those it names. With
        `host_lengths` attention takes exact lengths as host arguments of the compiled step, where
        the target can; otherwise a bound from shapes and a mask made on the device.
        """
        target = resolve(target) if isinstance(target, str) else target
        target = replace(target, host_lengths=True) if host_lengths else target
        graph = deepcopy(self.trace.graph)
        find_static(graph.graph)
        if target.kind != "reference":
            fold(graph.graph)
            merge_equal(graph.graph)  # what reads one tensor then shares its int8 tokens
        rules, passes = rules_of(target)
        verdicts = rewrite(graph.graph, rules, target)
        _demand(_left(verdicts), strict, require)
        prepare: GraphModule | None = None
        writes: list[Write] = []
        host: tuple[HostArgument, ...] = ()
        if target.kind != "reference":
            merge_equal(graph.graph)
            propagate(graph.graph)
            for each in passes:
                each(graph.graph)
            merge_equal(graph.graph)
            prepare = take_out(graph, self.weights)
            host = take_host_arguments(graph.graph)
            following = successors(self.trace.arguments, self.trace.result, self.donate)
            carry(graph.graph, following, self.donate, _writes, _write_back)
            writes = settle(graph.graph, self.donate, _writes, _copy)
        verify(graph.graph)
        graph.recompile()
        parts = (graph, prepare, verdicts, writes, host, strict or bool(require))
        return Lowered(self.trace, self.donate, self.weights, target, *parts)


def _writes(node: Node) -> Collection[str]:
    call = call_of(node)
    return call.writes if call else ()


def _copy(graph: Graph, pool: Node) -> Node:
    return insert(graph, torch.ops.aten.clone.default, pool)


def _write_back(graph: Graph, leaf: Node, result: Node) -> Node:
    return insert(graph, CALLS["write_back"].op, into=leaf, values=result)


def rules_of(target: Target) -> tuple[tuple[Rule, ...], tuple[Callable[[Graph], None], ...]]:
    """The rules of a target in the order they are asked, and the passes that follow them."""
    if target.kind == "npu":
        from qnext.lowering.npu.table import PASSES, RULES

        return RULES, PASSES
    if target.kind == "cpu":
        from qnext.lowering.cpu import table

        return table.RULES, table.PASSES
    return (), ()


def _left(verdicts: dict[Node, Verdict]) -> tuple[Left, ...]:
    return tuple(
        Left(verdict.site, "; ".join(verdict.reasons))
        for node, verdict in verdicts.items()
        if verdict.rule is None and primitive_of(node)
    )


def _demand(left: Collection[Left], strict: bool, require: Collection[str]) -> None:
    against = dict(each for each in left if strict or each.site in require)
    if against:
        reasons = "\n  ".join(f"{site}: {why}" for site, why in sorted(against.items()))
        raise LoweringError(f"left on the reference, against strict or require:\n  {reasons}")


@dataclass(frozen=True, eq=False)
class Lowered:
    """A function in the calls of a target."""

    trace: Trace
    donate: tuple[str, ...]
    weights: tuple[str, ...]
    target: Target
    graph: GraphModule
    prepare: GraphModule | None  # from the arguments to the constants that the graph takes
    verdicts: dict[Node, Verdict]
    writes: list[Write]
    host: tuple[HostArgument, ...]  # what the step takes from the host beside its arguments
    strict: bool  # some primitive was demanded to be lowered

    @property
    def left(self) -> tuple[Left, ...]:
        """The primitives left on the reference."""
        return _left(self.verdicts)

    def as_text(self) -> str:
        """One line a site: what it is, what it became, or why no rule took it."""
        return text.as_text(self.graph.graph, self.verdicts, self.writes)

    def as_html(self) -> str:
        """A page for a browser that stands alone: sites, verdicts, bytes, roofline bars."""
        from qnext.lowering.page import as_html

        return as_html(self)

    def report(self) -> str:
        """How often each rule fired, and every site left on the reference with its reason."""
        return text.report(self.verdicts)

    def cost_analysis(self) -> dict[str, Any]:
        """`flops`, `bytes`, `launches`, `seconds_at_roofline`, `by_site`, `by_kind`, `by_part`."""
        return analyse(self.graph.graph, self.target.chip)

    def memory_analysis(self) -> dict[str, Any]:
        """Bytes of arguments by name, of results, of donated leaves, and the peak in between."""
        return memory(self.graph.graph, self.trace, self.donate)

    def compile(self) -> Compiled:
        """A callable for exactly these trees, shapes and dtypes.

        Raises TargetError where torch_npu, CANN or the target's chip is absent. Where the kernels
        of target "cpu" cannot be compiled, a warning says why and the step runs on the reference,
        as `compiled.lowered` tells; lowered with `strict` or `require`, that is a TargetError too.
        """
        if self.target.kind == "npu":
            from qnext.lowering.npu.probe import check_chip, require_torch_npu

            require_torch_npu()
            check_chip(self.target)
        if self.target.kind == "cpu":
            from qnext.lowering.cpu import library

            try:
                library.load(self.target.facts.isa)
            except TargetError as error:
                return self._on_reference(error)
        prepare = self.prepare if self.prepare is None else self._placed(self.prepare)
        made = Made(
            self.trace.function,
            self.trace.arguments,
            self.trace.result,
            self.donate,
            self.weights,
            self.target,
            self.host,
            self.left,
        )
        return Compiled(Parts(made, self._placed(self.graph), prepare), lambda: self)

    def _on_reference(self, error: TargetError) -> Compiled:
        if self.strict:
            raise error
        warnings.warn(f"{error}\nUntil then {self.trace.name} runs on the reference.", stacklevel=3)
        return Traced(self.trace, self.donate, self.weights).lower("reference").compile()

    def _placed(self, module: GraphModule) -> Runnable:
        """What runs the graph on the target's device; this one stays as it is."""
        if self.target.kind == "reference":
            return module
        module = deepcopy(module)
        on_device(module.graph, torch.device(self.target.kind))
        if self.target.kind == "cpu":
            from qnext.lowering.cpu.plan import planned
            from qnext.lowering.cpu.program import fuse

            fuse(module, self.weights, self.target.facts.isa)
            return planned(module)
        module.recompile()
        return module

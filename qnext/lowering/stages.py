"""The stages of a function: jit -> trace -> lower -> compile -> call.

    step = jit(decode, donate="state")
    lowered = step.trace(*specs(config, batch=8, capacity=4096)).lower(target="npu:910b")
    compiled = lowered.compile()
    logits, state = compiled(params, state, tokens)

A trace and a lowered step need neither weights nor a device.
"""

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from qnext.errors import LoweringError
from qnext.lowering import text
from qnext.lowering.compiled import Compiled
from qnext.lowering.cost import analyse
from qnext.lowering.graph import primitive_of, verify
from qnext.lowering.memory import memory
from qnext.lowering.rules import Rule, Verdict, rewrite
from qnext.lowering.target import Target, resolve
from qnext.lowering.trace import Trace, bind, trace


def jit(
    function: Callable[..., Any], donate: str | Collection[str] = (), target: str = "reference"
) -> "Wrapped":
    """A function of trees, to be traced and compiled.

    `donate` names parameters whose tensors the function may overwrite: their memory becomes that
    of the results, and the trees passed in must not be used again. Calling the result compiles for
    `target` on first use and again for other shapes. Raises LoweringError.
    """
    names = (donate,) if isinstance(donate, str) else tuple(donate)
    return Wrapped(function, names, target)


class Wrapped:
    """A function that can be traced, or called."""

    def __init__(self, function: Callable[..., Any], donate: tuple[str, ...], target: str) -> None:
        self.function, self.donate, self.target = function, donate, target
        self._compiled: list[Compiled] = []

    def trace(self, *args: Any, **kwargs: Any) -> "Traced":
        """The function's graph on arguments or their specs; nothing is computed."""
        arguments = bind(self.function, args, kwargs)
        if unknown := [name for name in self.donate if name not in arguments]:
            raise LoweringError(
                f"donate={unknown[0]!r} is no argument of this call of {self.function.__name__}; "
                f"its arguments are {', '.join(arguments)}"
            )
        return Traced(trace(self.function, arguments), self.donate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = bind(self.function, args, kwargs)
        for compiled in self._compiled:
            if not compiled.differences(arguments):
                return compiled.call(arguments)
        fresh = self.trace(*args, **kwargs).lower(self.target).compile()
        self._compiled.append(fresh)
        return fresh.call(arguments)


@dataclass(frozen=True, eq=False)
class Traced:
    """A function on given shapes, as a graph of primitives."""

    trace: Trace
    donate: tuple[str, ...]

    def lower(
        self,
        target: str | Target = "reference",
        strict: bool = False,
        require: Collection[str] = (),
    ) -> "Lowered":
        """Rewrite by the target's rules. Nothing falls back in silence: `report()` tells all.

        `strict` makes any primitive left on its reference an error, `require` those it names.
        """
        target = resolve(target) if isinstance(target, str) else target
        graph = deepcopy(self.trace.graph)
        verdicts = rewrite(graph.graph, rules_of(target), target)
        verify(graph.graph)
        graph.recompile()
        _demand(verdicts, strict, require)
        return Lowered(self.trace, self.donate, target, graph, verdicts)


def rules_of(target: Target) -> tuple[Rule, ...]:
    """The rules of a target, in the order they are asked."""
    return ()


def _demand(verdicts: dict[Node, Verdict], strict: bool, require: Collection[str]) -> None:
    left = {
        verdict.site: "; ".join(verdict.reasons)
        for node, verdict in verdicts.items()
        if verdict.rule is None and primitive_of(node) and (strict or verdict.site in require)
    }
    if left:
        reasons = "\n  ".join(f"{site}: {why}" for site, why in sorted(left.items()))
        raise LoweringError(f"left on the reference, against strict or require:\n  {reasons}")


@dataclass(frozen=True, eq=False)
class Lowered:
    """A function in the calls of a target."""

    trace: Trace
    donate: tuple[str, ...]
    target: Target
    graph: GraphModule
    verdicts: dict[Node, Verdict]

    def as_text(self) -> str:
        """One line a site: what it is, what it became, or why no rule took it."""
        return text.as_text(self.graph.graph, self.verdicts)

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
        """A callable for exactly these trees, shapes and dtypes."""
        return Compiled(self.trace, self.donate, self.graph)

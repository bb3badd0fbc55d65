"""A compiled step: a callable for exactly the trees, shapes and dtypes it was made for."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qnext.errors import LoweringError, donated
from qnext.functional.tree import give_up, given_up_to, leaves, rebuild, same_structure
from qnext.lowering.host import checked
from qnext.lowering.trace import bind, named_leaves

if TYPE_CHECKING:
    from qnext.lowering.npu.capture import Captured
    from qnext.lowering.stages import Lowered

SHOWN = 8  # differences an error lists
Host = Any  # None or {name: integers}; checked by `host.checked`, whose errors say more


class Compiled:
    """A function bound to a target. Calls are checked by path; donated leaves are used up.

    Call it as the function itself. Where lowering made host arguments (`lowered.host`), give their
    values as `host={"context": [17, 4, 230]}`.
    """

    def __init__(self, lowered: "Lowered", graph: GraphModule, prepare: GraphModule | None) -> None:
        self.lowered, self.trace, self.donate = lowered, lowered.trace, lowered.donate
        self.graph, self._prepare = graph, prepare
        self._weights = _inputs_used(prepare) if prepare else []
        self._bound: list[Tensor] = []  # the weights that constants were made of
        self._constants: tuple[Tensor, ...] = ()

    def __call__(self, *args: Any, host: Host = None, **kwargs: Any) -> Any:
        arguments = bind(self.trace.function, args, kwargs)
        self.check(arguments)
        return self.call(arguments, host)

    def capture(self, *args: Any, pool: Any = None, **kwargs: Any) -> "Captured":
        """The step as one graph of the device, on these arguments' memory; nothing is computed.

        Weights, and pools that the step writes, must stay where they are; other arguments may come
        from anywhere and are copied. Row 0 of every pool must be scratch: warming up writes there.
        `pool` (of another `Captured`) shares the memory of what lives only within a step. Raises
        LoweringError for a target without graphs, and for a site that reads values on the host.
        """
        if self.lowered.target.kind != "npu":
            raise LoweringError(
                f"target {self.lowered.target.name!r} has no graphs to capture: lower for an npu "
                "target, or call the compiled step as it is"
            )
        from qnext.lowering.npu.capture import Captured

        arguments = bind(self.trace.function, args, kwargs)
        self.check(arguments)
        return Captured(self, arguments, pool)

    def check(self, arguments: dict[str, Any]) -> None:
        """Raise LoweringError unless arguments are of the trees, shapes and dtypes of the trace."""
        if wrong := self.differences(arguments):
            more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise LoweringError(
                f"{self.trace.name} was compiled for other arguments:\n  "
                + "\n  ".join(wrong[:SHOWN])
                + f"{more}\ntrace, lower and compile it for these, or call jit({self.trace.name})"
            )

    def differences(self, arguments: dict[str, Any]) -> list[str]:
        """What keeps arguments from being those it was compiled for, a line each."""
        wanted, given = dict(named_leaves(self.trace.arguments)), dict(named_leaves(arguments))
        wrong = [f"{path} is missing" for path in wanted if path not in given]
        wrong += [f"{path} is unexpected" for path in given if path not in wanted]
        for path, want in wanted.items():
            got = given.get(path, want)
            if not isinstance(want, Tensor) or not isinstance(got, Tensor):
                if type(got) is not type(want) or got != want:
                    wrong.append(f"{path} must be {_text(want)}, got {_text(got)}")
            elif (got.shape, got.dtype) != (want.shape, want.dtype):
                wrong.append(f"{path} must be {_text(want)}, got {_text(got)}")
        if not wrong and not same_structure(arguments, self.trace.arguments):
            wrong.append("a constant of the trees differs, such as params.config")
        return wrong or self._elsewhere(given)

    def _elsewhere(self, given: dict[str, Any]) -> list[str]:
        """Tensors that are not on the target's device."""
        kind = self.lowered.target.kind
        if kind == "reference":
            return []
        return [
            f"{path} must be on {kind!r}, got {leaf.device.type!r}: qn.place(tree, {kind!r})"
            for path, leaf in given.items()
            if isinstance(leaf, Tensor) and leaf.device.type != kind
        ]

    def call(self, arguments: dict[str, Any], host: Host = None) -> Any:
        """Run on arguments that fit."""
        lists = checked(self.lowered.host, host, self.trace.name)
        given = self.take(arguments)
        with torch.no_grad():
            results = self.graph(*given, *self.packed(given), *lists)
        passed = {id(leaf) for leaf in given}
        # results are objects of their own, for a donated object stays marked as such
        return self.give(arguments, [r.detach() if id(r) in passed else r for r in results])

    def take(self, arguments: dict[str, Any]) -> list[Tensor]:
        """The tensors of arguments, in the graph's order; DonatedError if one was given away."""
        given = [(path, leaf) for path, leaf in named_leaves(arguments) if isinstance(leaf, Tensor)]
        for path, leaf in given:
            if taker := given_up_to(leaf):
                raise donated(path, taker)
        return [leaf for _, leaf in given]

    def give(self, arguments: dict[str, Any], results: list[Tensor]) -> Any:
        """The result's tree; the donated arguments are given up with it."""
        for name in self.donate:
            for leaf in leaves(arguments[name]):
                give_up(leaf, self.trace.name)
        return rebuild(self.trace.result, results)

    def packed(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The constants of these weights, computed when other weights come."""
        if self._prepare is None:
            return ()
        weights = [given[i] for i in self._weights]
        same = len(weights) == len(self._bound) and all(map(operator.is_, weights, self._bound))
        if not same or (not weights and not self._constants):
            self._constants, self._bound = tuple(self._prepare(*given)), weights
        return self._constants


def _inputs_used(graph: GraphModule) -> list[int]:
    """Which inputs a graph reads."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return [i for i, node in enumerate(inputs) if node.users]


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)

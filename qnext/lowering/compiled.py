"""A compiled step: a callable for exactly the trees, shapes and dtypes it was made for."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qnext.errors import LoweringError, donated
from qnext.functional.tree import give_up, given_up_to, leaves, rebuild, same_structure
from qnext.lowering.trace import Trace, bind, named_leaves

SHOWN = 8  # differences an error lists


class Compiled:
    """A function bound to a target. Calls are checked by path; donated leaves are used up."""

    def __init__(
        self,
        trace: Trace,
        donate: tuple[str, ...],
        graph: GraphModule,
        prepare: GraphModule | None = None,
    ) -> None:
        self.trace, self.donate, self._graph, self._prepare = trace, donate, graph, prepare
        self._weights = _inputs_used(prepare) if prepare else []
        self._bound: list[Tensor] = []  # the weights that constants were made of
        self._constants: tuple[Tensor, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = bind(self.trace.function, args, kwargs)
        if wrong := self.differences(arguments):
            more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise LoweringError(
                f"{self.trace.name} was compiled for other arguments:\n  "
                + "\n  ".join(wrong[:SHOWN])
                + f"{more}\ntrace, lower and compile it for these, or call jit({self.trace.name})"
            )
        return self.call(arguments)

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
        return wrong

    def call(self, arguments: dict[str, Any]) -> Any:
        """Run on arguments that fit."""
        given = [(path, leaf) for path, leaf in named_leaves(arguments) if isinstance(leaf, Tensor)]
        for path, leaf in given:
            if taker := given_up_to(leaf):
                raise donated(path, taker)
        with torch.no_grad():
            leaves_given = [leaf for _, leaf in given]
            results = self._graph(*leaves_given, *self._packed(leaves_given))
        results = self._fresh([leaf for _, leaf in given], results)
        for name in self.donate:
            for leaf in leaves(arguments[name]):
                give_up(leaf, self.trace.name)
        return rebuild(self.trace.result, results)

    def _packed(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The constants of these weights, computed when other weights come."""
        if self._prepare is None:
            return ()
        weights = [given[i] for i in self._weights]
        same = len(weights) == len(self._bound) and all(map(operator.is_, weights, self._bound))
        if not same or (not weights and not self._constants):
            self._constants, self._bound = tuple(self._prepare(*given)), weights
        return self._constants

    def _fresh(self, given: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
        """Results as objects of their own, for a donated object stays marked as such."""
        passed = {id(leaf) for leaf in given}
        return [result.detach() if id(result) in passed else result for result in results]


def _inputs_used(graph: GraphModule) -> list[int]:
    """Which inputs a graph reads."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return [i for i, node in enumerate(inputs) if node.users]


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)

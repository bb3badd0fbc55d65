"""Buckets: a step compiled, and on an NPU captured, for a few batch sizes.

Graphs have fixed shapes. A batch runs in the smallest bucket that holds it; rows that only fill the
bucket live on scratch, and nothing they do is kept. All buckets work on one state's pools.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from qnext.errors import LoweringError
from qnext.functional.params import Params
from qnext.functional.state import State, narrow, widen
from qnext.functional.tree import leaves, map_leaves
from qnext.lowering.stages import Wrapped, jit
from qnext.lowering.target import Target, resolve

Tree = TypeVar("Tree")
Shape = tuple[torch.Size, ...]


class Compiler:
    """Makes functions steps of a target; on an NPU captured, into one memory pool."""

    def __init__(
        self, target: str | Target, strict: bool = False, host_lengths: bool = False
    ) -> None:
        self.target = resolve(target) if isinstance(target, str) else target
        self.strict, self.host_lengths = strict, host_lengths
        self.pool: Any = None

    def __call__(self, wrapped: Wrapped, arguments: Sequence[Any]) -> Any:
        """A callable for exactly these arguments' shapes. Raises LoweringError and TargetError."""
        how: dict[str, Any] = {"strict": self.strict, "host_lengths": self.host_lengths}
        compiled = wrapped.compile(*arguments, target=self.target, **how)
        if compiled.made.target.kind != "npu":
            return compiled
        captured = compiled.capture(*arguments, pool=self.pool)
        self.pool = captured.pool
        return captured


class Buckets:
    """`function(params, state, *rest)` for batches up to the greatest of `batches`.

    `state` owns the pools; calls take it, or any state on the same pools, with any number of rows
    up to the greatest bucket. `examples` are argument lists that follow params and state, a list
    for each form (one token a row, or two to verify); the first axis of each tensor is the batch.
    On NPU targets every bucket is captured, the largest first, into one memory pool. `strict` and
    `host_lengths` are those of `lower`. Raises LoweringError and TargetError.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        params: Params,
        state: State,
        examples: Sequence[Sequence[Any]],
        batches: Sequence[int],
        target: str | Target = "reference",
        strict: bool = False,
        host_lengths: bool = False,
        progress: bool = False,
    ) -> None:
        self.params, self.batches = params, sorted(set(batches))
        if not self.batches or self.batches[0] < 1:
            raise LoweringError(f"batches must list sizes >= 1, got {list(batches)}")
        wrapped = jit(function, donate="state")
        forms = sorted(examples, key=_elements, reverse=True)
        plan = [(batch, rest) for batch in reversed(self.batches) for rest in forms]
        self._steps: dict[tuple[int, Shape], Any] = {}
        self._compiler = Compiler(target, strict, host_lengths)
        for batch, rest in tqdm(plan, desc="buckets", unit="graph", disable=not progress):
            arguments = (params, _rows(state, batch), *resized(rest, batch))
            self._steps[batch, _form(rest)] = self._compiler(wrapped, arguments)

    @property
    def pool(self) -> Any:
        """The memory that the captured steps share, None where none was captured."""
        return self._compiler.pool

    def __call__(self, state: State, *rest: Any, host: Any = None) -> Any:
        """The step's results for the state's rows; the state is used up, as it is donated."""
        rows = state.batch
        step, batch = self._step(rows, rest)
        if host is not None:
            each = _form(rest)[0].numel()  # tokens a row: on scratch too, a query sees its own
            host = {name: [*values, *[each] * (batch - rows)] for name, values in host.items()}
        more = {} if host is None else {"host": host}
        results = step(self.params, widen(state, batch), *resized(rest, batch), **more)
        return cut(results, rows)

    def _step(self, rows: int, rest: Sequence[Any]) -> tuple[Any, int]:
        form = _form(rest)
        for batch in self.batches:
            if batch >= rows and (batch, form) in self._steps:
                return self._steps[batch, form], batch
        known = sorted({str([list(s) for s in shapes]) for _, shapes in self._steps})
        if any(form == shapes for _, shapes in self._steps):
            raise LoweringError(
                f"{rows} rows fit no bucket of {', '.join(map(str, self.batches))}: make one of "
                f"{rows} or more, or split the batch"
            )
        raise LoweringError(
            f"no bucket takes rows of shapes {[list(s) for s in form]}: those made take "
            + " or ".join(known)
        )


def _rows(state: State, batch: int) -> State:
    """A state of `batch` rows on the same pools, to make a bucket with."""
    return narrow(state, batch) if state.batch > batch else widen(state, batch)


def resized(rest: Sequence[Any], batch: int) -> list[Any]:
    """Arguments with rows of zeros added, or rows left out, for `batch` rows."""

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        more = batch - leaf.shape[0]
        return leaf[:batch] if more <= 0 else pad(leaf, (0, 0) * (leaf.ndim - 1) + (0, more))

    return [map_leaves(fit, tree) for tree in rest]


def _form(rest: Sequence[Any]) -> Shape:
    """The shapes of a row of each argument."""
    tensors = [leaf for tree in rest for leaf in leaves(tree) if isinstance(leaf, Tensor)]
    return tuple(leaf.shape[1:] for leaf in tensors)


def _elements(rest: Sequence[Any]) -> int:
    return sum(shape.numel() for shape in _form(rest))


def cut(results: Tree, rows: int) -> Tree:
    """The first rows of every result."""
    if isinstance(results, State):
        return narrow(results, rows)  # type: ignore[return-value]
    if isinstance(results, tuple) and not hasattr(results, "_fields"):
        return tuple(cut(part, rows) for part in results)  # type: ignore[return-value]
    return map_leaves(lambda leaf: leaf[:rows], results)

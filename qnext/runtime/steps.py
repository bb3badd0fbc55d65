"""The compiled steps of an engine: pure functions, for some batch sizes and chunk lengths."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from tqdm import tqdm

from qnext.functional.blocks import unembed
from qnext.functional.model import decode, trunk
from qnext.functional.params import Params
from qnext.functional.sampling import Drawing, Knobs, choose
from qnext.functional.speculate import draft, judge, newest, verify_line
from qnext.functional.state import State
from qnext.functional.tree import place
from qnext.functional.verify import rewound
from qnext.lowering.compiled import Compiled
from qnext.lowering.stages import jit
from qnext.lowering.target import Target
from qnext.runtime.buckets import Compiler
from qnext.runtime.moves import Moves
from qnext.runtime.rounds import Form, Rounds
from qnext.shapes import Shaped


def consume(
    params: Shaped[Params],
    state: Shaped[State],
    tokens: Int[Tensor, "batch seq"],
    lengths: Int[Tensor, " batch"],
) -> tuple[Bool[Tensor, " batch"], Shaped[State]]:
    """Consume `lengths` tokens of each row; whether the hidden state of its last is finite."""
    hidden, state = trunk(params, state, tokens, lengths)
    last = (lengths - 1).clamp(min=0).long()[:, None, None]
    return hidden.take_along_dim(last, dim=1).isfinite().all(-1).squeeze(1), state


def score(
    params: Shaped[Params],
    state: Shaped[State],
    tokens: Int[Tensor, "batch seq"],
    lengths: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch seq vocab"], Shaped[State]]:
    """Consume `lengths` tokens of each row; logits after every one of them."""
    hidden, state = trunk(params, state, tokens, lengths)
    return unembed(params, hidden), state


def guess(
    params: Shaped[Params],
    state: Shaped[State],
    tokens: Int64[Tensor, " batch"],
    drafted: int,
    settings: Shaped[Knobs] | None,
) -> tuple[Int64[Tensor, "batch drafted"], Shaped[State]]:
    """Guess what follows tokens that are not consumed yet, with the MTP module."""
    return draft(params, state, tokens, drafted, settings)


def draw_next(
    params: Shaped[Params], state: Shaped[State], tokens: Int64[Tensor, " batch"]
) -> tuple[Int64[Tensor, " batch"], Bool[Tensor, " batch"], Shaped[State]]:
    """Consume a token of each row; the likeliest that follows, and whether its logit is finite."""
    logits, state = decode(params, state, tokens)
    drawn = choose(logits, state.lengths)
    return drawn, _finite(logits[:, None], drawn[:, None]), state


def draw_ahead(
    params: Shaped[Params],
    state: Shaped[State],
    tokens: Int64[Tensor, " batch"],
    drafted: int,
    ends: Int64[Tensor, "batch ends"],
) -> tuple[
    Int64[Tensor, "batch seq"],
    Int[Tensor, " batch"],
    Int64[Tensor, " batch"],
    Bool[Tensor, " batch"],
    Shaped[State],
]:
    """`speculate`, the likeliest tokens, up to one of `ends`.

    Returns what was drawn, how many tokens count, the token to consume next, whether logits are
    finite, and the state. A row that draws one of its ends (-2 is none) gives back what it consumed
    after it, and rests.
    """
    guesses, state = draft(params, state, tokens, drafted)
    line = torch.cat([tokens[:, None], guesses], dim=1)
    logits, pending = verify_line(params, state, line)
    drawn, count, after = judge(state, pending, logits, line, Drawing())
    kept, after = halted(after, drawn, count, ends)
    at = torch.arange(drawn.shape[1], dtype=kept.dtype, device=drawn.device)
    drawn = drawn.where(at < kept[:, None], -1)
    following = newest(drawn, kept).where(kept > 0, tokens)
    return drawn, kept, following, _finite(logits, drawn), after


def halted(
    state: Shaped[State],
    drawn: Int64[Tensor, "batch seq"],
    count: Int[Tensor, " batch"],
    ends: Int64[Tensor, "batch ends"],
) -> tuple[Int[Tensor, " batch"], Shaped[State]]:
    """Rows that drew a token that ends them give back what they consumed after it, and rest."""
    some = (drawn[:, :, None] == ends[:, None, :]).sum(2)
    before = (some.cumsum(1) == 0).sum(1, dtype=count.dtype)  # tokens before the first that ends
    over = before < count
    kept = count.where(~over, before + 1)
    state = rewound(state, count - kept)
    return kept, state._replace(capacity=state.lengths.where(over, state.capacity))


def _finite(
    logits: Float[Tensor, "batch seq vocab"], drawn: Int64[Tensor, "batch seq"]
) -> Bool[Tensor, " batch"]:
    """Whether the logits of all tokens that a row drew are finite."""
    return logits.gather(2, drawn.clamp(min=0)[..., None]).squeeze(2).isfinite().all(-1)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "consume": consume,
    "score": score,
    "decode": decode,
    "next": draw_next,
    "ahead": draw_ahead,
    "guess": guess,
    "verify": verify_line,
}


class Steps:
    """Steps by name and shape, compiled when they are first called for, or by `warm`.

    Each donates its state. A call must come with arguments of a bucket's shape: see `batch_of` and
    `seq_of`; `lone` are further lengths, of calls with a single row. On NPU targets params are
    brought to the device, and steps are captured into one pool of memory. Raises what `lower` and
    `compile` raise: LoweringError, TargetError.
    """

    def __init__(
        self,
        params: Params,
        target: str | Target = "cpu",
        strict: bool = False,
        *,
        batches: Sequence[int],
        seqs: Sequence[int],
        lone: Sequence[int] = (),
    ) -> None:
        self.moves = Moves()
        self.rounds: Rounds | None = None  # with groups that have requests of their own
        self._compiler = Compiler(target, strict)
        kind = self._compiler.target.kind
        self.params = place(params, kind) if kind == "npu" else params
        self.batches, self.seqs = sorted(set(batches)), sorted(set(seqs))
        self.lone = sorted({*seqs, *lone})
        self._wrapped = {name: jit(f, donate="state") for name, f in FUNCTIONS.items()}
        self._made: dict[Any, Any] = {}

    def batch_of(self, rows: int) -> int:
        """The least bucket that takes so many rows."""
        return next(batch for batch in self.batches if batch >= rows)

    def seq_of(self, tokens: int, rows: int) -> int:
        """The least bucket that takes so many tokens a row; a row alone has more of them."""
        return next(seq for seq in (self.seqs if rows > 1 else self.lone) if seq >= tokens)

    def most_rows(self, seq: int) -> int:
        """Rows of so many tokens in one call: together no more than one row of the longest."""
        most = max(self.seqs[-1] // seq, 1)
        return max(batch for batch in self.batches if batch <= most)

    def __call__(self, name: str, state: State, *rest: Any) -> Any:
        """The step's results for exactly these shapes; the state is used up."""
        if self.rounds is not None:
            return self.rounds.call(self.run, name, state, rest)
        return self.run(name, state, *rest)

    def run(self, name: str, state: State, *rest: Any) -> Any:
        """The call itself, which other groups make as well."""
        return self._step(name, state, rest)(self.params, state, *rest)

    def attend(self, state: State, over: bool = False) -> tuple[Form, State]:
        """Without work, take part in what other groups do: (what was called, the state)."""
        assert self.rounds is not None
        return self.rounds.attend(self.run, state, over)

    def close(self) -> None:
        """No more calls will come."""

    @property
    def made(self) -> list[Compiled]:
        """What has been compiled so far, to be asked what became of it."""
        return [getattr(step, "compiled", step) for step in list(self._made.values())]

    def warm(self, calls: Sequence[tuple[Any, ...]], progress: bool = False) -> None:
        """Compile the steps of calls (name, state, *rest), of which nothing is computed."""
        for name, state, *rest in tqdm(calls, desc="steps", unit="step", disable=not progress):
            self._step(name, state, rest)

    def _step(self, name: str, state: State, rest: Sequence[Any]) -> Any:
        shapes = tuple(a.shape if isinstance(a, Tensor) else _form(a) for a in rest)
        pools = tuple(pool[0].shape for pool in state.layers)
        key = (name, state.slots.shape, state.block_table.shape, pools, shapes)
        step = self._made.get(key)
        if step is None:
            with torch.no_grad():
                step = self._compiler(self._wrapped[name], (self.params, state, *rest))
            self._made[key] = step
        return step


def _form(value: Any) -> Any:
    """What tells arguments apart that are no tensors: a number, or whether there are settings."""
    return value if isinstance(value, int) or value is None else type(value)

"""The reference loops: prefill, then draw and consume, token by token or with guesses ahead."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from qnext.errors import InputError
from qnext.functional.blocks import within
from qnext.functional.checks import check_call, check_trees
from qnext.functional.model import decode, prefill
from qnext.functional.params import Params
from qnext.functional.sampling import (
    Counts,
    Drawing,
    Knobs,
    Sampling,
    choose,
    count_prompt,
    drawing,
    records,
)
from qnext.functional.speculate import check_draft, check_module, newest, speculate
from qnext.functional.state import State
from qnext.functional.verify import rewind
from qnext.shapes import Shaped

Step = Callable[..., Any]  # of `decode`'s signature, or with draft > 0 of `speculate`'s
Stop = Callable[[Tensor], Tensor]
GREEDY = Sampling(temperature=0.0)


def generate(
    params: Params,
    state: State,
    tokens: Tensor,
    max_new_tokens: int = 64,
    lengths: Tensor | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    eos: int | Sequence[int] | None = None,
    draft: int = 0,
    step: Step | None = None,
) -> tuple[Tensor, State]:
    """Continue prompts tokens [batch, seq]: new tokens [batch, max_new_tokens], int64, and a state.

    A row ends with the first token of `eos`, which is returned; -1 follows. The state has consumed
    the prompt and every returned token, so `generate(params, state, more)` continues; a finished
    row's state stays as it was. With `draft` so many tokens are guessed ahead (`speculate`), which
    in float32 changes nothing but speed. `step` replaces `decode`, or `speculate` where draft > 0,
    say by a compiled one. Penalties count the tokens of this call, not those that the state
    consumed before. Raises InputError, and CapacityError before anything is computed where prompt
    and new tokens do not fit.
    """
    check_trees(params, state)
    ends = _ends(eos, params.config.vocab_size)

    def stop(new: Tensor) -> Tensor:
        return torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))

    blocks = []
    steps = stream(params, state, tokens, max_new_tokens, lengths, sampling, stop, draft, step)
    for new, after in steps:
        blocks.append(new)
        state = after
    made = torch.cat(blocks, dim=1)
    # a stable sort by "is padding" moves each row's tokens to its front, in their order
    order = (made < 0).to(torch.int8).argsort(dim=1, stable=True)
    made = made.gather(1, order)[:, :max_new_tokens]
    missing = max_new_tokens - made.shape[1]
    return torch.nn.functional.pad(made, (0, missing), value=-1), state


def _ends(eos: Any, vocab: int) -> list[int]:
    """`eos` as a list of token ids."""
    ends = [eos] if isinstance(eos, int) else () if eos is None else eos
    if not isinstance(ends, Sequence) or not all(type(e) is int and 0 <= e < vocab for e in ends):
        raise InputError(
            f"eos must be a token id, or a list of them, within 0..{vocab - 1}, got {eos!r}"
        )
    return list(ends)


def stream(
    params: Params,
    state: State,
    tokens: Tensor,
    max_new_tokens: int = 64,
    lengths: Tensor | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop: Stop | None = None,
    draft: int = 0,
    step: Step | None = None,
) -> Iterator[tuple[Tensor, State]]:
    """`generate`, step by step: yields (new tokens, the state that has consumed just these).

    New tokens are [batch, draft + 1]: of each row some, then -1. `stop(column of them [batch]) ->
    bool [batch]` is asked once a column and says which rows end with it; a row that has ended
    yields -1. Stops early once all rows have. Arguments are checked at the first `next`.
    """
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise InputError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
    lengths = check_call(params, state, tokens, lengths, least=1, ahead=max_new_tokens)
    check_draft(state, draft)
    if draft and step is None:
        check_module(params)
    each = records(sampling, tokens.shape[0])
    counts = None
    if any(s.penalises for s in each):
        counts = count_prompt(tokens, within(lengths, tokens), params.config.vocab_size)
    draws = drawing(each, counts, tokens.device)
    with torch.no_grad():
        logits, state = prefill(params, state, tokens, lengths)
        new = draws.draw(logits, state.lengths)
        draws = draws.after(new)
    if draft:
        run = step or speculate
        yield from _ahead(run, params, state, new, max_new_tokens, draws, stop, draft)
    else:
        yield from _one_by_one(step or decode, params, state, new, max_new_tokens, draws, stop)


def _one_by_one(
    step: Step,
    params: Params,
    state: State,
    new: Tensor,
    max_new_tokens: int,
    draws: Drawing,
    stop: Stop | None,
) -> Iterator[tuple[Tensor, State]]:
    """Consume `new`, yield it, draw the next."""
    finished = torch.zeros_like(new, dtype=torch.bool)
    for made in range(1, max_new_tokens + 1):
        with torch.no_grad():
            resting = rest(state, finished) if finished.any() else state
            logits, after = step(params, resting, new.clamp(min=0))
            state = wake(after, state, finished) if finished.any() else after
        finished = finished | stop(new) if stop else finished
        yield new[:, None], state
        if made == max_new_tokens or finished.all():
            return
        with torch.no_grad():
            new = draws.draw(logits, state.lengths).where(~finished, -1)
            draws = draws.after(new)


def _ahead(
    step: Step,
    params: Params,
    state: State,
    new: Tensor,
    max_new_tokens: int,
    draws: Drawing,
    stop: Stop | None,
    draft: int,
) -> Iterator[tuple[Tensor, State]]:
    """Consume `new` and the guesses that were right, yield them, until rows have all they may.

    What a row may consume is its capacity in the meantime: a row without any rests.
    """
    capacity = state.capacity
    limit = state.lengths + max_new_tokens
    while True:
        with torch.no_grad():
            state = state._replace(capacity=limit)
            how = (draws.settings, draws.filters, draws.counts)
            drawn, count, state = step(params, state, new, draft, *how)
            line = torch.cat([new[:, None], drawn[:, :-1]], dim=1)
            at = torch.arange(draft + 1, device=line.device)
            line = line.where(at < count[:, None], -1)
            kept, stopped = _until_stopped(line, count, stop)
            state = rewind(state, count - kept)._replace(capacity=capacity)
            limit = state.lengths.where(stopped, limit)
            for column in drawn.where(at < kept[:, None], -1).unbind(1):
                draws = draws.after(column)
            new = newest(drawn, count)
        yield line.where(at < kept[:, None], -1), state
        if bool((state.lengths >= limit).all()):
            return


def _until_stopped(
    line: Int64[Tensor, "batch seq"], count: Int32[Tensor, " batch"], stop: Stop | None
) -> tuple[Int32[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """(count up to the token that ends a row, which rows end), `stop` being asked by column."""
    stopped = torch.zeros_like(count, dtype=torch.bool)
    if stop is None:
        return count, stopped
    for at, column in enumerate(line.unbind(1), start=1):
        asked = column.where(~stopped, -1)
        if not (asked >= 0).any():
            break
        ends = stop(asked) & (asked >= 0)
        count, stopped = count.where(~ends, at), stopped | ends
    return count, stopped


def advance(
    params: Params,
    state: State,
    tokens: Tensor,
    settings: Knobs | None = None,
    filters: bool = False,
    counts: Counts | None = None,
) -> tuple[Tensor, State]:
    """One iteration of decoding as one function: consume tokens [batch], draw the next [batch].

    `settings` (`knobs([...])`), `filters` and `counts` are those of `choose`. The state advances,
    so a traced iteration goes round without the host.
    """
    logits, state = decode(params, state, tokens)
    return choose(logits, state.lengths, settings, filters, counts), state


def rest(state: Shaped[State], resting: Bool[Tensor, " batch"]) -> State:
    """The state with the given rows' tables pointing at scratch, where a step may write."""

    def scratch(table: Tensor) -> Tensor:
        return table.where(~resting.view(-1, *[1] * (table.ndim - 1)), 0)

    return state._replace(
        lengths=scratch(state.lengths),
        block_table=scratch(state.block_table),
        slots=scratch(state.slots),
        rows=scratch(state.rows),
        accepted=scratch(state.accepted),
    )


def wake(state: Shaped[State], before: Shaped[State], resting: Bool[Tensor, " batch"]) -> State:
    """Undo `rest` after a step: resting rows are again what they were before it."""
    return state._replace(
        lengths=before.lengths.where(resting, state.lengths),
        block_table=before.block_table,
        slots=before.slots,
        rows=before.rows,
        accepted=before.accepted.where(resting, state.accepted),
        mtp_lengths=before.mtp_lengths.where(resting, state.mtp_lengths),
    )

"""The reference loop: prefill, then draw and decode token by token."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from qnext.errors import InputError
from qnext.functional.checks import check_call, check_trees
from qnext.functional.model import decode, prefill, within
from qnext.functional.params import Params
from qnext.functional.sampling import (
    Knobs,
    Sampling,
    count_output,
    count_prompt,
    draw,
    records,
    restrict,
    sample,
)
from qnext.functional.state import State
from qnext.shapes import Shaped

Decode = Callable[[Params, State, Tensor], tuple[Tensor, State]]
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
    step: Decode | None = None,
) -> tuple[Tensor, State]:
    """Continue prompts tokens [batch, seq]: new tokens [batch, max_new_tokens], int64, and a state.

    A row ends with the first token of `eos`, which is returned; -1 follows. The state has consumed
    the prompt and every returned token, so `generate(params, state, more)` continues; a finished
    row's state stays as it was. `step` replaces `decode`, say by a compiled one. Penalties count
    the tokens of this call, not those that the state consumed before. Raises InputError, and
    CapacityError before anything is computed where prompt and new tokens do not fit.
    """
    check_trees(params, state)
    ends = _ends(eos, params.config.vocab_size)

    def stop(new: Tensor) -> Tensor:
        return torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))

    columns = []
    steps = stream(params, state, tokens, max_new_tokens, lengths, sampling, stop, draft, step)
    for new, after in steps:
        columns.append(new)
        state = after
    columns += [torch.full_like(columns[0], -1)] * (max_new_tokens - len(columns))
    return torch.stack(columns, dim=1), state


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
    step: Decode | None = None,
) -> Iterator[tuple[Tensor, State]]:
    """`generate`, token by token: yields (new tokens [batch], the state that has consumed them).

    `stop(new tokens) -> bool [batch]` says which rows end with these; a row that has ended yields
    -1. Stops early once all rows have. Arguments are checked at the first `next`.
    """
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise InputError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
    if draft != 0:
        raise InputError(f"draft={draft!r}: speculation is not available yet; use draft=0")
    lengths = check_call(params, state, tokens, lengths, least=1, ahead=max_new_tokens)
    each = records(sampling, tokens.shape[0])
    counts = None
    if any(s.penalises for s in each):
        counts = count_prompt(tokens, within(lengths, tokens), params.config.vocab_size)
    finished = torch.zeros_like(lengths, dtype=torch.bool)
    with torch.no_grad():
        logits, state = prefill(params, state, tokens, lengths)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            new = sample(logits, each, state.lengths, counts).where(~finished, -1)
            resting = rest(state, finished) if finished.any() else state
            logits, after = (step or decode)(params, resting, new.clamp(min=0))
            state = wake(after, state, finished) if finished.any() else after
        counts = count_output(counts, new) if counts else None
        finished = finished | stop(new) if stop else finished
        yield new, state
        if finished.all():
            return


def advance(
    params: Params,
    state: State,
    tokens: Tensor,
    settings: Knobs | None = None,
    filters: bool = False,
) -> tuple[Tensor, State]:
    """One iteration of decoding as one function: consume tokens [batch], draw the next [batch].

    `settings` (`knobs([...])`) says how each row draws, None that all take the likeliest; `filters`
    that some row has top_k, top_p or min_p, which sorts the vocabulary. The state advances, so a
    traced iteration goes round without the host. Rows with penalties draw with `sample`.
    """
    logits, state = decode(params, state, tokens)
    if settings is None:
        return logits.argmax(-1), state
    logits = logits.to(torch.float32)
    if filters:
        logits = restrict(logits, settings)
    return draw(logits, settings, state.lengths), state


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
    )

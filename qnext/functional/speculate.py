"""Speculative decoding: guess tokens with the MTP module, verify them all in one call of the model.

    tokens, count, state = speculate(params, state, tokens, draft=2)

The token that the model itself draws at a position is fixed by its logits, the seed and the
position (see `sampling`). A guess is accepted exactly when it is that token; where the first is
not, that token takes its place, and no call is lost. So speculation changes no token, whatever the
temperature, filters and penalties; guesses only decide how many tokens a call yields. (Leviathan et
al., arXiv:2211.17192, accept with a probability instead, which keeps the distribution alone.)
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from qnext.errors import InputError
from qnext.functional.blocks import locate, unembed
from qnext.functional.checks import INTEGERS, check_call, check_tokens, check_trees
from qnext.functional.model import trunk
from qnext.functional.mtp import predict, present
from qnext.functional.params import Params
from qnext.functional.sampling import Counts, Drawing, Knobs
from qnext.functional.state import State
from qnext.functional.verify import committed


def speculate(
    params: Params,
    state: State,
    tokens: Tensor,
    draft: int = 1,
    settings: Knobs | None = None,
    filters: bool = False,
    counts: Counts | None = None,
) -> tuple[Tensor, Tensor, State]:
    """One iteration: consume tokens [batch] and as many guesses as are right, draw what follows.

    Returns tokens [batch, draft + 1], int64, of each row the first `count` [batch], int32, then -1,
    and the state. As with `advance`, a row's last token is drawn and not yet consumed: the next
    call takes it, see `newest`. Guesses are consumed only where there is capacity; a row that has
    none left rests, with count 0. `settings` (`knobs([...])`, None: all take the likeliest),
    `filters` and `counts` are those of `choose`; counts include `tokens`. The state must have been
    made with at least this `draft`. Raises InputError.
    """
    tokens, draws = _checked_tokens(params, state, tokens), Drawing(settings, filters, counts)
    guesses, state = _drafted(params, state, tokens, draft, draws)
    return _accepted(params, state, tokens, guesses, draws)


def draft(
    params: Params,
    state: State,
    tokens: Tensor,
    draft: int = 1,
    settings: Knobs | None = None,
    filters: bool = False,
    counts: Counts | None = None,
) -> tuple[Tensor, State]:
    """Guess what follows tokens [batch], which are not consumed: guesses [batch, draft], int64.

    The MTP module is chained, its hidden state and its guess standing for the model's next ones;
    guesses are drawn like tokens, with the noise of their positions. Of the state only what the
    module holds beyond `mtp_lengths` changes. Raises InputError.
    """
    tokens = _checked_tokens(params, state, tokens)
    return _drafted(params, state, tokens, draft, Drawing(settings, filters, counts))


def accept(
    params: Params,
    state: State,
    tokens: Tensor,
    guesses: Tensor,
    settings: Knobs | None = None,
    filters: bool = False,
    counts: Counts | None = None,
) -> tuple[Tensor, Tensor, State]:
    """`speculate` with guesses [batch, drafted] of any origin: verify, draw, accept, commit.

    The model needs no MTP module for it. Raises InputError.
    """
    tokens = _checked_tokens(params, state, tokens)
    if (
        not isinstance(guesses, Tensor)
        or guesses.dtype not in INTEGERS
        or guesses.ndim != 2
        or guesses.shape[0] != state.batch
    ):
        known = isinstance(guesses, Tensor)
        got = f"{guesses.dtype} {list(guesses.shape)}" if known else type(guesses).__name__
        raise InputError(
            f"guesses must be int32 or int64 [batch={state.batch}, drafted], got {got}"
        )
    drafted = guesses.shape[1]
    check_draft(state, drafted)
    line = torch.cat([tokens[:, None], guesses.to(tokens.dtype)], dim=1)
    room = (state.capacity - state.lengths).clamp(0, drafted + 1)
    check_call(params, state, line, room, least=0)
    return _accepted(params, state, tokens, guesses, Drawing(settings, filters, counts))


def newest(tokens: Int64[Tensor, "batch seq"], count: Int[Tensor, " batch"]) -> Tensor:
    """The last of each row's `count` tokens, [batch]: drawn, and still to be consumed."""
    return tokens.gather(1, (count - 1).clamp(min=0).long()[:, None]).squeeze(1)


def check_draft(state: State, draft: Any) -> None:
    """Raise InputError unless so many tokens can be drafted on this state."""
    if isinstance(draft, bool) or not isinstance(draft, int) or draft < 0:
        raise InputError(f"draft must be an integer >= 0, got {draft!r}")
    if draft >= state.slots.shape[1]:
        raise InputError(
            f"draft={draft} on a state that has room to draft {state.slots.shape[1] - 1}: make it "
            f"with init_state(config, batch, capacity, draft={draft})"
        )


def check_module(params: Params) -> None:
    """Raise InputError unless the model has an MTP module to draft with."""
    if not params.mtp:
        raise InputError(
            "this model has no MTP module to draft with: load a checkpoint that has mtp.* tensors, "
            "or pass guesses of your own to accept(params, state, tokens, guesses)"
        )


def _checked_tokens(params: Params, state: State, tokens: Tensor) -> Tensor:
    """tokens [batch], int64, 0 in rows that have no room and rest."""
    check_trees(params, state)
    check_tokens(tokens, ("batch",))
    some = state.lengths < state.capacity
    check_call(params, state, tokens[:, None], some.to(torch.int32), least=0)
    return tokens.long().where(some, 0)


def _drafted(
    params: Params,
    state: State,
    tokens: Int64[Tensor, " batch"],
    draft: int,
    draws: Drawing,
) -> tuple[Int64[Tensor, "batch drafted"], State]:
    check_draft(state, draft)
    if draft == 0:
        return tokens.new_empty(state.batch, 0), state
    check_module(params)
    hidden, past = present(state).to(params.embed.dtype), (state.lengths - 1).clamp(min=0)
    one = torch.ones(state.batch, 1, dtype=torch.bool, device=tokens.device)
    guesses = []
    for at in range(draft):
        step = locate(params.config, state, past + at, one, cut=True)
        ahead, state = predict(params, state, hidden[:, None], tokens[:, None], step)
        hidden = ahead.squeeze(1)
        place = state.lengths + (at + 1)
        tokens = draws.draw(unembed(params, hidden), place)
        draws = draws.after(tokens)
        guesses.append(tokens)
    return torch.stack(guesses, dim=1), state


def _accepted(
    params: Params,
    state: State,
    tokens: Int64[Tensor, " batch"],
    guesses: Int[Tensor, "batch drafted"],
    draws: Drawing,
) -> tuple[Int64[Tensor, "batch seq"], Int[Tensor, " batch"], State]:
    line = torch.cat([tokens[:, None], guesses.long()], dim=1)
    logits, pending = verify_line(params, state, line)
    return judge(state, pending, logits, line, draws)


def verify_line(
    params: Params, state: State, line: Int64[Tensor, "batch seq"]
) -> tuple[Float[Tensor, "batch seq vocab"], State]:
    """`verify` of whole lines, a token and guesses, in which all count as real: shapes tell all.

    What is beyond the capacity is not written, and `judge` never commits it. Rows without room work
    on scratch. Arguments are not checked: this is a part of a step.
    """
    line, some = _fitted(state, line), state.lengths < state.capacity
    scratch = state._replace(
        block_table=state.block_table.where(some[:, None], 0),
        slots=state.slots.where(some[:, None], 0),
        rows=state.rows.where(some, 0),
    )
    every = torch.full_like(state.lengths, line.shape[1])
    hidden, pending = trunk(params, scratch, line, every, each=True, cut=True)
    return unembed(params, hidden), pending._replace(
        block_table=state.block_table, slots=state.slots, rows=state.rows
    )


def judge(
    state: State,
    pending: State,
    logits: Float[Tensor, "batch seq vocab"],
    line: Int64[Tensor, "batch seq"],
    draws: Drawing,
) -> tuple[Int64[Tensor, "batch seq"], Int[Tensor, " batch"], State]:
    """What `speculate` returns, given `state` before and what `verify_line` made of it."""
    line, room = _fitted(state, line), state.capacity - state.lengths
    at = torch.arange(line.shape[1], dtype=room.dtype, device=room.device)
    drawn = _draw_each(logits, state.lengths[:, None] + (at + 1), line, draws)
    missed = (drawn[:, :-1] != line[:, 1:]).to(room.dtype)
    right = (missed.cumsum(1) == 0).sum(1, dtype=room.dtype)
    count = (right + 1).minimum(room)
    after = committed(pending, count)
    after = after._replace(accepted=after.accepted.where(room > 0, state.accepted))
    return drawn.where(at < count[:, None], -1), count, after


def _fitted(state: State, line: Int64[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq"]:
    """A line with token 0 in the place of those that find no room, which may be anything."""
    room = state.capacity - state.lengths
    at = torch.arange(line.shape[1], dtype=room.dtype, device=room.device)
    return line.where(at < room[:, None], 0)


def _draw_each(
    logits: Float[Tensor, "batch seq vocab"],
    position: Int[Tensor, "batch seq"],
    line: Int64[Tensor, "batch seq"],
    draws: Drawing,
) -> Int64[Tensor, "batch seq"]:
    """What the model draws after each token of a line; counts grow with the tokens before it."""
    width = line.shape[1]
    if draws.counts is None and draws.bias is None:  # all at once
        each = draws.settings and Knobs(
            *(s[:, None].expand(-1, width).flatten() for s in draws.settings)
        )
        draws = draws._replace(settings=each)
        return draws.draw(logits.flatten(0, 1), position.flatten()).view_as(line)
    columns = []
    for at in range(width):
        draws = draws.after(line[:, at]) if at else draws
        columns.append(draws.draw(logits[:, at], position[:, at]))
    return torch.stack(columns, dim=1)

"""Verifying a draft: all its tokens in one call, and then the state after as many as were right.

`verify` keeps the state after each token, `commit` says how many count. Rolling back is choosing an
earlier index: no keys, values, windows or recurrent states are copied.

    logits, pending = verify(params, state, tokens)   # tokens [batch, 1 + drafted]
    state = commit(pending, accepted)                 # accepted [batch], 1 .. 1 + drafted
    state = rewind(state, count)                      # on second thoughts, count [batch] fewer

(Leviathan et al., arXiv:2211.17192, verify by probability; here a caller accepts by comparison.)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qnext.errors import CapacityError, InputError
from qnext.functional.blocks import unembed
from qnext.functional.checks import INTEGERS, WAITS, checked
from qnext.functional.model import trunk
from qnext.functional.mtp import advanced
from qnext.functional.params import Params
from qnext.functional.state import State
from qnext.functional.tree import is_concrete
from qnext.shapes import Shaped


@checked(least=0)
def verify(
    params: Shaped[Params],
    state: Shaped[State],
    tokens: Int[Tensor, "batch seq"],
    lengths: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch seq vocab"], Shaped[State]]:
    """Logits [batch, seq, vocab] after each token, and a state that waits for `commit`.

    The state must have been made with `draft >= seq - 1`. `lengths` [batch] marks how many tokens
    of each row are real (default: all). The returned state holds the states after every token and
    stands for none of them, which a negative `accepted` marks: only `commit` takes it. Raises
    InputError and CapacityError.
    """
    room, seq = state.slots.shape[1], tokens.shape[1]
    if seq > room:
        raise InputError(
            f"verify was given {seq} tokens a row, this state keeps the states after {room}: "
            f"make it with init_state(config, batch, capacity, draft={seq - 1})"
        )
    hidden, pending = trunk(params, state, tokens, lengths, each=True)
    return unembed(params, hidden), pending


def commit(state: State, accepted: Tensor) -> State:
    """The state after the first `accepted` [batch] of the tokens that `verify` was given.

    0 is right for a row that had none. Indices and lengths change, no tensor of a layer does.
    Raises InputError for counts beyond what the state keeps, CapacityError beyond its capacity.
    """
    _check_accepted(state, accepted)
    return committed(state, accepted)


def committed(state: State, accepted: Tensor) -> State:
    """`commit` without checks, which read values: for parts of a step."""
    count = accepted.to(torch.int32)
    last = (count - 1).clamp(min=0)
    state = advanced(state, state.lengths + count)
    return state._replace(slots=_swapped(state.slots, last), accepted=last)


def rewind(state: State, count: Tensor) -> State:
    """The state `count` [batch] tokens earlier, within the tokens of the last `commit`.

    Like commit it chooses: the states after all of those tokens are still there, until something
    else is consumed. At least one of them stays; 0 leaves a row as it is. Raises InputError.
    """
    _check_rewind(state, count)
    return rewound(state, count)


def rewound(state: State, count: Tensor) -> State:
    """`rewind` without checks, which read values: for parts of a step."""
    count = count.to(torch.int32)
    last = state.accepted - count
    slots = _swapped(_swapped(state.slots, state.accepted), last)
    return advanced(state, state.lengths - count)._replace(slots=slots, accepted=last)


def _swapped(
    slots: Int[Tensor, "batch drafts"], chosen: Int[Tensor, " batch"]
) -> Int[Tensor, "batch drafts"]:
    """Each row's chosen slot changes places with its first: no slot is lost or held twice."""
    if slots.shape[1] == 1:
        return slots
    chosen = chosen.long()[:, None]
    rest = torch.arange(1, slots.shape[1], device=slots.device)
    order = torch.cat([chosen, rest.where(rest != chosen, 0)], dim=1)
    return slots.gather(1, order)


def _check_counts(name: str, state: State, counts: object) -> None:
    if (
        not isinstance(counts, Tensor)
        or counts.dtype not in INTEGERS
        or counts.shape != state.lengths.shape
    ):
        got = (
            f"{counts.dtype} {list(counts.shape)}"
            if isinstance(counts, Tensor)
            else type(counts).__name__
        )
        raise InputError(f"{name} must be int32 or int64 [batch={state.batch}], got {got}")


def _check_accepted(state: State, accepted: Tensor) -> None:
    _check_counts("accepted", state, accepted)
    if not (is_concrete(accepted) and is_concrete(state.lengths)):
        return
    for row, (count, held) in enumerate(
        zip(accepted.tolist(), state.accepted.tolist(), strict=True)
    ):
        if held > 0 or not 0 <= count <= -held:
            raise InputError(
                f"accepted[{row}] = {count} must lie in 0..{max(-held, 0)}, the tokens of that row "
                "which the state holds from verify(...); commit takes what verify returned, once"
            )
    after = (state.lengths + accepted).tolist()
    for row, (length, room) in enumerate(zip(after, state.capacity.tolist(), strict=True)):
        if length > room:
            raise CapacityError(
                f"row {row} would hold {length} tokens, but its capacity is {room}; verify fewer "
                "tokens of it, by lengths"
            )


def _check_rewind(state: State, count: Tensor) -> None:
    _check_counts("count", state, count)
    if not (is_concrete(count) and is_concrete(state.accepted)):
        return
    if bool((state.accepted < 0).any()):
        raise InputError(WAITS)
    held = state.accepted.tolist()
    for row, (back, most) in enumerate(zip(count.tolist(), held, strict=True)):
        if not 0 <= back <= most:
            raise InputError(
                f"count[{row}] = {back} must lie in 0..{most}, the tokens of the last commit but "
                "the first, if nothing was consumed since; for more keep an earlier state"
            )

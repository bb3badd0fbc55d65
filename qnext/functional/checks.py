"""What a call of the model must satisfy, checked before anything is computed.

Shapes, dtypes and trees are always checked; values (token ids, lengths, capacity) only where they
may be read: not on specs and not under a trace.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qnext.errors import CapacityError, InputError
from qnext.functional.config import ATTENTION
from qnext.functional.params import Params
from qnext.functional.state import KV, Delta, State
from qnext.functional.tree import is_concrete
from qnext.shapes import mismatches

INTEGERS = (torch.int32, torch.int64)


def checked(least: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Check (params, state, tokens, lengths=None) before the function; `least` valid tokens a row.

    A function without `lengths` (decode) takes tokens [batch], one a row.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        single = "lengths" not in function.__annotations__

        @wraps(function)
        def call_single(params: Params, state: State, tokens: Tensor) -> Any:
            _check_tokens(tokens, ("batch",))
            check_call(params, state, tokens[:, None], None, least)
            return function(params, state, tokens)

        @wraps(function)
        def call(
            params: Params, state: State, tokens: Tensor, lengths: Tensor | None = None
        ) -> Any:
            return function(
                params, state, tokens, check_call(params, state, tokens, lengths, least)
            )

        return call_single if single else call

    return wrap


def check_call(
    params: Params,
    state: State,
    tokens: Tensor,
    lengths: Tensor | None,
    least: int,
    past: Tensor | None = None,
    ahead: int = 0,
) -> Tensor:
    """Raise InputError or CapacityError unless the arguments fit; returns lengths, int32 [batch].

    `past` is what precedes in each row (default: state.lengths); `ahead` further tokens must find
    room after these.
    """
    check_trees(params, state)
    _check_tokens(tokens, ("batch", "seq"))
    batch, seq = tokens.shape
    if batch != state.batch:
        raise InputError(
            f"tokens has {batch} rows, the state has {state.batch} sequences; "
            f"make the state with init_state(config, batch={batch}, ...)"
        )
    if seq == 0:
        raise InputError("empty prompt: tokens must have at least one column")
    lengths = _check_lengths(lengths, tokens, least)
    if is_concrete(tokens) and is_concrete(lengths) and is_concrete(state.lengths):
        past = state.lengths if past is None else past
        _check_values(params, state, tokens, lengths, past, least, ahead)
    return lengths


def check_trees(params: object, state: object) -> None:
    """Raise InputError unless these are a Params and a State of the same model, whole and alive."""
    if not isinstance(params, Params):
        raise InputError(f"params must be a qnext Params (qn.load, qn.demo), got {_name(params)}")
    if not isinstance(state, State):
        raise InputError(f"state must be a qnext State (qn.init_state), got {_name(state)}")
    wrong = mismatches(params, params.config.axes, "params")
    if not wrong:
        wrong = state_mismatches(params, state)
    if wrong:
        raise InputError(
            "params and state do not fit the model:\n  " + "\n  ".join(wrong) + "\n"
            "make the state with init_state(params.config, batch, capacity)"
        )
    if is_concrete(state.lengths):
        _check_alive(state)


def state_mismatches(params: Params, state: State) -> list[str]:
    """What keeps a state from being one of this model's, a line each."""
    config = params.config
    kinds = {KV: "attention", Delta: "delta-net"}
    wanted = [KV if kind == ATTENTION else Delta for kind in config.layer_types]
    if len(state.layers) != len(wanted):
        return [f"state.layers has {len(state.layers)} layers, the model has {len(wanted)}"]
    wrong = [
        f"state.layers[{i}] must be of {kinds[want]} kind, got {_name(have)}"
        for i, (want, have) in enumerate(zip(wanted, state.layers, strict=True))
        if not isinstance(have, want)
    ]
    if len(state.mtp) != config.mtp_layers:
        wrong.append(f"state.mtp has {len(state.mtp)} modules, the model has {config.mtp_layers}")
    return wrong or mismatches(state, config.axes, "state")


def _check_alive(state: State) -> None:
    for i, part in enumerate((*state.layers, *state.mtp)):
        for name, pool in zip(part._fields, part, strict=True):
            if pool.untyped_storage().nbytes() < pool.nbytes:
                raise InputError(
                    f"state.layers[{i}].{name} was donated and its memory reused. Use the state "
                    "that the donating call returned, or jit(..., donate=()) to keep both."
                )


def _check_tokens(tokens: object, axes: tuple[str, ...]) -> None:
    if not isinstance(tokens, Tensor):
        raise InputError(
            f"tokens must be an integer tensor [{', '.join(axes)}], got {_name(tokens)}; "
            "write torch.tensor(tokens)"
        )
    if tokens.dtype not in INTEGERS:
        raise InputError(f"tokens must be int32 or int64, got {tokens.dtype}; write tokens.long()")
    if tokens.ndim != len(axes):
        raise InputError(f"tokens must be [{', '.join(axes)}], got shape {list(tokens.shape)}")


def _check_lengths(lengths: Tensor | None, tokens: Tensor, least: int) -> Tensor:
    batch, seq = tokens.shape
    if lengths is None:
        return torch.full((batch,), seq, dtype=torch.int32, device=tokens.device)
    if not isinstance(lengths, Tensor):
        raise InputError(f"lengths must be an integer tensor [batch], got {_name(lengths)}")
    if lengths.dtype not in INTEGERS or tuple(lengths.shape) != (batch,):
        raise InputError(
            f"lengths must be int32 or int64 [batch={batch}], "
            f"got {lengths.dtype} {list(lengths.shape)}"
        )
    return lengths.to(torch.int32)


def _check_values(
    params: Params,
    state: State,
    tokens: Tensor,
    lengths: Tensor,
    past: Tensor,
    least: int,
    ahead: int,
) -> None:
    batch, seq = tokens.shape
    vocab = params.config.vocab_size
    counts = lengths.tolist()
    for row, count in enumerate(counts):
        if not least <= count <= seq:
            what = "empty prompt: " if count == 0 else ""
            raise InputError(
                f"{what}lengths[{row}] = {count} must lie in {least}..{seq}, "
                f"as tokens has {seq} columns"
            )
    padding = torch.arange(seq, device=tokens.device) >= lengths[:, None]
    outside = ((tokens < 0) | (tokens >= vocab)).masked_fill(padding, False)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise InputError(
            f"tokens[{row}, {column}] = {int(tokens[row, column])} is no token id: "
            f"the vocabulary is 0..{vocab - 1}"
        )
    for row, (used, room) in enumerate(zip(past.tolist(), state.capacity.tolist(), strict=True)):
        need = used + counts[row] + ahead
        if need > room:
            raise CapacityError(
                f"row {row} holds {used} tokens and would hold {need}, but its capacity is {room}; "
                f"make the state with init_state(config, batch={batch}, capacity={need}) or more"
            )


def _name(value: object) -> str:
    return type(value).__name__

"""What a call of the model must satisfy, checked before anything is computed.

Shapes, dtypes and trees are always checked; values (token ids, lengths, capacity) only where they
may be read: not on specs and not under a trace. What is still to be checked is annotated `Any`.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qnext.errors import CapacityError, InputError, donated
from qnext.functional.config import ATTENTION, PAGE, Config
from qnext.functional.params import (
    AttentionParams,
    DeltaNetParams,
    DenseParams,
    Head,
    LayerParams,
    MoeParams,
    MtpParams,
    Params,
    Quantized,
)
from qnext.functional.state import KV, Delta, Mtp, State
from qnext.functional.tree import given_up_to, has_memory, is_concrete
from qnext.shapes import annotated_leaves, mismatches

INTEGERS = (torch.int32, torch.int64)
WAITS = (
    "this state holds a draft that waits: state = commit(state, accepted) says how many of its "
    "tokens count"
)


def checked(least: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Check (params, state, tokens, lengths=None) before the function; `least` valid tokens a row.

    A function without `lengths` (decode) takes tokens [batch], one a row.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        single = "lengths" not in function.__annotations__

        @wraps(function)
        def call_single(params: Any, state: Any, tokens: Any) -> Any:
            check_tokens(tokens, ("batch",))
            check_call(params, state, tokens[:, None], None, least)
            return function(params, state, tokens)

        @wraps(function)
        def call(params: Any, state: Any, tokens: Any, lengths: Any = None) -> Any:
            lengths = check_call(params, state, tokens, lengths, least)
            return function(params, state, tokens, lengths)

        return call_single if single else call

    return wrap


def check_call(
    params: Any,
    state: Any,
    tokens: Any,
    lengths: Any,
    least: int,
    past: Tensor | None = None,
    ahead: int = 0,
) -> Tensor:
    """Raise InputError or CapacityError unless the arguments fit; returns lengths, int32 [batch].

    `past` is what precedes in each row (default: state.lengths); `ahead` further tokens must find
    room after these.
    """
    check_trees(params, state)
    check_tokens(tokens, ("batch", "seq"))
    batch, seq = tokens.shape
    if batch != state.batch:
        raise InputError(
            f"tokens has {batch} rows, the state has {state.batch} sequences; "
            f"make the state with init_state(config, batch={batch}, ...)"
        )
    if seq == 0:
        raise InputError("empty prompt: tokens must have at least one column")
    lengths = _check_lengths(lengths, tokens)
    if is_concrete(tokens) and is_concrete(lengths) and is_concrete(state.lengths):
        past = state.lengths if past is None else past
        _check_values(params, state, tokens, lengths, past, least, ahead)
    return lengths.to(torch.int32)


def check_trees(params: object, state: object) -> None:
    """Raise InputError unless these are a Params and a State of the same model, whole and alive."""
    if not isinstance(params, Params):
        raise InputError(f"params must be a qnext Params (qn.load, qn.demo), got {_name(params)}")
    if not isinstance(state, State):
        raise InputError(f"state must be a qnext State (qn.init_state), got {_name(state)}")
    if wrong := params_mismatches(params) or state_mismatches(params, state):
        raise InputError(
            "params and state do not fit the model:\n  " + "\n  ".join(wrong) + "\n"
            "make the state with init_state(params.config, batch, capacity)"
        )
    if is_concrete(state.lengths):
        _check_alive(state)


def params_mismatches(params: Params) -> list[str]:
    """What keeps params from being those of their own config, a line each."""
    config = params.config
    if not isinstance(config, Config):
        return [f"params.config must be a Config, got {_name(config)}"]
    wrong = _wrong_parts("params.layers", params.layers, [LayerParams] * config.num_hidden_layers)
    wrong += _wrong_parts("params.head", params.head, [Head] * (not config.tie_word_embeddings))
    wrong += _wrong_parts("params.mtp", params.mtp, [MtpParams] * config.mtp_layers)
    if wrong:
        return wrong
    for i, (layer, kind, moe) in enumerate(
        zip(params.layers, config.layer_types, config.is_moe, strict=True)
    ):
        mixer = AttentionParams if kind == ATTENTION else DeltaNetParams
        wrong += _wrong_layer(f"params.layers[{i}]", layer, mixer, moe)
    for i, module in enumerate(params.mtp):
        moe = config.num_experts > 0
        wrong += _wrong_layer(f"params.mtp[{i}].layer", module.layer, AttentionParams, moe)
    return wrong or mismatches(params, config.axes, "params")


def state_mismatches(params: Params, state: State) -> list[str]:
    """What keeps a state from being one of this model's, a line each."""
    config = params.config
    kinds = [KV if kind == ATTENTION else Delta for kind in config.layer_types]
    wrong = _wrong_parts("state.layers", state.layers, kinds)
    wrong += _wrong_parts("state.mtp", state.mtp, [Mtp] * config.mtp_layers)
    slots = state.slots
    drafts = slots.shape[-1] if isinstance(slots, Tensor) and slots.ndim else 1
    sizes = config.axes | {"window": config.linear_conv_kernel_dim - 2 + drafts}
    return wrong or mismatches(state, sizes, "state")


def table_mismatches(state: State) -> list[str]:
    """Counts and indices of a state that point outside its pools, a line each."""
    axes: dict[str, int] = {}
    for _, leaf, hint in annotated_leaves(state, "state"):
        axes |= zip(hint.axes, leaf.shape, strict=True)
    limits: dict[str, Tensor | int] = {
        "capacity": axes["max_pages"] * PAGE,
        "lengths": state.capacity,
        "mtp_lengths": state.capacity,
        "accepted": axes["drafts"] - 1,
        "block_table": axes.get("pages", 1 << 31) - 1,
        "slots": axes.get("slots", 1 << 31) - 1,
        "rows": axes.get("rows", 1 << 31) - 1,
    }
    wrong = []
    for name, limit in limits.items():
        values = getattr(state, name)
        if bool(((values < 0) | (values > limit)).any()):
            most = limit if isinstance(limit, int) else "capacity"
            wrong.append(f"state.{name} must lie in 0..{most}, got {values.tolist()}")
    return wrong


def _wrong_layer(path: str, layer: Any, mixer: type, moe: bool) -> list[str]:
    """What keeps a layer's params from having this mixer and the right feed-forward part."""
    if not isinstance(layer, LayerParams):
        return [f"{path} must be LayerParams, got {_name(layer)}"]
    ffn = MoeParams if moe else DenseParams
    parts = (("mixer", layer.mixer, mixer), ("ffn", layer.ffn, ffn))
    wrong = [
        f"{path}.{name} must be {kind.__name__}, got {_name(part)}"
        for name, part, kind in parts
        if not isinstance(part, kind)
    ]
    if isinstance(layer.ffn, MoeParams):
        int8 = [isinstance(part, Quantized) for part in (layer.ffn.gate_up, layer.ffn.down)]
        if any(int8) and not all(int8):
            wrong.append(f"{path}.ffn.gate_up and .down must both be Quantized, or neither")
    return wrong


def _wrong_parts(path: str, parts: Any, kinds: Sequence[type]) -> list[str]:
    """What keeps `parts` from being a tuple of trees of these kinds."""
    if not isinstance(parts, tuple):
        return [f"{path} must be a tuple, got {_name(parts)}"]
    if len(parts) != len(kinds):
        return [f"{path} has {len(parts)} parts, the model has {len(kinds)}"]
    return [
        f"{path}[{i}] must be {kind.__name__}, got {_name(part)}"
        for i, (part, kind) in enumerate(zip(parts, kinds, strict=True))
        if not isinstance(part, kind)
    ]


def _check_alive(state: State) -> None:
    for path, leaf, _ in annotated_leaves(state, "state"):
        taker = given_up_to(leaf)
        if taker or (leaf.nbytes and not has_memory(leaf)):
            raise donated(path, taker)


def check_tokens(tokens: object, axes: tuple[str, ...]) -> None:
    if not isinstance(tokens, Tensor):
        raise InputError(
            f"tokens must be an integer tensor [{', '.join(axes)}], got {_name(tokens)}; "
            "write torch.tensor(tokens)"
        )
    if tokens.dtype not in INTEGERS:
        raise InputError(f"tokens must be int32 or int64, got {tokens.dtype}; write tokens.long()")
    if tokens.ndim != len(axes):
        raise InputError(f"tokens must be [{', '.join(axes)}], got shape {list(tokens.shape)}")


def _check_lengths(lengths: Any, tokens: Tensor) -> Tensor:
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
    return lengths


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
    if bool((state.accepted < 0).any()):
        raise InputError(WAITS)
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

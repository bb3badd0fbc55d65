"""The convolutions of two packages beside torch_npu, as if one were installed: `install("sgl")`.

What they take and do is read from sgl-kernel-npu at f425bdf and vllm-ascend at 182b75e, of August
2026. Only the update mode over [batch, seq, dim] is here; other modes are refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch_npu
from torch import Tensor

from qnext.lowering.softnpu.bridge import (
    Refused,
    alias,
    issue,
    need,
    need_dtype,
    need_shape,
    poison,
)
from qnext.lowering.softnpu.kernels.index import need_range

LOW = (torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)
UPDATE = 1  # run_mode


class Operator(NamedTuple):
    """An operator and the namespace that a package registers it in."""

    space: str
    schema: str
    run: Callable[..., Tensor]


def check(
    x: Tensor, weight: Tensor, state: Tensor, rows: Tensor | None, accepted: Tensor | None,
    *, activation: int, mode: int, **absent: Tensor | None,
) -> None:  # fmt: skip
    """What both packages check on the host, or leave to whoever calls."""
    need(mode == UPDATE, f"run_mode must be {UPDATE} here", mode)
    need(activation in (0, 1), "activation_mode must be 0 or 1", activation)
    for name, tensor in absent.items():
        given = tensor is not None and tensor.numel() > 0
        need(not given, f"{name} must be absent here", given)
    need(x.dim() == 3, "x must be [batch, seq, dim] here", list(x.shape))
    batch, seq, dim = x.shape
    need_dtype("x", x, *LOW)
    need(dim % 16 == 0, "dim must be a multiple of 16", dim)
    need_dtype("weight", weight, x.dtype)
    need(weight.dim() == 2 and 2 <= weight.shape[0] <= 4, "2..4 taps", list(weight.shape))
    need_shape("weight", weight, weight.shape[0], dim)
    need_dtype("conv_states", state, x.dtype)
    need(state.dim() == 3, "conv_states must be [rows, inputs, dim]", list(state.shape))
    width, length = weight.shape[0], state.shape[1]
    need_shape("conv_states", state, state.shape[0], length, dim)
    need(length >= width - 1, f"conv_states must have {width - 1} inputs a row", length)
    need(state.is_contiguous(), "conv_states must be contiguous", state.stride())
    need(rows is not None, "cache_indices must be given here", rows)
    for name, index in (("cache_indices", rows), ("num_accepted_tokens", accepted)):
        if index is not None:
            need_dtype(name, index, *INDICES)
            need_shape(name, index, batch)
    if accepted is not None:
        need(width == 4, "num_accepted_tokens needs 4 taps", width)
        room = width - 2 + seq
        need(length >= room, f"conv_states must have {room} inputs a row for {seq} tokens", length)


def update(
    x: Tensor, weight: Tensor, state: Tensor, rows: Tensor, accepted: Tensor | None,
    activation: int, pad: int, y: Tensor,
) -> None:  # fmt: skip
    """y_t = R(act(sum_j w_j line_{t+j})), in the order of the taps; the state of a row is moved.

    The line is width - 1 inputs of the row, from `accepted - 1` on, and x. Afterwards the row is
    the line from its second input on; without counts its first inputs are the last of the line.
    Rows at `pad` are left out. Row 0 is for whoever writes last: nobody reads it.
    """
    used = rows[rows != pad]
    need_range("cache_indices", used, state.shape[0])
    kept = used[used > 0]
    need(kept.unique().numel() == kept.numel(), "cache_indices must be distinct", rows.tolist())
    width, seq = weight.shape[0], x.shape[1]
    counts = torch.ones_like(rows) if accepted is None else accepted
    need_range("num_accepted_tokens", counts, state.shape[1] - width + 3, low=1)
    poison(y)  # of rows that are left out
    taps = weight.float()
    for each, (row, count) in enumerate(zip(rows.tolist(), counts.tolist(), strict=True)):
        if row == pad:
            continue
        line = torch.cat([state[row, count - 1 : count + width - 2], x[each]])
        inputs = line.float()
        total = inputs[:seq] * taps[0]
        for tap in range(1, width):
            total = torch.addcmul(total, inputs[tap : tap + seq], taps[tap])
        y[each] = total / (1 + torch.exp(-total)) if activation else total
        moved = line[1:] if accepted is not None else line[seq:]
        state[row, : moved.shape[0]] = moved


def launch(
    name: str, x: Tensor, weight: Tensor, state: Tensor, rows: Tensor, accepted: Tensor | None,
    activation: int, pad: int, y: Tensor,
) -> None:  # fmt: skip
    """One task of the current stream."""
    counts = None if accepted is None else alias(accepted)
    stream = torch_npu.npu.current_stream().npu_stream
    inputs = (alias(x), alias(weight), alias(state), alias(rows))
    issue(name, stream, update, *inputs, counts, activation, pad, alias(y))


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """A broken contract is the RuntimeError that the package raises."""
    try:
        yield
    except Refused as error:
        raise RuntimeError(f"{name} refused: {error}") from None


_planned: set[Any] = set()  # shapes whose plan is on the device


def sgl_causal_conv1d(
    x: Tensor, weight: Tensor, conv_states: Tensor, bias: Tensor | None = None,
    query_start_loc: Tensor | None = None, cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None, num_accepted_tokens: Tensor | None = None,
    activation_mode: int = 0, pad_slot_id: int = -1, run_mode: int = 0,
) -> Tensor:  # fmt: skip
    """Indices become int64 and counts int32 by launches of their own, where they are not.

    The plan of a shape goes to the device in its first call, and is kept there: captured, it would
    not be there for the calls outside of the graph.
    """
    name, shapes = "causal_conv1d", (x.shape, weight.shape, conv_states.shape)
    with refusals(name):
        check(
            *(x, weight, conv_states, cache_indices, num_accepted_tokens),
            activation=activation_mode,
            mode=run_mode,
            bias=bias,
            query_start_loc=query_start_loc,
            has_initial_state=has_initial_state,
        )
        need(x.is_contiguous(), "x must be contiguous", x.stride())
        need(weight.is_contiguous(), "weight must be contiguous", weight.stride())
        key = (shapes, x.dtype, num_accepted_tokens is None, activation_mode, pad_slot_id)
        new = key not in _planned and torch_npu.npu.is_current_stream_capturing()
        need(not new, "the first call of a shape must not be captured", list(x.shape))
        _planned.add(key)
    assert cache_indices is not None
    rows, y = cache_indices.to(torch.int64), torch.empty_like(x)
    counts = None if num_accepted_tokens is None else num_accepted_tokens.to(torch.int32)
    launch(name, x, weight, conv_states, rows, counts, activation_mode, pad_slot_id, y)
    return y


def vllm_causal_conv1d(
    output: Tensor, x: Tensor, weight: Tensor, conv_state: Tensor, bias_opt: Tensor | None,
    query_start_loc_opt: Tensor | None, cache_indices_opt: Tensor | None,
    initial_state_mode_opt: Tensor | None, num_accepted_tokens_opt: Tensor | None,
    activation_mode: int, pad_slot_id: int, run_mode: int,
) -> Tensor:  # fmt: skip
    """Indices and counts of either dtype; x and weight may have strides, as aclnn copies them."""
    name = "aclnnCausalConv1d"
    with refusals(name):
        check(
            *(x, weight, conv_state, cache_indices_opt, num_accepted_tokens_opt),
            activation=activation_mode,
            mode=run_mode,
            bias=bias_opt,
            query_start_loc=query_start_loc_opt,
            initial_state_mode=initial_state_mode_opt,
        )
        need_dtype("output", output, x.dtype)
        need_shape("output", output, *x.shape)
    assert cache_indices_opt is not None
    inputs = (x, weight, conv_state, cache_indices_opt, num_accepted_tokens_opt)
    launch(name, *inputs, activation_mode, pad_slot_id, output)
    return output


OPERATORS = {
    "sgl": Operator(
        "npu",
        "causal_conv1d(Tensor x, Tensor weight, Tensor conv_states, Tensor? bias=None, "
        "Tensor? query_start_loc=None, Tensor? cache_indices=None, "
        "Tensor? has_initial_state=None, Tensor? num_accepted_tokens=None, "
        "int activation_mode=0, int pad_slot_id=-1, int run_mode=0) -> Tensor",
        sgl_causal_conv1d,
    ),
    "vllm": Operator(
        "_C_ascend",
        "npu_causal_conv1d_custom(Tensor output, Tensor x, Tensor weight, Tensor conv_state, "
        "Tensor? bias_opt, Tensor? query_start_loc_opt, Tensor? cache_indices_opt, "
        "Tensor? initial_state_mode_opt, Tensor? num_accepted_tokens_opt, "
        "int activation_mode, int pad_slot_id, int run_mode) -> (Tensor output)",
        vllm_causal_conv1d,
    ),
}
_installed: dict[str, torch.library.Library] = {}


def install(kind: str) -> None:
    """Register the operator of "sgl" or "vllm", as importing the package does."""
    space, schema, run = OPERATORS[kind]
    library = torch.library.Library(space, "FRAGMENT")
    library.define(schema)
    library.impl(schema.partition("(")[0], run, "PrivateUse1")
    _installed[kind] = library


def remove(kind: str) -> None:
    """Take the operator away again."""
    _installed.pop(kind)._destroy()

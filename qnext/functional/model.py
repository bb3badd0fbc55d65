"""Qwen3-Next as pure functions: params, state and tokens in; logits and a new state out.

`forward`, `prefill` and `decode` are one computation with different `seq` and different logits.
Rows are right-padded and `lengths` says how many tokens of each are real; padding changes nothing.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding

from qnext.functional import mtp, ops
from qnext.functional.blocks import layer, locate, unembed, within
from qnext.functional.checks import checked
from qnext.functional.params import Params
from qnext.functional.state import State
from qnext.shapes import Shaped


@checked(least=0)
def forward(
    params: Shaped[Params],
    state: Shaped[State],
    tokens: Int[Tensor, "batch seq"],
    lengths: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch seq vocab"], Shaped[State]]:
    """Consume `lengths` tokens of each row; logits [batch, seq, vocab] and the new state.

    `lengths` [batch] may be left out (all of them) and may hold 0 (the row rests). Logits at
    padded positions mean nothing. Raises InputError, or CapacityError before computing anything.
    """
    hidden, state = trunk(params, state, tokens, lengths)
    return unembed(params, hidden), state


@checked(least=1)
def prefill(
    params: Shaped[Params],
    state: Shaped[State],
    tokens: Int[Tensor, "batch seq"],
    lengths: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch vocab"], Shaped[State]]:
    """Like `forward`, but logits [batch, vocab] of each row's last valid token only."""
    hidden, state = trunk(params, state, tokens, lengths)
    last = (lengths - 1).clamp(min=0).long()[:, None, None]
    return unembed(params, hidden.take_along_dim(last, dim=1).squeeze(1)), state


@checked(least=1)
def decode(
    params: Shaped[Params], state: Shaped[State], tokens: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch vocab"], Shaped[State]]:
    """Consume one token a row; logits [batch, vocab] of the token that follows."""
    hidden, state = trunk(params, state, tokens[:, None], torch.ones_like(state.lengths))
    return unembed(params, hidden.squeeze(1)), state


def trunk(
    params: Shaped[Params],
    state: Shaped[State],
    tokens: Int[Tensor, "batch seq"],
    lengths: Int[Tensor, " batch"],
    each: bool = False,
    cut: bool = False,
) -> tuple[Float[Tensor, "batch seq d"], Shaped[State]]:
    """The model without its head: hidden states [batch, seq, d] after the final norm.

    With `each` the state after every token is kept and none is chosen yet, see `verify`. With
    `cut` tokens may lie beyond the capacity, see `locate`.
    """
    config = params.config
    valid = within(lengths, tokens)
    step = locate(config, state, state.lengths, valid, each, cut)
    x = embedding(tokens.where(valid, 0), params.embed)
    layers = []
    for layer_params, layer_state in zip(params.layers, state.layers, strict=True):
        x, layer_state = layer(layer_params, layer_state, x, step, config)
        layers.append(layer_state)
    hidden = ops.rms_norm(x=x, weight=params.norm, eps=config.rms_norm_eps)
    state = state._replace(layers=tuple(layers))
    if mtp.follows(state):
        state = mtp.follow(params, state, hidden, tokens, step, cut)
    if each:
        return hidden, state._replace(accepted=-step.taken)
    state = mtp.advanced(state, step.context)
    if state.slots.shape[1] > 1:  # else windows have one place to begin at, the first
        state = state._replace(accepted=torch.zeros_like(state.accepted))
    return hidden, state

"""Multi-token prediction: a small module that guesses one token further than the model.

From the model's hidden state h_t and the next token x_{t+1} it predicts x_{t+2}:

    u = fc [norm(embed(x_{t+1})); norm(h_t)];   h' = norm(layer(u));   logits = head(h')

The layer is one gated-attention layer with its own keys and values, at positions t; embedding and
head are the model's. Chained, h' stands for the next h. (DeepSeek-V3, arXiv:2412.19437, sec. 2.2.)

In a state with room for drafts the module follows the model: whatever consumes tokens also writes
the module's keys and values of the pairs (h_{t-1}, x_t) and keeps the last h. A draft then starts
from there, and what it writes itself, from guesses, is overwritten when the guesses are verified.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding

from qnext.errors import InputError
from qnext.functional import ops
from qnext.functional.blocks import Step, layer, locate, project, remember, unembed, within
from qnext.functional.checks import check_call, check_trees
from qnext.functional.params import AttentionParams, MtpParams, Params
from qnext.functional.state import KV, State
from qnext.shapes import Shaped


def mtp(
    params: Params,
    state: State,
    hidden: Tensor,
    tokens: Tensor,
    lengths: Tensor | None = None,
    module: int = 0,
) -> tuple[Tensor, Tensor, State]:
    """Consume (hidden state, next token) pairs; returns (logits, hidden', state).

    hidden [batch, seq, d] are `trunk`'s outputs at positions t, tokens [batch, seq] the tokens at
    t + 1, lengths [batch] the valid pairs of each row (default: all). logits [batch, seq, vocab]
    predict the tokens at t + 2. The state's main part is not touched; its `mtp_lengths` advance.
    Raises InputError where the checkpoint has no such module or arguments do not fit.
    """
    check_trees(params, state)
    if not 0 <= module < len(params.mtp):
        raise InputError(
            f"this model has {len(params.mtp)} MTP modules, module {module} is not one of them; "
            "load a checkpoint that has mtp.* tensors"
        )
    lengths = check_call(params, state, tokens, lengths, least=0, past=state.mtp_lengths)
    wanted = [*tokens.shape, params.config.hidden_size]
    if not isinstance(hidden, Tensor) or list(hidden.shape) != wanted:
        got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise InputError(f"hidden must be a tensor {wanted} to go with tokens, got {got}")
    step = locate(params.config, state, state.mtp_lengths, within(lengths, tokens))
    hidden, state = predict(params, state, hidden, tokens, step, module)
    return unembed(params, hidden), hidden, state._replace(mtp_lengths=step.context)


def predict(
    params: Shaped[Params],
    state: Shaped[State],
    hidden: Float[Tensor, "batch seq d"],
    tokens: Int[Tensor, "batch seq"],
    step: Shaped[Step],
    module: int = 0,
) -> tuple[Float[Tensor, "batch seq d"], Shaped[State]]:
    """hidden' of pairs at the places of `step`, and the state with their keys and values."""
    p, pools = params.mtp[module], state.mtp[module]
    eps = params.config.rms_norm_eps
    u = _joined(params, p, hidden, tokens, step.valid)
    x, kv = layer(p.layer, KV(pools.key, pools.value), u, step, params.config)
    assert isinstance(kv, KV)
    pools = pools._replace(key=kv.key, value=kv.value)
    modules = (*state.mtp[:module], pools, *state.mtp[module + 1 :])
    return ops.rms_norm(x=x, weight=p.norm, eps=eps), state._replace(mtp=modules)


def _joined(
    params: Shaped[Params],
    p: Shaped[MtpParams],
    hidden: Float[Tensor, "batch seq d"],
    tokens: Int[Tensor, "batch seq"],
    valid: Bool[Tensor, "batch seq"],
) -> Float[Tensor, "batch seq d"]:
    """The module layer's input: fc of the token's embedding and the hidden state, both normed."""
    eps = params.config.rms_norm_eps
    embedded = embedding(tokens.where(valid, 0), params.embed)
    both = [
        ops.rms_norm(x=embedded, weight=p.embed_norm, eps=eps),
        ops.rms_norm(x=hidden, weight=p.hidden_norm, eps=eps),
    ]
    return project(torch.cat(both, dim=-1), p.fc)


def follows(state: Shaped[State]) -> bool:
    """Whether the module follows what this state consumes: a question of its shapes alone."""
    return bool(state.mtp) and state.slots.shape[1] > 1


def present(state: Shaped[State]) -> Float[Tensor, "batch d"]:
    """The model's hidden state after the last token of each row; nothing in a fresh row."""
    pool = state.mtp[0].hidden
    return pool.flatten(0, 1).index_select(0, state.rows * pool.shape[1] + state.accepted)


def follow(
    params: Shaped[Params],
    state: Shaped[State],
    hidden: Float[Tensor, "batch seq d"],
    tokens: Int[Tensor, "batch seq"],
    step: Shaped[Step],
    cut: bool,
) -> Shaped[State]:
    """The module's part of a call: keys and values of its pairs, and hidden states to go on from.

    `hidden` are the model's after `tokens`; `step` and `cut` are those of the model's call. Of a
    fresh row the first token makes no pair. The module's output is not needed here, so nothing of
    it but the beginning runs.
    """
    p, pools, config = params.mtp[0], state.mtp[0], params.config
    line = torch.cat([present(state)[:, None].to(hidden.dtype), hidden], dim=1)

    pairs = locate(config, state, state.lengths - 1, step.valid, cut=cut)
    pairs = pairs._replace(kv_index=pairs.kv_index.where(pairs.position >= 0, 0))
    u = _joined(params, p, line[:, :-1], tokens, step.valid)
    normed = ops.rms_norm(x=u, weight=p.layer.input_norm, eps=config.rms_norm_eps)
    assert isinstance(p.layer.mixer, AttentionParams)
    _, _, kv = remember(p.layer.mixer, KV(pools.key, pools.value), normed, pairs, config)

    drafts = torch.arange(pools.hidden.shape[1], dtype=step.start.dtype, device=hidden.device)
    last = (step.start[:, None] + drafts).clamp(max=tokens.shape[1]).long()
    kept = line.take_along_dim(last[..., None], dim=1).to(pools.hidden.dtype)
    fresh = pools._replace(
        key=kv.key, value=kv.value, hidden=pools.hidden.index_put((step.row.long(),), kept)
    )
    return state._replace(mtp=(fresh, *state.mtp[1:]))


def advanced(state: Shaped[State], lengths: Int[Tensor, " batch"]) -> Shaped[State]:
    """The state with `lengths` tokens consumed; the module that follows is a pair behind."""
    if not follows(state):
        return state._replace(lengths=lengths)
    return state._replace(lengths=lengths, mtp_lengths=(lengths - 1).clamp(min=0))

"""Multi-token prediction: a small module that guesses one token further than the model.

From the model's hidden state h_t and the next token x_{t+1} it predicts x_{t+2}:

    u = fc [norm(embed(x_{t+1})); norm(h_t)];   h' = norm(layer(u));   logits = head(h')

The layer is one gated-attention layer with its own keys and values, at positions t; embedding and
head are the model's. Chained, h' stands for the next h. (DeepSeek-V3, arXiv:2412.19437, sec. 2.2.)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding, linear

from qnext.errors import InputError
from qnext.functional import ops
from qnext.functional.blocks import layer, locate
from qnext.functional.checks import check_call, check_trees
from qnext.functional.model import unembed, within
from qnext.functional.params import Params
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
    hidden, state = _module(params, state, hidden, tokens, lengths, module)
    return unembed(params, hidden), hidden, state


def _module(
    params: Shaped[Params],
    state: Shaped[State],
    hidden: Float[Tensor, "batch seq d"],
    tokens: Int[Tensor, "batch seq"],
    lengths: Int[Tensor, " batch"],
    module: int,
) -> tuple[Float[Tensor, "batch seq d"], Shaped[State]]:
    config, p = params.config, params.mtp[module]
    eps = config.rms_norm_eps
    valid = within(lengths, tokens)
    step = locate(config, state, state.mtp_lengths, valid)
    joined = torch.cat(
        [
            ops.rms_norm(
                x=embedding(tokens.where(valid, 0), params.embed), weight=p.embed_norm, eps=eps
            ),
            ops.rms_norm(x=hidden, weight=p.hidden_norm, eps=eps),
        ],
        dim=-1,
    )
    x, kv = layer(p.layer, state.mtp[module], linear(joined, p.fc), step, config)
    assert isinstance(kv, KV)
    return ops.rms_norm(x=x, weight=p.norm, eps=eps), state._replace(
        mtp_lengths=step.context,
        mtp=(*state.mtp[:module], kv, *state.mtp[module + 1 :]),
    )

"""What a model's state does while it reads: sizes, ranks and decays, for people who study it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding

from qnext.errors import InputError
from qnext.functional import ops
from qnext.functional.blocks import layer, locate, project
from qnext.functional.config import DELTA
from qnext.functional.model import decode
from qnext.functional.params import DeltaNetParams, LayerParams, Params
from qnext.functional.state import Delta, init_state


class Reading(NamedTuple):
    """Of each delta-net layer and head after each token of a text.

    norm: of the recurrent state [dv, dk], Frobenius. rank: its effective rank, the exponential of
    the entropy of its singular values' shares (Roy and Vetterli, 2007), from 1 to min(dv, dk).
    decay: exp(g), the share of the state that the token left; a half-life of n tokens is a decay of
    0.5 ** (1 / n). layers: their numbers.
    """

    norm: Float[Tensor, "tokens nets heads"]
    rank: Float[Tensor, "tokens nets heads"]
    decay: Float[Tensor, "tokens nets heads"]
    layers: tuple[int, ...]


@torch.no_grad()
def reading(params: Params, tokens: Int[Tensor, " tokens"]) -> Reading:
    """Read tokens one by one and measure the states after each. Raises InputError for no tokens.

    Takes a singular value decomposition a head a token: meant for short texts and small models.
    """
    if tokens.ndim != 1 or not len(tokens):
        raise InputError(f"tokens must be [tokens], at least one, got {list(tokens.shape)}")
    config = params.config
    nets = tuple(n for n, kind in enumerate(config.layer_types) if kind == DELTA)
    state = init_state(config, 1, len(tokens), device=params.embed.device)
    norms, ranks = [], []
    for token in tokens:
        _, state = decode(params, state, token[None])
        slot = int(state.slots[0, 0])
        pools = [part for part in state.layers if isinstance(part, Delta)]
        matrices = torch.stack([pool.recurrent[slot] for pool in pools]).float()
        norms.append(matrices.norm(dim=(-2, -1)))
        ranks.append(effective_rank(matrices))
    decay = log_decays(params, tokens).exp()
    return Reading(torch.stack(norms), torch.stack(ranks), decay, nets)


def effective_rank(
    matrices: Float[Tensor, "*batch rows columns"],
) -> Float[Tensor, "*batch"]:
    """exp(entropy) of the singular values' shares; 0 of a matrix of zeros."""
    values = torch.linalg.svdvals(matrices)
    share = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    rank = torch.special.entr(share).sum(-1).exp()
    return rank.where(values.sum(-1) > 0, 0)


@torch.no_grad()
def log_decays(
    params: Params, tokens: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens nets heads"]:
    """g of every delta net at every token, as its layer computes them from what comes to it."""
    valid = torch.ones_like(tokens[None], dtype=torch.bool)
    found = []
    for p, x, _ in _walk(params, tokens[None]):
        mixer = p.mixer
        if isinstance(mixer, DeltaNetParams):
            normed = ops.rms_norm(x=x, weight=p.input_norm, eps=params.config.rms_norm_eps)
            b, a = project(normed, mixer.gate_proj).chunk(2, dim=-1)
            g, _ = ops.delta_gates(a=a, b=b, A_log=mixer.A_log, dt_bias=mixer.dt_bias, valid=valid)
            found.append(g[0])
    return torch.stack(found, dim=1)


@torch.no_grad()
def layer_outputs(
    params: Params, tokens: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "layers batch tokens d"]:
    """What leaves each layer of a model that reads tokens from the beginning."""
    return torch.stack([y for _, _, y in _walk(params, tokens)])


def _walk(params: Params, tokens: Tensor) -> Iterator[tuple[LayerParams, Tensor, Tensor]]:
    """(a layer, what comes to it, what leaves it), for each, of tokens [batch, tokens] from the
    beginning."""
    config = params.config
    state = init_state(config, *tokens.shape, device=params.embed.device)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    step = locate(config, state, state.lengths, valid)
    x = embedding(tokens, params.embed)
    for p, past in zip(params.layers, state.layers, strict=True):
        y, _ = layer(p, past, x, step, config)
        yield p, x, y
        x = y

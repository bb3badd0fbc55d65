"""The parts of a Qwen3-Next layer: two kinds of mixer, two kinds of feed-forward network.

Each is a function of (its params, its state, activations [batch, seq, d], what the call shares) and
returns new activations and a new state. Shapes use the axis names of docs/glossary.md.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear

from qnext.functional import ops
from qnext.functional.config import PAGE, Config
from qnext.functional.mesh import EP, TP, Span
from qnext.functional.ops.quant import OVER, RECIPROCAL, TIMES
from qnext.functional.params import (
    AttentionParams,
    DeltaNetParams,
    DenseParams,
    FfnParams,
    LayerParams,
    MoeParams,
    Params,
    Quantized,
)
from qnext.functional.state import KV, Delta, LayerState, State
from qnext.shapes import Shaped

MANY = 512  # tokens of a group that its ranks share out: a collective more, and nothing twice
L2_EPS = 1e-6  # of the delta rule's query and key norm; fixed by the model, not in its config


class Step(NamedTuple):
    """What every layer of one call shares: where its tokens are, what they see, where they go."""

    position: Int[Tensor, "batch seq"]  # in its sequence, from 0
    valid: Bool[Tensor, "batch seq"]  # the rest is padding
    taken: Int[Tensor, " batch"]  # valid tokens of each row
    context: Int[Tensor, " batch"]  # tokens visible once this call's are written
    kv_index: Int[Tensor, "batch seq"]  # pool row of each token's key and value; padding: 0
    block_table: Int[Tensor, "batch max_pages"]
    slot: Int[Tensor, "batch writes"]  # of the recurrent state: one, or one for each token
    row: Int[Tensor, " batch"]  # of the convolution window,
    offset: Int[Tensor, " batch"]  # where in it the window begins,
    start: Int[Tensor, " batch"]  # and by how many inputs it moves
    frequency: Float[Tensor, " pairs"]  # rotary radians per position


def locate(
    config: Config,
    state: State,
    past: Int[Tensor, " batch"],
    valid: Bool[Tensor, "batch seq"],
    each: bool = False,
    cut: bool = False,
) -> Step:
    """The Step of a call whose valid tokens follow `past` earlier ones in each row.

    With `each` the state after every token is kept: recurrent states in a slot each, and windows in
    one row that moves by a single input, so that the window after any token lies in it. With `cut`
    tokens may lie beyond the capacity: keys and values there go to scratch and are not seen.
    """
    seq, device = valid.shape[1], past.device
    position = past[:, None] + torch.arange(seq, dtype=past.dtype, device=device)
    taken = valid.sum(1, dtype=past.dtype)
    last_page = state.block_table.shape[1] - 1
    page = state.block_table.gather(1, (position // PAGE).clamp(0, last_page).long())
    kv_index, context = torch.add(position % PAGE, page, alpha=PAGE).where(valid, 0), past + taken
    if cut:
        kv_index = kv_index.where(position < state.capacity[:, None], 0)
        context = context.minimum(state.capacity)
    return Step(
        position=position,
        valid=valid,
        taken=taken,
        context=context,
        kv_index=kv_index,
        block_table=state.block_table,
        slot=state.slots[:, : seq if each else 1],
        row=state.rows,
        offset=state.accepted,
        start=taken.clamp(max=1) if each else taken,
        frequency=config.rope.frequencies(config.head_dim, device),
    )


def layer(
    p: Shaped[LayerParams],
    state: Shaped[LayerState],
    x: Float[Tensor, "batch seq d"],
    step: Shaped[Step],
    config: Config,
) -> tuple[Float[Tensor, "batch seq d"], Shaped[LayerState]]:
    """One decoder layer: x + mixer(norm(x)), then x + ffn(norm(x))."""
    normed = ops.rms_norm(x=x, weight=p.input_norm, eps=config.rms_norm_eps)
    if isinstance(p.mixer, AttentionParams):
        assert isinstance(state, KV)
        mixed, state = gated_attention(p.mixer, state, normed, step, config)
    else:
        assert isinstance(state, Delta)
        mixed, state = delta_net(p.mixer, state, normed, step, config)
    x = x + mixed
    normed = ops.rms_norm(x=x, weight=p.post_norm, eps=config.rms_norm_eps)
    return x + feed_forward(p.ffn, normed, config), state


def gated_attention(
    p: Shaped[AttentionParams],
    kv: Shaped[KV],
    x: Float[Tensor, "batch seq d"],
    step: Shaped[Step],
    config: Config,
) -> tuple[Float[Tensor, "batch seq d"], Shaped[KV]]:
    """Grouped-query attention, q/k norm, partial rotary, and a sigmoid gate on its output."""
    query, gate, kv = remember(p, kv, x, step, config)
    seen = ops.attention(
        query=query,
        key_pool=kv.key,
        value_pool=kv.value,
        block_table=step.block_table,
        position=step.position,
        context=step.context,
        scale=config.head_dim**-0.5,
    )
    return project(whole((seen * gate.sigmoid()).flatten(-2), "heads", config), p.out_proj), kv


def remember(
    p: Shaped[AttentionParams],
    kv: Shaped[KV],
    x: Float[Tensor, "batch seq d"],
    step: Shaped[Step],
    config: Config,
) -> tuple[Float[Tensor, "batch seq hq hd"], Float[Tensor, "batch seq hq hd"], Shaped[KV]]:
    """What precedes attention: (query, gate, the pools with this call's keys and values)."""
    hq, hkv, hd = (config.axes[axis] for axis in ("hq", "hkv", "hd"))
    eps = config.rms_norm_eps
    heads = project(x, p.in_proj).unflatten(-1, (-1, hd))
    query, key, value, gate = heads.split([hq, hkv, hkv, hq], dim=-2)
    query, key = ops.rotary(
        query=ops.rms_norm(x=query, weight=p.q_norm, eps=eps),
        key=ops.rms_norm(x=key, weight=p.k_norm, eps=eps),
        position=step.position,
        frequency=step.frequency,
        factor=config.rope.attention_factor,
    )
    kv = KV(
        *ops.kv_write(
            key_pool=kv.key, value_pool=kv.value, key=key, value=value, index=step.kv_index
        )
    )
    return query, gate, kv


def delta_net(
    p: Shaped[DeltaNetParams],
    state: Shaped[Delta],
    x: Float[Tensor, "batch seq d"],
    step: Shaped[Step],
    config: Config,
) -> tuple[Float[Tensor, "batch seq d"], Shaped[Delta]]:
    """Gated DeltaNet: short convolution, gated delta rule, gated norm (arXiv:2412.06464)."""
    hk, hv, dk, dv = (config.axes[axis] for axis in ("hk", "hv", "dk", "dv"))
    qkv, z = project(x, p.in_proj).split([2 * hk * dk + hv * dv, hv * dv], dim=-1)
    b, a = project(x, p.gate_proj).chunk(2, dim=-1)

    qkv, window = ops.short_conv(
        x=qkv,
        weight=p.conv,
        window=state.window,
        rows=step.row,
        offset=step.offset,
        start=step.start,
    )
    query, key, value = qkv.split([hk * dk, hk * dk, hv * dv], dim=-1)
    g, beta = ops.delta_gates(a=a, b=b, A_log=p.A_log, dt_bias=p.dt_bias, valid=step.valid)
    out, recurrent = ops.delta_rule(
        query=ops.l2_norm(x=query.unflatten(-1, (hk, dk)), eps=L2_EPS),
        key=ops.l2_norm(x=key.unflatten(-1, (hk, dk)), eps=L2_EPS),
        value=value.unflatten(-1, (hv, dv)),
        g=g,
        beta=beta,
        state=state.recurrent,
        slots=step.slot,
        scale=dk**-0.5,
    )
    out = ops.gated_rms_norm(
        x=out, weight=p.norm, gate=z.unflatten(-1, (hv, dv)), eps=config.rms_norm_eps
    )
    out = whole(out.flatten(-2), "delta_heads", config)
    return project(out, p.out_proj, OVER), Delta(recurrent, window)


def feed_forward(
    p: Shaped[FfnParams], x: Float[Tensor, "batch seq d"], config: Config
) -> Float[Tensor, "batch seq d"]:
    """A dense SwiGLU network, or a mixture of them with a gated shared expert."""
    if isinstance(p, DenseParams):
        return swiglu_network(x, p.gate_up, p.down, config)
    return shared_mixture(p, x.flatten(0, 1), config).view_as(x)


def shared_mixture(
    p: Shaped[MoeParams], x: Float[Tensor, "tokens d"], config: Config
) -> Float[Tensor, "tokens d"]:
    """`mixture`; where tokens travel, and are many, each rank of a group sends its run of them."""
    mesh, tokens = config.mesh, x.shape[0]
    alone = mesh.tp == 1 or mesh.divides("experts") <= mesh.tp
    if alone or tokens < MANY or tokens % mesh.tp:
        return mixture(p, x, config)
    made = mixture(p, x.chunk(mesh.tp)[mesh.index(TP)], config)
    return ops.all_gather(x=made.flatten(), group=mesh.group(TP), size=mesh.tp).view_as(x)


def mixture(
    p: Shaped[MoeParams], x: Float[Tensor, "tokens d"], config: Config
) -> Float[Tensor, "tokens d"]:
    """The top-k routed experts of each token, and the shared expert scaled by its gate."""
    weight, expert = ops.route(
        logits=project(x, p.router).to(config.precision.router),
        topk=config.num_experts_per_tok,
        renormalise=config.norm_topk_prob,
    )
    routed = shared_out(p, x, expert, weight.to(x.dtype), config)
    shared = swiglu_network(x, p.shared_gate_up, p.shared_down)
    return routed + project(x, p.shared_gate).sigmoid() * shared


def shared_out(
    p: Shaped[MoeParams],
    x: Float[Tensor, "tokens d"],
    expert: Int[Tensor, "tokens topk"],
    weight: Float[Tensor, "tokens topk"],
    config: Config,
) -> Float[Tensor, "tokens d"]:
    """The routed experts' weighted sum, each expert by the rank that holds it.

    Ranks that have the same tokens each compute a part of the sum; to others tokens must travel.
    """
    mesh, size = config.mesh, config.mesh.divides("experts")
    if size == 1:
        return experts(p, x, expert, weight)
    group = mesh.group(EP)
    if size <= mesh.tp:
        (held,) = mesh.spans(config.divided["own_experts"])
        place = own(expert, held)
        return ops.all_reduce(x=experts(p, x, place, weight), group=group, size=size)
    rows, place, sent = ops.dispatch(
        x=x,
        expert=expert,
        experts=config.num_experts,
        group=group,
        size=size,
        rank=mesh.index(EP),
    )
    made = experts(p, rows, place[:, None], torch.ones_like(rows[:, :1]))
    return ops.combine(x=made, expert=expert, weight=weight, sent=sent, group=group, size=size)


def own(expert: Int[Tensor, "tokens topk"], held: Span) -> Int[Tensor, "tokens topk"]:
    """Experts by their place among those that a rank holds; others become one more than these."""
    place = expert - held.start
    return place.where((place >= 0) & (place < held.size), held.size)


def experts(
    p: Shaped[MoeParams],
    x: Float[Tensor, "tokens d"],
    expert: Int[Tensor, "tokens topk"],
    weight: Float[Tensor, "tokens topk"],
) -> Float[Tensor, "tokens d"]:
    """The routed experts' weighted sum, with float weights or with int8."""
    gate_up, down = p.gate_up, p.down
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return ops.experts(x=x, expert=expert, weight=weight, gate_up=gate_up, down=down)
    assert isinstance(gate_up, Quantized)
    assert isinstance(down, Quantized)
    return ops.int8_experts(
        x=x,
        expert=expert,
        weight=weight,
        gate_up=gate_up.weight,
        gate_up_scale=gate_up.scale,
        down=down.weight,
        down_scale=down.scale,
    )


def swiglu_network(
    x: Float[Tensor, "*batch d"],
    gate_up: Float[Tensor, "two_ffn d"] | Quantized,
    down: Float[Tensor, "d whole_ffn"] | Quantized,
    config: Config | None = None,
) -> Float[Tensor, "*batch d"]:
    """down(silu(gate x) * up x); between two int8 products nothing rounds but to int8.

    config: of a dense layer, whose inner vector ranks may share.
    """
    wide = max(x.dtype, torch.float32, key=lambda dtype: dtype.itemsize)
    inner = ops.swiglu(project(x, gate_up, dtype=wide if isinstance(down, Quantized) else x.dtype))
    inner = inner if config is None else whole(inner, "dense", config)
    return project(inner, down, RECIPROCAL, dtype=x.dtype)


def whole(
    x: Float[Tensor, "*batch part"], logical: str, config: Config
) -> Float[Tensor, "*batch whole"]:
    """A vector whose parts are on several ranks, put together: no sum is split over ranks."""
    size = config.mesh.divides(logical)
    return x if size == 1 else ops.all_gather(x=x, group=config.mesh.group(TP), size=size)


def project(
    x: Float[Tensor, "*batch columns"],
    weight: Float[Tensor, "rows columns"] | Quantized,
    rounding: str = TIMES,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch rows"]:
    """x weight^T. With an int8 weight tokens are rounded to int8 too, as `rounding` says.

    That product is made in float32 and rounded to the dtype of x, or to `dtype`.
    """
    if isinstance(weight, Tensor):
        return linear(x, weight)
    q, scale = ops.quantize_tokens(x=x, rounding=rounding)
    y = ops.int8_linear(x=q, x_scale=scale, weight=weight.weight, scale=weight.scale)
    return y.to(dtype or x.dtype)


def unembed(
    params: Shaped[Params], hidden: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch vocab"]:
    """Logits of hidden states; the head is the embedding where the two are tied.

    That is whole on every rank, a head of its own is divided.
    """
    config = params.config
    if not params.head:
        return project(hidden, params.embed).to(config.precision.logits)
    logits = whole(project(hidden, params.head[0].weight), "vocab", config)
    return logits.to(config.precision.logits)


def within(
    lengths: Int[Tensor, " batch"], tokens: Int[Tensor, "batch seq"]
) -> Bool[Tensor, "batch seq"]:
    """Which positions of right-padded rows are real."""
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]

"""What rules put in place of primitives: torch_npu calls, and torch operations that they accept.

Each function computes what its primitive defines; it transposes, flattens and packs, and calls.
Whatever depends on weights alone (packed projections, 1 + w) is moved out of the step afterwards.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu, softplus

from qnext.lowering.npu import calls


def norm(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One rounding: gamma is float32."""
    return calls.npu_rms_norm(x=x, gamma=1.0 + weight.float(), eps=eps)


def add_norm(*, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sum and norm in one call, whose gamma must have the dtype of x: 1 + w rounds once more."""
    gamma = (1.0 + weight.float()).to(x.dtype)
    return calls.npu_add_rms_norm(x=x, residual=residual, gamma=gamma, eps=eps)


def l2_pair(*, x: Tensor, start: int, heads: int, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(sum(x^2) + eps) is an RMS norm with gamma width^-1/2 and eps / width."""
    both = x.narrow(-1, start, 2 * heads * width).unflatten(-1, (2 * heads, width))
    gamma = torch.full((width,), width**-0.5, dtype=torch.float32, device=x.device)
    normed = calls.npu_rms_norm(x=both, gamma=gamma, eps=eps / width)
    return normed.narrow(-2, 0, heads), normed.narrow(-2, heads, heads)


def gated_norm(*, x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """silu(gate) * norm is a swiglu of the two side by side: silu is not rounded on its own."""
    normed = calls.npu_rms_norm(x=x, gamma=weight.float(), eps=eps)
    return calls.npu_swiglu(x=torch.cat([gate, normed], dim=-1))


def join(*, x: Tensor, **weights: Tensor) -> tuple[Tensor, ...]:
    """Projections of one input as one product with their weights packed."""
    together = linear(x, torch.cat(list(weights.values())))
    return together.split([w.shape[0] for w in weights.values()], dim=-1)


def conv(
    *,
    x: Tensor,
    weight: Tensor,
    window: Tensor,
    rows: Tensor,
    offset: Tensor,
    start: Tensor,
    moves_by_one: bool,
) -> tuple[Tensor, Tensor]:
    """Six launches: gather the past, append, products, sum, silu, write the window back.

    Where windows do not all move by one, a seventh picks each row's new window.
    """
    batch, seq, channels = x.shape
    kept, taps = window.shape[1], weight.shape[1]
    if kept == taps - 1:  # a window has no other place to begin at
        before = window.index_select(0, rows)
    else:
        past = (rows * kept + offset)[:, None] + torch.arange(
            taps - 1, dtype=rows.dtype, device=rows.device
        )
        before = window.flatten(0, 1).index_select(0, past.flatten()).unflatten(0, (batch, -1))
    furthest = 1 if moves_by_one else seq
    missing = max(furthest + kept - (taps - 1 + seq), 0)
    zeros = torch.zeros(batch, missing, channels, dtype=x.dtype, device=x.device)
    beyond = [zeros] if missing else []
    line = torch.cat([before, x, *beyond], dim=1)
    taps_of = line[:, : taps - 1 + seq].unfold(1, taps, 1)
    y = silu((taps_of * weight).sum(-1))
    if moves_by_one:
        new = line[:, 1 : 1 + kept]
    else:
        rows_of = torch.arange(batch, dtype=start.dtype, device=start.device) * line.shape[1]
        keep = (rows_of + start)[:, None] + torch.arange(
            kept, dtype=start.dtype, device=start.device
        )
        new = line.flatten(0, 1).index_select(0, keep.flatten()).view(batch, kept, channels)
    return y, calls.npu_index_put(pool=window, index=rows.long(), values=new)


def delta_gates(
    *, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, valid: Tensor, padded: bool
) -> tuple[Tensor, Tensor]:
    """Four launches, and two more where padding must be an identity update.

    dt_bias is added in the dtype of a: the sum may then ride on the projection that makes a
    (`qnext.lowering.npu.bias`), and rounds once either way.
    """
    g = softplus(a + dt_bias.to(a.dtype)) * (-A_log.exp())
    beta = b.sigmoid()
    if padded:
        g, beta = g.where(valid[..., None], 0), beta.where(valid[..., None], 0)
    return g, beta


def delta_step(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Up to eight tokens a row; the state after each goes to its slot.

    A call begins at the slot of the token that was accepted last. With a slot for each token that
    is the first; with one slot it is the last, and the states before it go to scratch.
    """
    batch, seq = value.shape[:2]
    lengths = torch.full((batch,), seq, dtype=torch.int32, device=value.device)
    accepted = torch.ones_like(lengths)
    if slots.shape[1] < seq:
        scratch = torch.zeros(batch, seq - 1, dtype=slots.dtype, device=slots.device)
        slots = torch.cat([scratch, slots], dim=1)
        accepted = lengths
    out, state = calls.npu_recurrent_gated_delta_rule(
        query=query.flatten(0, 1),
        key=key.flatten(0, 1),
        value=value.flatten(0, 1),
        g=g.flatten(0, 1),
        beta=beta.flatten(0, 1),
        state=state,
        slots=slots.flatten(),
        lengths=lengths,
        accepted=accepted,
        scale=scale,
    )
    return out.view_as(value), state


def delta_chunks(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Any number of tokens; states are gathered before and written back after."""
    batch, seq = value.shape[:2]
    lengths = torch.full((batch,), seq, dtype=torch.int32, device=value.device)
    slot = slots[:, 0]
    out, last = calls.npu_chunk_gated_delta_rule(
        query=query.flatten(0, 1),
        key=key.flatten(0, 1),
        value=value.flatten(0, 1),
        g=g.flatten(0, 1),
        beta=beta.flatten(0, 1),
        state=state.index_select(0, slot),
        lengths=lengths,
        scale=scale,
    )
    return out.view_as(value), calls.npu_index_put(pool=state, index=slot.long(), values=last)


def rotary(
    *, query: Tensor, key: Tensor, position: Tensor, frequency: Tensor, factor: float, bound: int
) -> tuple[Tensor, Tensor]:
    """The call looks positions up in a table of cosines and sines, made once, from float32 angles.

    `bound` is beyond every position, 0 where none is known: then the table holds the positions of
    this call, made in every step.
    """
    places = position.flatten()
    if bound:  # padding, and rows that rest on scratch, may lie beyond
        places = places.clamp(max=bound - 1)
    known = torch.arange(bound, dtype=places.dtype, device=places.device) if bound else places
    angle = known[:, None].to(frequency.dtype) * frequency
    table = torch.cat([angle.cos(), angle.sin()], dim=-1)
    table = (table if factor == 1 else table * factor).to(query.dtype)
    if not bound:
        places = torch.arange(table.shape[0], dtype=places.dtype, device=places.device)
    q, k = calls.npu_mrope(
        position=places,
        query=query.flatten(0, 1).flatten(1),
        key=key.flatten(0, 1).flatten(1),
        table=table,
        head_dim=query.shape[-1],
    )
    return q.view_as(query), k.view_as(key)


def kv_write(
    *, key_pool: Tensor, value_pool: Tensor, key: Tensor, value: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    return calls.npu_scatter_pa_kv_cache(
        key=key.flatten(0, 1),
        value=value.flatten(0, 1),
        key_pool=key_pool,
        value_pool=value_pool,
        index=index.flatten(),
    )


def attention(
    *,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    position: Tensor,
    context: Tensor,
    scale: float,
) -> Tensor:
    """A bound on lengths known from shapes, and a mask made on the device: no length on the host.

    Position 0 stays visible to rows without context, whose results nobody reads.
    """
    bound = block_table.shape[1] * key_pool.shape[1]
    seen = torch.arange(bound, dtype=position.dtype, device=position.device)
    return calls.npu_fused_attention(
        query=query,
        key_pool=key_pool,
        value_pool=value_pool,
        block_table=block_table,
        mask=seen > position[:, None, :, None],
        bound=bound,
        scale=scale,
    )


def attention_lengths(
    *,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    position: Tensor,
    context: Tensor,
    scale: float,
    padded: bool,
) -> Tensor:
    """Exact lengths, handed in by the host at each call; until then, as many as there are pages."""
    bound = block_table.shape[1] * key_pool.shape[1]
    square = torch.ones(2048, 2048, dtype=torch.bool, device=query.device)
    return calls.npu_fused_attention_lengths(
        query=query,
        key_pool=key_pool,
        value_pool=value_pool,
        block_table=block_table,
        context=context,
        causal=square.triu(1),
        lengths=[bound] * query.shape[0],
        scale=scale,
    )


def swiglu(*, x: Tensor) -> Tensor:
    return calls.npu_swiglu(x=x)


def mixture(
    *,
    x: Tensor,
    router: Tensor,
    shared_gate: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    topk: int,
    renormalise: bool,
) -> Tensor:
    """Ten launches: the shared expert is one more expert, always chosen, weighed by its gate."""
    experts = router.shape[0]
    logits = linear(x, torch.cat([router, shared_gate]))
    weight, expert = calls.npu_gating(
        logits=logits[:, :experts], topk=topk, renormalise=renormalise
    )
    weight = torch.cat([weight, logits[:, experts:].sigmoid()], dim=-1)
    always = torch.full((x.shape[0], 1), experts, dtype=torch.int32, device=x.device)
    rows, where, counts = calls.npu_init_routing(
        x=x, expert=torch.cat([expert, always], dim=-1), experts=experts + 1
    )
    first = torch.cat([gate_up, shared_gate_up[None]]).mT.contiguous()
    second = torch.cat([down, shared_down[None]]).mT.contiguous()
    inner = calls.npu_swiglu(x=calls.npu_grouped_matmul(x=rows, weight=first, counts=counts))
    outer = calls.npu_grouped_matmul(x=inner, weight=second, counts=counts)
    return calls.npu_finalize_routing(rows=outer, weight=weight, where=where)


def rows_put(*, pool: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A write of whole rows, in place where the pool is donated."""
    spread = values.expand(index.shape[0], *pool.shape[1:])
    return calls.npu_index_put(pool=pool, index=index, values=spread)

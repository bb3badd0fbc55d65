"""The torch_npu calls that rules emit; each marshals arguments to one call of the package.

Pages: op-plugin's documentation of each name. docs/lowering.md tells what blocks they make.
"""

from typing import Any

import torch
from torch import Tensor

from qnext.lowering.calls import call


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _like(x: Tensor, **_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@call("npu_rms_norm", shapes=_like, flops=lambda *, x, **_: 4 * x.numel())
def npu_rms_norm(*, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """R(f(x) / sqrt(mean(f(x)^2) + eps) * gamma); gamma may be float32 beside a bf16 x."""
    return _npu().npu_rms_norm(x, gamma, eps)[0]


@call(
    "npu_add_rms_norm",
    shapes=lambda *, x, **_: (_like(x), _like(x)),
    flops=lambda *, x, **_: 5 * x.numel(),
)
def npu_add_rms_norm(
    *, x: Tensor, residual: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(R(R(n * rstd) * gamma), R(x + residual)); gamma has the dtype of x."""
    normed, _, total = _npu().npu_add_rms_norm(x, residual, gamma, eps)
    return normed, total


@call("npu_swiglu", shapes=lambda *, x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
def npu_swiglu(*, x: Tensor) -> Tensor:
    """R(silu(first half) * second half) of the last axis."""
    return _npu().npu_swiglu(x, -1)


@call(
    "npu_mrope",
    shapes=lambda *, query, key, **_: (_like(query), _like(key)),
    flops=lambda *, query, key, **_: 3 * (query.numel() + key.numel()),
)
def npu_mrope(
    *, position: Tensor, query: Tensor, key: Tensor, table: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Rotate-half of the leading channels; query [tokens, hq*hd]; table rows are [cos | sin]."""
    return _npu().npu_mrope(position, query, key, table, head_dim, rotary_mode="half")


@call(
    "npu_scatter_pa_kv_cache",
    shapes=lambda *, key_pool, value_pool, **_: (_like(key_pool), _like(value_pool)),
    writes=("key_pool", "value_pool"),
    bytes=lambda *, key, value, index, **_: 2 * (key.nbytes + value.nbytes) + index.nbytes,
)
def npu_scatter_pa_kv_cache(
    *, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Pool rows `index` [tokens] become key, value [tokens, hkv, hd]."""
    _npu().npu_scatter_pa_kv_cache(key, value, key_pool, value_pool, index, cache_mode="Norm")
    return key_pool, value_pool


@call(
    "npu_recurrent_gated_delta_rule",
    shapes=lambda *, value, state, **_: (_like(value), _like(state)),
    writes=("state",),
    flops=lambda *, value, state, **_: 8 * value.shape[0] * state[0].numel(),
    bytes=lambda *, query, value, state, slots, lengths, **_: (
        2 * query.nbytes
        + 2 * value.nbytes
        + (lengths.numel() + slots.numel()) * state[0].numel() * state.itemsize
    ),
)
def npu_recurrent_gated_delta_rule(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    lengths: Tensor,
    accepted: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Token by token, float32 between the tokens of a call; the state after each to its slot.

    Each row begins at the slot of its token `accepted` - 1.
    """
    out = _npu().npu_recurrent_gated_delta_rule(
        query,
        key,
        value,
        state,
        beta=beta,
        scale=scale,
        actual_seq_lengths=lengths,
        ssm_state_indices=slots,
        num_accepted_tokens=accepted,
        g=g,
    )
    return out, state


@call(
    "npu_chunk_gated_delta_rule",
    shapes=lambda *, value, state, **_: (_like(value), _like(state)),
    flops=lambda *, value, state, **_: 8 * value.shape[0] * state[0].numel(),
    launches=2,  # the package copies the state before
)
def npu_chunk_gated_delta_rule(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """By chunks of 64; state [batch, hv, dv, dk] is each row's own, before and after."""
    return _npu().npu_chunk_gated_delta_rule(
        query,
        key,
        value,
        beta=beta,
        initial_state=state,
        actual_seq_lengths=lengths,
        scale=scale,
        g=g,
    )


def _attended(*, query: Tensor, key_pool: Tensor, bound: int) -> int:
    """Bytes of queries, results, and `bound` keys and values a row."""
    row = key_pool[0, 0].numel() * key_pool.itemsize
    return 2 * query.nbytes + 2 * query.shape[0] * bound * row


def _attend(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, scale: float, **more: Any
) -> Tensor:
    pages, page, hkv, hd = key_pool.shape
    return _npu().npu_fused_infer_attention_score_v2(
        query,
        key_pool.view(pages, page, hkv * hd),
        value_pool.view(pages, page, hkv * hd),
        num_query_heads=query.shape[2],
        num_key_value_heads=hkv,
        softmax_scale=scale,
        input_layout="BSND",
        block_size=page,
        **more,
    )[0]


@call(
    "npu_fused_infer_attention_score_v2",
    shapes=lambda *, query, **_: _like(query),
    flops=lambda *, query, bound, **_: 4 * query.numel() * bound,
    bytes=lambda *, query, key_pool, mask, bound, **_: (
        mask.nbytes + _attended(query=query, key_pool=key_pool, bound=bound)
    ),
)
def npu_fused_attention(
    *,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    mask: Tensor,
    bound: int,
    scale: float,
) -> Tensor:
    """Attention of query [batch, seq, hq, hd] over pages, up to `bound` tokens a row.

    mask [batch, 1, seq, bound] marks what a query must not see; it is made on the device, so no
    length comes to the host.
    """
    return _attend(
        query,
        key_pool,
        value_pool,
        scale,
        atten_mask=mask,
        actual_seq_kvlen=[bound] * query.shape[0],
        block_table=block_table,
        sparse_mode=0,
    )


@call(
    "npu_fused_infer_attention_score_v2",
    shapes=lambda *, query, **_: _like(query),
    flops=lambda *, query, lengths, **_: 4 * query.numel() * max(lengths),
    bytes=lambda *, query, key_pool, lengths, **_: _attended(
        query=query, key_pool=key_pool, bound=max(lengths)
    ),
    launches=3,  # under capture an event is waited for and reset before: see NPUGraph.update
    host=("lengths", "context", "actual_seq_kvlen"),
)
def npu_fused_attention_lengths(
    *,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    context: Tensor,
    causal: Tensor,
    lengths: list[int],
    scale: float,
) -> Tensor:
    """The same with exact lengths, which the call takes from the host alone.

    `lengths` are the values of context [batch]; the caller knows them. causal [2048, 2048] is the
    one mask of right-down causal attention, for any number of queries.
    """
    masked = {"atten_mask": causal, "sparse_mode": 3} if query.shape[1] > 1 else {}
    return _attend(
        query,
        key_pool,
        value_pool,
        scale,
        actual_seq_kvlen=lengths,
        block_table=block_table,
        **masked,
    )


@call(
    "npu_moe_gating_top_k_softmax_v2",
    shapes=lambda *, logits, topk, **_: (
        logits.new_empty(logits.shape[0], topk),
        logits.new_empty(logits.shape[0], topk, dtype=torch.int32),
    ),
    flops=lambda *, logits, **_: 5 * logits.numel(),
)
def npu_gating(*, logits: Tensor, topk: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """(weights, experts int32) of each token's top-k."""
    weight, expert, _ = _npu().npu_moe_gating_top_k_softmax_v2(
        logits, k=topk, renorm=int(renormalise)
    )
    return weight, expert


@call(
    "npu_moe_init_routing_v2",
    shapes=lambda *, x, expert, experts: (
        x.new_empty(expert.numel(), x.shape[1]),
        x.new_empty(expert.numel(), dtype=torch.int32),
        x.new_empty(experts, dtype=torch.int64),
    ),
)
def npu_init_routing(*, x: Tensor, expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows sorted by expert, where each (token, choice) went, rows of each expert)."""
    rows, where, counts, _ = _npu().npu_moe_init_routing_v2(
        x,
        expert,
        expert_num=experts,
        active_expert_range=[0, experts],
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        row_idx_type=0,
        quant_mode=-1,
    )
    return rows, where, counts


@call(
    "npu_grouped_matmul",
    shapes=lambda *, x, weight, **_: x.new_empty(x.shape[0], weight.shape[2]),
    flops=lambda *, x, weight, **_: 2 * x.numel() * weight.shape[2],
    bytes=lambda *, x, weight, **_: (
        x.nbytes
        + min(x.shape[0], weight.shape[0]) * weight[0].numel() * weight.itemsize
        + x.shape[0] * weight.shape[2] * x.itemsize
    ),
)
def npu_grouped_matmul(*, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [rows, k], sorted by expert, times weight [experts, k, n]; counts [experts] int64."""
    return _npu().npu_grouped_matmul(
        [x], [weight], group_list=counts, split_item=3, group_type=0, group_list_type=1
    )[0]


@call(
    "npu_moe_finalize_routing",
    shapes=lambda *, rows, weight, **_: rows.new_empty(weight.shape[0], rows.shape[1]),
    flops=lambda *, rows, **_: 2 * rows.numel(),
)
def npu_finalize_routing(*, rows: Tensor, weight: Tensor, where: Tensor) -> Tensor:
    """Each token's weighted sum of its experts' rows, float32, in the order of its choices."""
    return _npu().npu_moe_finalize_routing(
        rows, None, None, None, weight, where, None, drop_pad_mode=2
    )


@call(
    "npu_moe_finalize_routing",
    shapes=lambda *, onto, **_: _like(onto),
    flops=lambda *, rows, **_: 2 * rows.numel(),
)
def npu_finalize_routing_onto(
    *, rows: Tensor, weight: Tensor, where: Tensor, onto: Tensor
) -> Tensor:
    """The same, added to `onto` before the one rounding."""
    return _npu().npu_moe_finalize_routing(
        rows, onto, None, None, weight, where, None, drop_pad_mode=2
    )


@call(
    "index_put_",
    shapes=lambda *, pool, **_: _like(pool),
    writes=("pool",),
    bytes=lambda *, values, index, **_: 2 * values.nbytes + index.nbytes,
)
def npu_index_put(*, pool: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """pool[index] = values, for whole rows of a pool."""
    return pool.index_put_((index,), values)

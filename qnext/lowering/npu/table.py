"""The rules of the NPU targets, in the order they are asked: data, and guards that say no."""

import torch
from torch import Tensor

from qnext.lowering.npu import emit, patterns
from qnext.lowering.rules import Rule
from qnext.lowering.target import Target

BF16 = torch.bfloat16


def _narrow(name: str, *tensors: Tensor) -> str | None:
    """The calls want bfloat16."""
    for tensor in tensors:
        if tensor.dtype != BF16:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, the call wants bfloat16"
    return None


def _x(target: Target, *, x: Tensor, **_: object) -> str | None:
    return _narrow("x", x)


def _add_norm(target: Target, *, x: Tensor, residual: Tensor, **_: object) -> str | None:
    if x.shape != residual.shape:
        return f"x is {list(x.shape)}, the residual {list(residual.shape)}"
    return _narrow("x", x, residual)


def _step(
    target: Target, *, query: Tensor, value: Tensor, state: Tensor, slots: Tensor, **_: object
) -> str | None:
    facts, seq = target.facts, value.shape[1]
    if seq > facts.max_verify_tokens:
        return f"{seq} tokens a row, the call takes {facts.max_verify_tokens}"
    if slots.shape[1] not in (1, seq):
        return f"{slots.shape[1]} slots for {seq} tokens"
    heads, width = max(query.shape[2], value.shape[2]), max(query.shape[3], value.shape[3])
    if heads > facts.recurrent_heads:
        return f"{heads} heads, the call takes {facts.recurrent_heads}"
    if width > facts.recurrent_head_dim:
        return f"heads of {width}, the call takes {facts.recurrent_head_dim}"
    return _narrow("value", value) or _state(target, state)


def _chunks(
    target: Target, *, query: Tensor, value: Tensor, state: Tensor, slots: Tensor, **_: object
) -> str | None:
    facts = target.facts
    if not facts.chunk_delta_rule:
        return "this CANN has no npu_chunk_gated_delta_rule"
    if slots.shape[1] != 1:
        return "the call keeps the last state only"
    heads, width = max(query.shape[2], value.shape[2]), max(query.shape[3], value.shape[3])
    if heads > facts.chunk_heads:
        return f"{heads} heads, the call takes {facts.chunk_heads}"
    if width > facts.chunk_head_dim:
        return f"heads of {width}, the call takes {facts.chunk_head_dim}"
    return _narrow("value", value) or _state(target, state)


def _state(target: Target, state: Tensor) -> str | None:
    if state.dtype == torch.float32 and target.facts.state_float32:
        return None
    return _narrow("state", state)


def _rotary(target: Target, *, query: Tensor, frequency: Tensor, **_: object) -> str | None:
    if 2 * frequency.shape[0] % 32 or query.shape[-1] % 32:
        return (
            f"{2 * frequency.shape[0]} of {query.shape[-1]} channels turn, "
            "both must be multiples of 32"
        )
    return _narrow("query", query)


def _attention(target: Target, *, query: Tensor, key_pool: Tensor, **_: object) -> str | None:
    facts = target.facts
    page, hkv, hd = key_pool.shape[1:]
    if hd % 16 or hd > facts.attention_head_dim:
        return f"heads of {hd}: must be a multiple of 16 up to {facts.attention_head_dim}"
    if page % facts.attention_page_multiple or page > facts.attention_page_max:
        return f"pages of {page}: must be a multiple of {facts.attention_page_multiple}"
    if hkv * hd > facts.attention_kv_width:
        return f"{hkv} heads of {hd}: at most {facts.attention_kv_width} together"
    if query.shape[2] // hkv > facts.attention_group:
        return f"{query.shape[2] // hkv} query heads a key head, at most {facts.attention_group}"
    return _narrow("query", query) or _narrow("key_pool", key_pool)


def _mixture(
    target: Target, *, x: Tensor, gate_up: Tensor, shared_gate_up: Tensor, topk: int, **_: object
) -> str | None:
    facts, experts = target.facts, gate_up.shape[0] + 1
    if shared_gate_up.shape[0] != gate_up.shape[1]:
        return (
            f"the shared expert's width is {shared_gate_up.shape[0] // 2}, the others' "
            f"{gate_up.shape[1] // 2}"
        )
    if experts > facts.grouped_experts:
        return f"{experts} experts, the call takes {facts.grouped_experts}"
    if topk > facts.routing_top_k:
        return f"top {topk}, the call takes {facts.routing_top_k}"
    return _narrow("x", x)


def _conv(target: Target, *, x: Tensor, window: Tensor, **_: object) -> str | None:
    return _narrow("x", x) or _narrow("window", window)


RULES = (
    Rule(
        "mixture",
        "linear",
        emit.mixture,
        "npu_moe_init_routing_v2, npu_grouped_matmul",
        _mixture,
        patterns.mixture,
    ),
    Rule("joined", "linear", emit.join, "matmul", _x, patterns.joined_linears),
    Rule("add_norm", "rms_norm", emit.add_norm, "npu_add_rms_norm", _add_norm, patterns.added_norm),
    Rule("norm", "rms_norm", emit.norm, "npu_rms_norm", _x),
    Rule("l2_pair", "l2_norm", emit.l2_pair, "npu_rms_norm", _x, patterns.stacked_norms),
    Rule("gated_norm", "gated_rms_norm", emit.gated_norm, "npu_rms_norm", _x),
    Rule(
        "conv",
        "short_conv",
        emit.conv,
        "index_select, cat, mul, sum, silu, index_put_",
        _conv,
        patterns.convolution,
    ),
    Rule(
        "gates",
        "delta_gates",
        emit.delta_gates,
        "softplus, sigmoid",
        lambda target, *, a, **_: _narrow("a", a),
        patterns.gates,
    ),
    Rule("delta_step", "delta_rule", emit.delta_step, "npu_recurrent_gated_delta_rule", _step),
    Rule("delta_chunks", "delta_rule", emit.delta_chunks, "npu_chunk_gated_delta_rule", _chunks),
    Rule("rotary", "rotary", emit.rotary, "npu_mrope", _rotary),
    Rule(
        "kv_write",
        "kv_write",
        emit.kv_write,
        "npu_scatter_pa_kv_cache",
        lambda target, *, key, key_pool, **_: _narrow("key", key, key_pool),
    ),
    Rule(
        "attention", "attention", emit.attention, "npu_fused_infer_attention_score_v2", _attention
    ),
    Rule("swiglu", "silu", emit.swiglu, "npu_swiglu", _x, patterns.gated_linear_unit),
)

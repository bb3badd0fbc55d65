"""The rules of the NPU targets, in the order they are asked: data, and guards that say no."""

from collections.abc import Callable

import torch
from torch import Tensor

from qnext.lowering.npu import (
    bias,
    collective,
    composed,
    composed_delta,
    custom,
    dispatch,
    emit,
    patterns,
    plain,
    ranks,
)
from qnext.lowering.npu.guards import other_width
from qnext.lowering.npu.w8a8 import rules as w8a8
from qnext.lowering.rules import Rule
from qnext.lowering.target import Target

BF16 = torch.bfloat16
SCAN_UP_TO = 8  # tokens for which the scan is no more launches than the theorem
WRITES_UP_TO = 16  # the same where the state after each token is kept, which only the scan does


def _narrow(name: str, tensor: Tensor) -> str | None:
    """The calls want bfloat16."""
    if tensor.dtype != BF16:
        return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, the call wants bfloat16"
    return None


def _x(target: Target, *, x: Tensor, **_: object) -> str | None:
    return _narrow("x", x)


def _add_norm(target: Target, *, x: Tensor, residual: Tensor, **_: object) -> str | None:
    if x.shape != residual.shape:
        return f"x is {list(x.shape)}, the residual {list(residual.shape)}"
    return _narrow("x", x) or _narrow("residual", residual)


def _step(
    target: Target, *, query: Tensor, value: Tensor, state: Tensor, slots: Tensor, **_: object
) -> str | None:
    facts, seq = target.facts, value.shape[1]
    if seq > facts.max_verify_tokens:
        return f"{seq} tokens a row, the call takes {facts.max_verify_tokens}"
    if slots.shape[1] not in (1, seq):
        return f"{slots.shape[1]} slots for {seq} tokens"
    if state.shape[0] < slots.shape[0] * seq:
        return f"a pool of {state.shape[0]} slots, the call wants one for each of its tokens"
    heads, width = max(query.shape[2], value.shape[2]), max(query.shape[3], value.shape[3])
    if heads > facts.recurrent_heads:
        return f"{heads} heads, the call takes {facts.recurrent_heads}"
    if width > facts.recurrent_head_dim:
        return f"heads of {width}, the call takes {facts.recurrent_head_dim}"
    return _narrow("value", value) or _state(facts.state_float32, state)


def _chunks(
    target: Target, *, query: Tensor, value: Tensor, state: Tensor, slots: Tensor, **_: object
) -> str | None:
    facts = target.facts
    if not facts.chunk_delta_rule:
        return "this CANN has no npu_chunk_gated_delta_rule"
    if not facts.chunk_strong_decay:
        return "this CANN's chunk call is not known to be right for g < -1"
    if slots.shape[1] != 1:
        return "the call keeps the last state only"
    heads, width = max(query.shape[2], value.shape[2]), max(query.shape[3], value.shape[3])
    if heads > facts.chunk_heads:
        return f"{heads} heads, the call takes {facts.chunk_heads}"
    if width > facts.chunk_head_dim:
        return f"heads of {width}, the call takes {facts.chunk_head_dim}"
    return _narrow("value", value) or _state(facts.chunk_state_float32, state)


def _state(float32: bool, state: Tensor) -> str | None:
    if state.dtype == torch.float32 and float32:
        return None
    return _narrow("state", state)


def _scan(
    target: Target, *, value: Tensor, state: Tensor, slots: Tensor, **_: object
) -> str | None:
    seq, writes = value.shape[1], slots.shape[1]
    if writes not in (1, seq):
        return f"{writes} slots for {seq} tokens"
    longest = SCAN_UP_TO if writes == 1 else WRITES_UP_TO
    if seq > longest:
        return f"{seq} tokens a row, one by one up to {longest}"
    return _narrow("value", value) or _state(True, state)


def _theorem(
    target: Target, *, value: Tensor, state: Tensor, slots: Tensor, **_: object
) -> str | None:
    if slots.shape[1] != 1:
        return "it keeps the last state only"
    return _narrow("value", value) or _state(True, state)


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


def _attention_lengths(
    target: Target, *, query: Tensor, key_pool: Tensor, padded: bool, **_: object
) -> str | None:
    if not target.host_lengths:
        return "lengths stay on the device (host_lengths=False)"
    if padded:
        return "rows may be padded: their queries would need lengths from the host as well"
    return _attention(target, query=query, key_pool=key_pool)


def _mixture(
    target: Target, *, x: Tensor, gate_up: Tensor, shared_gate_up: Tensor, topk: int, **_: object
) -> str | None:
    reason = other_width(shared_gate_up, gate_up)
    return reason or _routing(target, gate_up.shape[0] + 1, topk) or _narrow("x", x)


def _mixture_held(
    target: Target,
    *,
    x: Tensor,
    gate_up: Tensor,
    shared_gate_up: Tensor,
    topk: int,
    first: int,
    **_: object,
) -> str | None:
    reason = other_width(shared_gate_up, gate_up) if first == 0 else None
    groups = gate_up.shape[0] + (first == 0) + 1  # the shared expert's, and nobody's
    return reason or _routing(target, groups, topk) or _narrow("x", x)


def _experts_held(
    target: Target, *, x: Tensor, logits: Tensor, gate_up: Tensor, topk: int, **_: object
) -> str | None:
    reason = _routing(target, gate_up.shape[0] + 1, topk)
    return reason or _narrow("x", x) or _narrow("logits", logits)


def _experts_sent(
    target: Target, *, x: Tensor, router: Tensor, gate_up: Tensor, topk: int, **_: object
) -> str | None:
    reason = _routing(target, gate_up.shape[0] + 1, topk) or _narrow("x", x)
    return reason or _narrow("router", router) or _narrow("gate_up", gate_up)


def _mixture_apart(
    target: Target, *, x: Tensor, gate_up: Tensor, topk: int, **_: object
) -> str | None:
    return _routing(target, gate_up.shape[0], topk) or _narrow("x", x)


def _routing(target: Target, experts: int, topk: int) -> str | None:
    facts = target.facts
    if experts > facts.grouped_experts:
        return f"{experts} experts, the call takes {facts.grouped_experts}"
    if topk > facts.routing_top_k:
        return f"top {topk}, the call takes {facts.routing_top_k}"
    return None


def _conv(target: Target, *, x: Tensor, window: Tensor, **_: object) -> str | None:
    return _narrow("x", x) or _narrow("window", window)


def _conv_of(kind: custom.Kind) -> Callable[..., str | None]:
    """The guard of a package's convolution."""

    def guard(
        target: Target,
        *,
        x: Tensor,
        weight: Tensor,
        window: Tensor,
        moves_by_one: bool,
        **_: object,
    ) -> str | None:
        (seq, channels), taps, kept = x.shape[1:], weight.shape[1], window.shape[1]
        if target.facts.custom_conv != kind:
            return f"the target's custom_conv is {target.facts.custom_conv}"
        if taps != 4:
            return f"{taps} taps, the call takes 4"
        if channels % 16:
            return f"{channels} channels, the call takes multiples of 16"
        if not moves_by_one:
            return "a window may move by other than one input, the call moves it by one"
        if kept != taps - 2 + seq:
            return f"windows of {kept}: with {seq} tokens a row the call writes {taps - 2 + seq}"
        return _narrow("x", x) or _narrow("weight", weight) or _narrow("window", window)

    return guard


def _rows(target: Target, *, index: Tensor, **_: object) -> str | None:
    if index.ndim != 1 or index.dtype != torch.int64:
        return f"the index is {index.dtype} of {index.ndim} axes, must be int64 of one"
    return None


RULES = (
    *w8a8.RULES,
    Rule(
        "mixture",
        "linear",
        emit.mixture,
        "npu_moe_init_routing_v2, npu_grouped_matmul",
        _mixture,
        patterns.mixture,
    ),
    Rule(
        "mixture_apart",
        "linear",
        composed.mixture_apart,
        "npu_moe_init_routing_v2, npu_grouped_matmul",
        _mixture_apart,
        patterns.mixture,
    ),
    Rule(
        "mixture_held",
        "linear",
        ranks.mixture_held,
        "npu_moe_init_routing_v2, npu_grouped_matmul, all_reduce",
        _mixture_held,
        ranks.held_mixture,
    ),
    Rule(
        "experts_held",
        "experts",
        ranks.experts_held,
        "npu_moe_init_routing_v2, npu_grouped_matmul",
        _experts_held,
        ranks.held_experts,
    ),
    *dispatch.rules(False, "npu_grouped_matmul", _experts_sent),
    Rule("reduced", "all_reduce", collective.reduced, "HcclAllReduce"),
    Rule("gathered", "all_gather", collective.gathered, "HcclAllGather"),
    Rule("joined", "linear", emit.join, "matmul", _x, patterns.joined_linears),
    Rule("add_norm", "rms_norm", emit.add_norm, "npu_add_rms_norm", _add_norm, patterns.added_norm),
    Rule("norm", "rms_norm", emit.norm, "npu_rms_norm", _x),
    Rule("l2_pair", "l2_norm", emit.l2_pair, "npu_rms_norm", _x, patterns.stacked_norms),
    Rule("gated_norm", "gated_rms_norm", emit.gated_norm, "npu_rms_norm", _x),
    Rule(
        "conv_sgl",
        "short_conv",
        custom.conv_sgl,
        "causal_conv1d",
        _conv_of("sgl"),
        patterns.convolution,
    ),
    Rule(
        "conv_vllm",
        "short_conv",
        custom.conv_vllm,
        "npu_causal_conv1d_custom",
        _conv_of("vllm"),
        patterns.convolution,
    ),
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
    Rule("delta_scan", "delta_rule", composed_delta.delta_scan, "baddbmm, index_put_", _scan),
    Rule(
        "delta_theorem", "delta_rule", composed_delta.delta_theorem, "baddbmm, index_put_", _theorem
    ),
    Rule("rotary", "rotary", emit.rotary, "npu_mrope", _rotary, patterns.rotary),
    Rule(
        "rotary_composed",
        "rotary",
        composed.rotary,
        "cat, mul, addcmul",
        lambda target, *, query, **_: _narrow("query", query),
    ),
    Rule(
        "kv_write",
        "kv_write",
        emit.kv_write,
        "npu_scatter_pa_kv_cache",
        lambda target, *, key, key_pool, **_: _narrow("key", key) or _narrow("key_pool", key_pool),
    ),
    Rule(
        "attention_lengths",
        "attention",
        emit.attention_lengths,
        "npu_fused_infer_attention_score_v2",
        _attention_lengths,
        patterns.attention,
    ),
    Rule(
        "attention", "attention", emit.attention, "npu_fused_infer_attention_score_v2", _attention
    ),
    Rule(
        "attention_composed",
        "attention",
        composed.attention,
        "index_select, bmm, softmax",
        lambda target, *, query, key_pool, **_: (
            _narrow("query", query) or _narrow("key_pool", key_pool)
        ),
        patterns.attention,
    ),
    Rule("gumbel_composed", "gumbel", composed.gumbel, "bitwise_xor, mul, log"),
    Rule("rows_put", "index_put", emit.rows_put, "index_put_", _rows, patterns.written_rows),
    Rule("swiglu", "silu", emit.swiglu, "npu_swiglu", _x, patterns.gated_linear_unit),
)
PASSES = (bias.ride, plain.say_plainly)

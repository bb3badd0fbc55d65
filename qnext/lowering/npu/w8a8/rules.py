"""The rules of int8 sites, asked before the others, and the guards that say no."""

import torch
from torch import Tensor

from qnext.lowering.npu import dispatch, ranks
from qnext.lowering.npu.guards import other_width
from qnext.lowering.npu.w8a8 import emit, patterns
from qnext.lowering.rules import Rule
from qnext.lowering.target import Target

BF16 = torch.bfloat16


def _narrow(name: str, dtype: torch.dtype) -> str | None:
    word = str(dtype).removeprefix("torch.")
    return None if dtype == BF16 else f"{name} is {word}, the call wants bfloat16"


def _rounds(rounding: str, wanted: str) -> str | None:
    return None if rounding == wanted else f"rounding is {rounding!r}, the call's is {wanted!r}"


def _x(target: Target, *, x: Tensor, **_: object) -> str | None:
    return _narrow("x", x.dtype)


def _add_norm(
    target: Target, *, x: Tensor, residual: Tensor, rounding: str, **_: object
) -> str | None:
    if x.shape != residual.shape:
        return f"x is {list(x.shape)}, the residual {list(residual.shape)}"
    return (
        _rounds(rounding, "times") or _narrow("x", x.dtype) or _narrow("residual", residual.dtype)
    )


def _gated_norm(target: Target, *, x: Tensor, rounding: str, **_: object) -> str | None:
    return _rounds(rounding, "over") or _narrow("x", x.dtype)


def _products(target: Target, *, dtypes: set[torch.dtype], **_: object) -> str | None:
    return next((why for dtype in dtypes if (why := _narrow("the result", dtype))), None)


def _gated_product(target: Target, *, weight: Tensor, rounding: str, **_: object) -> str | None:
    return _rounds(rounding, "reciprocal") or _grouped(target, 1, *weight.shape)


def _grouped(target: Target, experts: int, n: int, k: int) -> str | None:
    """Limits of npu_grouped_matmul_swiglu_quant_v2."""
    facts = target.facts
    if experts > facts.grouped_experts:
        return f"{experts} experts, the call takes {facts.grouped_experts}"
    if n > facts.grouped_swiglu_columns:
        return f"{n} columns, the call takes {facts.grouped_swiglu_columns}"
    return None


def _experts(
    target: Target, *, x: Tensor, logits: Tensor, gate_up: Tensor, topk: int, **_: object
) -> str | None:
    return _chosen(target, x, gate_up, gate_up.shape[0], topk) or _narrow("logits", logits.dtype)


def _chosen(target: Target, x: Tensor, gate_up: Tensor, experts: int, topk: int) -> str | None:
    if topk > target.facts.routing_top_k:
        return f"top {topk}, the call takes {target.facts.routing_top_k}"
    return _grouped(target, experts, *gate_up.shape[1:]) or _narrow("x", x.dtype)


def _mixture(
    target: Target, *, x: Tensor, gate_up: Tensor, shared_gate_up: Tensor, topk: int, **_: object
) -> str | None:
    reason = other_width(shared_gate_up, gate_up)
    return reason or _chosen(target, x, gate_up, gate_up.shape[0] + 1, topk)


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
    return reason or _chosen(target, x, gate_up, groups, topk)


def _experts_held(
    target: Target, *, x: Tensor, logits: Tensor, gate_up: Tensor, topk: int, **_: object
) -> str | None:
    reason = _chosen(target, x, gate_up, gate_up.shape[0] + 1, topk)
    return reason or _narrow("logits", logits.dtype)


def _experts_sent(
    target: Target, *, x: Tensor, router: Tensor, gate_up: Tensor, topk: int, **given: object
) -> str | None:
    if "gate_up_scale" not in given:
        return "experts are no int8"
    reason = _chosen(target, x, gate_up, gate_up.shape[0] + 1, topk)
    return reason or _narrow("router", router.dtype)


GROUPED = "npu_grouped_matmul_swiglu_quant_v2"
RULES = (
    Rule(
        "int8_mixture",
        "linear",
        emit.mixture,
        f"npu_moe_init_routing_v2, {GROUPED}, npu_grouped_matmul",
        _mixture,
        patterns.mixture,
    ),
    Rule(
        "int8_experts",
        "int8_experts",
        emit.experts,
        f"npu_moe_init_routing_v2, {GROUPED}, npu_grouped_matmul",
        _experts,
        patterns.routed,
    ),
    Rule(
        "int8_mixture_held",
        "linear",
        emit.mixture_held,
        f"npu_moe_init_routing_v2, {GROUPED}, npu_grouped_matmul, all_reduce",
        _mixture_held,
        patterns.held_mixture,
    ),
    Rule(
        "int8_experts_held",
        "int8_experts",
        emit.experts_held,
        f"npu_moe_init_routing_v2, {GROUPED}, npu_grouped_matmul",
        _experts_held,
        ranks.held_experts,
    ),
    *dispatch.rules(True, GROUPED, _experts_sent),
    Rule(
        "add_norm_tokens",
        "rms_norm",
        emit.add_norm_tokens,
        "npu_add_rms_norm_dynamic_quant",
        _add_norm,
        patterns.normed_tokens,
    ),
    Rule(
        "gated_norm_tokens",
        "gated_rms_norm",
        emit.gated_norm_tokens,
        "npu_rms_norm, npu_dequant_swiglu_quant",
        _gated_norm,
        patterns.gated_tokens,
    ),
    Rule("tokens", "quantize_tokens", emit.tokens, "npu_dynamic_quant", _x),
    Rule(
        "gated_product",
        "int8_linear",
        emit.gated_product,
        GROUPED,
        _gated_product,
        patterns.gated_product,
    ),
    Rule(
        "gated_product_wide",
        "int8_linear",
        emit.gated_product_wide,
        "npu_quant_matmul, npu_dequant_swiglu_quant",
        match=patterns.gated_product,
    ),
    Rule(
        "products",
        "int8_linear",
        emit.products,
        "npu_quant_matmul",
        _products,
        patterns.products,
    ),
)

"""What the rules of int8 sites put in their place: torch_npu calls with packed weights."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from qnext.lowering.npu import calls, ranks
from qnext.lowering.npu.collective import all_reduce
from qnext.lowering.npu.w8a8 import calls as int8


def add_norm_tokens(
    *, x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, norm and tokens in one call; gamma must have the dtype of x: 1 + w rounds once more."""
    gamma = (1.0 + weight.float()).to(x.dtype)
    return int8.npu_add_rms_norm_dynamic_quant(x=x, residual=residual, gamma=gamma, eps=eps)


def gated_norm_tokens(
    *, x: Tensor, weight: Tensor, gate: Tensor, eps: float, rounding: str
) -> tuple[Tensor, Tensor]:
    """silu(gate) * norm is a swiglu of the two side by side, quantised before it is rounded."""
    normed = calls.npu_rms_norm(x=x, gamma=weight.float(), eps=eps)
    both = torch.cat([gate.flatten(-2), normed.flatten(-2)], dim=-1)
    return int8.npu_dequant_swiglu_quant(x=both)


def tokens(*, x: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    return int8.npu_dynamic_quant(x=x)


def products(
    *, x: Tensor, x_scale: Tensor, dtypes: object, **weights: Tensor
) -> tuple[Tensor, ...]:
    """Products of the same tokens as one, their weights and scales packed."""
    parts = [part for name, part in weights.items() if name.startswith("weight")]
    scale = torch.cat([part for name, part in weights.items() if name.startswith("scale")])
    together = int8.npu_quant_matmul(
        x=x.flatten(0, -2), x_scale=x_scale.flatten(), weight=nz(torch.cat(parts)), scale=scale
    )
    rows = together.view(*x.shape[:-1], scale.shape[0])
    return rows.split([part.shape[0] for part in parts], dim=-1)


def gated_product(
    *, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, rounding: str
) -> tuple[Tensor, Tensor]:
    """One group of the call of experts: product, swiglu and tokens in one launch."""
    rows = x.flatten(0, -2)
    count = torch.full((1,), rows.shape[0], dtype=torch.int64, device=x.device)
    q, q_scale = int8.npu_grouped_matmul_swiglu_quant(
        x=rows, x_scale=x_scale.flatten(), weight=nz(weight[None]), scale=scale[None], counts=count
    )
    return q.view(*x.shape[:-1], q.shape[-1]), q_scale.view(x_scale.shape)


def gated_product_wide(
    *, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, rounding: str
) -> tuple[Tensor, Tensor]:
    """Two launches for what is too wide for that call; the product rounds in between."""
    up = int8.npu_quant_matmul(
        x=x.flatten(0, -2), x_scale=x_scale.flatten(), weight=nz(weight), scale=scale
    )
    q, q_scale = int8.npu_dequant_swiglu_quant(x=up)
    return q.view(*x.shape[:-1], q.shape[-1]), q_scale.view(x_scale.shape)


def experts(
    *,
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    topk: int,
    renormalise: bool,
) -> Tensor:
    """Five launches, routing included."""
    weight, expert = calls.npu_gating(logits=logits, topk=topk, renormalise=renormalise)
    return _experts(x, weight, expert, gate_up, gate_up_scale, down, down_scale)


def mixture(
    *,
    x: Tensor,
    router: Tensor,
    shared_gate: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    shared_gate_up: Tensor,
    shared_gate_up_scale: Tensor,
    shared_down: Tensor,
    shared_down_scale: Tensor,
    topk: int,
    renormalise: bool,
) -> Tensor:
    """Nine launches: the shared expert is one more expert, always chosen, weighed by its gate."""
    count = router.shape[0]
    logits = linear(x, torch.cat([router, shared_gate]))
    weight, expert = calls.npu_gating(logits=logits[:, :count], topk=topk, renormalise=renormalise)
    always = torch.full((x.shape[0], 1), count, dtype=torch.int32, device=x.device)
    return _experts(
        x,
        torch.cat([weight, logits[:, count:].sigmoid()], dim=-1),
        torch.cat([expert, always], dim=-1),
        torch.cat([gate_up, shared_gate_up[None]]),
        torch.cat([gate_up_scale, shared_gate_up_scale[None]]),
        torch.cat([down, shared_down[None]]),
        torch.cat([down_scale, shared_down_scale[None]]),
    )


def _experts(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
) -> Tensor:
    """Four launches: tokens sorted by expert, both products, and each token's weighted sum."""
    rows, scale, where, counts = int8.npu_init_routing_quant(
        x=x, expert=expert, experts=gate_up.shape[0]
    )
    inner, inner_scale = int8.npu_grouped_matmul_swiglu_quant(
        x=rows, x_scale=scale, weight=nz(gate_up), scale=gate_up_scale, counts=counts
    )
    outer = int8.npu_grouped_matmul_quant(
        x=inner,
        x_scale=inner_scale,
        weight=nz(down),
        scale=down_scale.to(x.dtype),
        counts=counts,
    )
    return calls.npu_finalize_routing(rows=outer, weight=weight, where=where)


def nz(weight: Tensor) -> Tensor:
    """A weight [..., n, k] as the calls read it: [..., k, n] in the cube unit's order."""
    return int8.npu_format_cast(weight=weight.mT.contiguous())


def experts_held(
    *,
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    topk: int,
    renormalise: bool,
    first: int,
) -> Tensor:
    """Six launches, routing included; see `npu/ranks.py`."""
    weight, expert = calls.npu_gating(logits=logits, topk=topk, renormalise=renormalise)
    groups = ranks.sent(expert, logits.shape[1], first, gate_up.shape[0])
    return _held(x, weight, groups, gate_up, gate_up_scale, down, down_scale)


def mixture_held(
    *,
    x: Tensor,
    router: Tensor,
    shared_gate: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    shared_gate_up: Tensor,
    shared_gate_up_scale: Tensor,
    shared_down: Tensor,
    shared_down_scale: Tensor,
    topk: int,
    renormalise: bool,
    first: int,
    group: str,
    size: int,
) -> Tensor:
    """Ten launches and a collective; seven where the shared expert is another rank's."""
    own = gate_up.shape[0]
    weight, groups = ranks.chosen(x, router, shared_gate, own, topk, renormalise, first)
    if first == 0:
        gate_up = torch.cat([gate_up, shared_gate_up[None]])
        gate_up_scale = torch.cat([gate_up_scale, shared_gate_up_scale[None]])
        down = torch.cat([down, shared_down[None]])
        down_scale = torch.cat([down_scale, shared_down_scale[None]])
    part = _held(x, weight, groups, gate_up, gate_up_scale, down, down_scale)
    return all_reduce(x=part, group=group, size=size)


def _held(
    x: Tensor,
    weight: Tensor,
    groups: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
) -> Tensor:
    """`_experts` with one more, whose results are zero."""
    up, out = ranks.with_nobody(gate_up, down)
    up_scale, out_scale = (torch.cat([each, each[:1]]) for each in (gate_up_scale, down_scale))
    return _experts(x, weight, groups, up, up_scale, out, out_scale)

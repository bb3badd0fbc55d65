"""W8A8 (op-plugin npu_dynamic_quant, npu_quant_matmul, npu_add_rms_norm_dynamic_quant, ...).

Three roundings exist and are kept apart: times 127/max, over max/127, times 1/(max/127).
"""

from typing import Any

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import kernel, need, need_absent, need_dtype, need_shape, poison
from qnext.lowering.softnpu.kernels.elementwise import write
from qnext.lowering.softnpu.kernels.matmul import groups
from qnext.lowering.softnpu.kernels.norm import rsqrt_mean

LOW = (torch.bfloat16, torch.float16)


def most(rows: Tensor) -> Tensor:
    """The largest magnitude of a row. Of zeros it is 0, and so is the scale in all three ways."""
    return rows.abs().amax(-1)


def int8(values: Tensor) -> Tensor:
    """Rounded and clamped; what comes of 0 / 0 the pages do not say: a number far out."""
    undefined = values.isnan()
    return values.nan_to_num().round().clamp(-128, 127).to(torch.int8).masked_fill(undefined, 91)


def per_token(rows: Tensor) -> tuple[Tensor, Tensor]:
    """npu_dynamic_quant's: q = rint(x * (127 / max)), scale = 1 / (127 / max)."""
    peak = most(rows)
    inverse = torch.full_like(peak, 127.0) / peak  # 127.0 / peak is two roundings in torch
    return int8(rows * inverse[..., None]), 1 / inverse


def dynamic_check(x: Tensor, smooth: Tensor | None, *rest: Any) -> None:
    need_dtype("x", x, *LOW)
    if smooth is not None:
        need_dtype("smooth_scales", smooth, x.dtype)
        need_shape("smooth_scales", smooth, x.shape[-1])


def dynamic(x: Tensor, smooth: Tensor | None, y: Tensor, scale: Tensor) -> None:
    values, scales = per_token(x.float() * (smooth.float() if smooth is not None else 1.0))
    write(y, values)
    write(scale, scales)


kernel("aclnnDynamicQuant", "tttt", dynamic_check)(dynamic)
kernel("aclnnDynamicQuantV2", "tttittt", dynamic_check)(
    lambda x, smooth, group, dtype, y, scale, offset: dynamic(x, smooth, y, scale)
)
kernel("aclnnDynamicQuantV3", "tttibsttt", dynamic_check)(
    lambda x, smooth, group, dtype, even, mode, y, scale, offset: dynamic(x, smooth, y, scale)
)
kernel("aclnnDynamicQuantV4", "tttibsdttt", dynamic_check)(
    lambda x, smooth, group, dtype, even, mode, top, y, scale, offset: dynamic(x, smooth, y, scale)
)


def add_norm_check(
    x1: Tensor, x2: Tensor, gamma: Tensor, smooth1: Tensor | None, smooth2: Tensor | None,
    beta: Tensor | None, epsilon: float, mask: list[bool] | None, *outs: Tensor,
) -> None:  # fmt: skip
    need_dtype("x1", x1, *LOW)
    need_shape("x2", x2, *x1.shape)
    need_dtype("x2", x2, x1.dtype)
    need_dtype("gamma", gamma, x1.dtype)
    need_shape("gamma", gamma, x1.shape[-1])
    need_absent(smooth_scale2=smooth2)
    need(mask is None or mask == [True, False], "output_mask must be [True, False]", mask)


@kernel("aclnnAddRmsNormDynamicQuantV2", "ttttttdBttttt", add_norm_check)
def add_norm_quant(
    x1: Tensor, x2: Tensor, gamma: Tensor, smooth: Tensor | None, smooth2: Any,
    beta: Tensor | None, epsilon: float, mask: list[bool] | None,
    y1: Tensor, y2: Tensor, x: Tensor, scale1: Tensor, scale2: Tensor,
) -> None:  # fmt: skip
    """The normed sum is quantised unrounded."""
    total = x1.float() + x2.float()
    write(x, total)
    y = total * rsqrt_mean(total, epsilon) * gamma.float()
    y = y if beta is None else y + beta.float()
    values, scales = per_token(y if smooth is None else y * smooth.float())
    write(y1, values)
    write(scale1, scales)


def matmul_check(
    a: Tensor, b: Tensor, row_scale: Tensor | None, scale: Tensor, y_scale: Any, offset1: Any,
    offset2: Any, offset3: Any, bias: Tensor | None, ta: bool, tb: bool, group: int, out: Tensor,
) -> None:  # fmt: skip
    need_dtype("x1", a, torch.int8)
    need_dtype("x2", b, torch.int8)
    need(a.dim() == b.dim() == 2 and not ta, "x1 and x2 must be matrices", (a.dim(), b.dim()))
    k, n = (b.shape[1], b.shape[0]) if tb else (b.shape[0], b.shape[1])
    need(a.shape[1] == k, "the inner axes must agree", (list(a.shape), list(b.shape)))
    need_absent(y_scale=y_scale, x1_offset=offset1, x2_offset=offset2, y_offset=offset3)
    need_dtype("scale", scale, torch.float32, torch.bfloat16)
    need(scale.numel() in (1, n), f"scale must be [{n}]", list(scale.shape))
    need(row_scale is not None, "pertoken_scale must be given here", row_scale)
    if row_scale is not None:
        need_dtype("pertoken_scale", row_scale, torch.float32)
        need_shape("pertoken_scale", row_scale, a.shape[0])


@kernel("aclnnQuantMatmulV5", "tttttttttbbit", matmul_check)
def quant_matmul(
    a: Tensor, b: Tensor, row_scale: Tensor, scale: Tensor, y_scale: Any, offset1: Any,
    offset2: Any, offset3: Any, bias: Tensor | None, ta: bool, tb: bool, group: int, out: Tensor,
) -> None:  # fmt: skip
    """R(int32 sum * scale * pertoken + bias); an int32 bias joins the sum."""
    total = a.double() @ (b.t() if tb else b).double()  # exact
    if bias is not None and bias.dtype == torch.int32:
        total = total + bias
    y = total.float() * scale.float() * row_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        y = y + bias.float()
    write(out, y)


kernel("aclnnQuantMatmulWeightNz", "tttttttttbbit", matmul_check)(quant_matmul)


def swiglu_check(
    x: Tensor, weight_scale: Tensor | None, act_scale: Tensor | None, bias: Any,
    quant_scale: Tensor | None, offset: Any, group: Any, left: bool, quant_mode: str, *rest: Any,
) -> None:  # fmt: skip
    need_dtype("x", x, *LOW, torch.int32)
    need(x.shape[-1] % 2 == 0, "the last axis must be even", x.shape[-1])
    need_absent(bias=bias, quant_offset=offset, group_index=group)
    need(quant_mode == "dynamic", "quant_mode must be 1 (dynamic), not the default", quant_mode)
    good = (x.dtype == torch.int32) == (weight_scale is not None)
    need(good, "int32 x needs weight_scale, others must not have it", x.dtype)


@kernel("aclnnDequantSwigluQuantV2", "tttttttbsisiidddtt", swiglu_check)
def dequant_swiglu_quant(
    x: Tensor, weight_scale: Tensor | None, act_scale: Tensor | None, bias: Any,
    quant_scale: Tensor | None, offset: Any, group: Any, left: bool, quant_mode: str,
    dtype: int, round_mode: str, dim: int, mode: int, limit: float, alpha: float, glu_bias: float,
    y: Tensor, scale: Tensor,
) -> None:  # fmt: skip
    """The activated half is the right one unless activate_left; a true division by the scale."""
    values = x.float()
    for factor in (weight_scale, None if act_scale is None else act_scale.reshape(-1, 1)):
        values = values if factor is None else values * factor.float()
    a, b = values.chunk(2, -1)
    a, b = (a, b) if left else (b, a)
    result = a / (1 + torch.exp(-a)) * b
    result = result if quant_scale is None else result * quant_scale.float()
    scales = most(result) * (1.0 / 127.0)
    write(y, int8(result / scales[..., None]))
    write(scale, scales)


def grouped_check(
    x: Tensor, weight: list[Tensor], weight_scale: list[Tensor], assist: Any, bias: Any,
    x_scale: Tensor, smooth: Any, list_: Tensor, dequant_mode: int, dequant_dtype: int,
    quant_mode: int, list_kind: int, tuning: Any, out: Tensor, scale: Tensor,
) -> None:  # fmt: skip
    """op-plugin npu_grouped_matmul_swiglu_quant_v2."""
    need_dtype("x", x, torch.int8)
    need(len(weight) == len(weight_scale) == 1, "one weight and one scale", len(weight))
    w = weight[0]
    need_dtype("weight", w, torch.int8)
    need(w.dim() == 3 and w.shape[1] == x.shape[1], "weight must be [e, k, n]", list(w.shape))
    experts, k, n = w.shape
    need(experts <= 1024 and n <= 10240 and k < 65536, "e, n and k have limits", list(w.shape))
    need_absent(bias=bias, smooth_scale=smooth, weight_assist_matrix=assist)
    need_shape("weight_scale", weight_scale[0], experts, n)
    need_dtype("x_scale", x_scale, torch.float32)
    need_shape("x_scale", x_scale, x.shape[0])
    need_dtype("group_list", list_, torch.int64)
    need(list_kind in (0, 1), "group_list_type must be 0 or 1", list_kind)


def grouped_swiglu_quant(
    x: Tensor, weight: list[Tensor], weight_scale: list[Tensor], assist: Any, bias: Any,
    x_scale: Tensor, smooth: Any, list_: Tensor, dequant_mode: int, dequant_dtype: int,
    quant_mode: int, list_kind: int, tuning: Any, out: Tensor, scale: Tensor,
) -> None:  # fmt: skip
    """scale = max / 127, q = rint(r * (1 / scale)); rows beyond the groups are undefined."""
    spans = groups(list_, list_kind, x.shape[0], weight[0].shape[0])
    poison(out, scale)
    for expert, (start, end) in enumerate(spans):
        if start == end:
            continue
        total = (x[start:end].double() @ weight[0][expert].double()).float()
        a, b = (total * x_scale[start:end, None] * weight_scale[0][expert].float()).chunk(2, -1)
        result = a / (1 + torch.exp(-a)) * b
        scales = most(result) / 127.0
        scale[start:end] = scales
        out[start:end] = int8(result * (1 / scales)[:, None])


kernel("aclnnGroupedMatmulSwigluQuantWeightNzV2", "tLLLttttiiiiItt", grouped_check)(
    grouped_swiglu_quant
)

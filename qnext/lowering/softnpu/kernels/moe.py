"""Routing, sorting and combining of a mixture of experts; swiglu (op-plugin npu_moe_*)."""

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import kernel, need, need_absent, need_dtype, need_shape, poison
from qnext.lowering.softnpu.kernels.elementwise import write
from qnext.lowering.softnpu.kernels.index import need_range
from qnext.lowering.softnpu.kernels.quant import per_token

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def gating_check(
    x: Tensor, finished: object, k: int, renorm: int, softmax_out: bool, y: Tensor, index: Tensor,
    probabilities: Tensor,
) -> None:  # fmt: skip
    need_dtype("x", x, *FLOATS)
    need(x.dim() == 2, "x must be [t, experts] here", list(x.shape))
    need_absent(finished=finished)
    need(1 <= k <= min(x.shape[1], 1024), f"k must be 1..{min(x.shape[1], 1024)}", k)
    need(renorm in (0, 1), "renorm must be 0 or 1", renorm)
    need(not (renorm and softmax_out), "output_softmax needs renorm 0", softmax_out)


@kernel("aclnnMoeGatingTopKSoftmaxV2", "ttiibttt", gating_check)
def gating(
    x: Tensor, finished: object, k: int, renorm: int, softmax_out: bool, y: Tensor, index: Tensor,
    probabilities: Tensor,
) -> None:  # fmt: skip
    """Top k of the logits and their softmax, or top k of the softmax; lower index first."""
    scores = x.float() if renorm else torch.softmax(x.float(), -1)
    found = torch.sort(scores, dim=-1, descending=True, stable=True)
    value = found.values[:, :k]
    write(y, torch.softmax(value, -1) if renorm else value)
    write(index, found.indices[:, :k])
    if softmax_out:
        write(probabilities, scores)


def init_check(
    x: Tensor, experts: Tensor, scale: Tensor | None, offset: object, active: int, capacity: int,
    count: int, drop: int, kind: int, flag: bool, quant: int, span: list[int] | None, order: int,
    *outs: Tensor,
) -> None:  # fmt: skip
    need_dtype("x", x, *FLOATS)
    need_dtype("expert_idx", experts, torch.int32)
    need(x.dim() == experts.dim() == 2, "x is [t, h], expert_idx [t, k]", (x.dim(), experts.dim()))
    need(x.shape[0] == experts.shape[0], "a row of experts a token", list(experts.shape))
    need_absent(offset=offset)
    need(1 <= count <= 10240, "expert_num must be 1..10240", count)
    need(drop == 0, "drop_pad_mode must be 0", drop)
    need(active in (-1, 0, experts.numel()), "active_num must take every row", active)
    need(kind in (0, 1), "expert_tokens_num_type must be 0 or 1", kind)
    need(quant in (-1, 1), "quant_mode must be -1 or 1", quant)
    need(order in (0, 1), "row_idx_type must be 0 or 1", order)
    good = span is not None and len(span) == 2 and 0 <= span[0] < span[1] <= count
    need(good, f"active_expert_range must be a span of 0..{count}", span)


@kernel("aclnnMoeInitRoutingV3", "ttttiiiiibiIitttt", init_check)
def init_routing(
    x: Tensor, experts: Tensor, scale: Tensor | None, offset: object, active: int, capacity: int,
    count: int, drop: int, kind: int, flag: bool, quant: int, span: list[int], order: int,
    rows: Tensor, places: Tensor, counts: Tensor, scales: Tensor,
) -> None:  # fmt: skip
    """Rows sorted by expert, stable. Those of experts outside the range are undefined."""
    need_range("expert_idx", experts, count)
    flat, k = experts.reshape(-1).long(), experts.shape[1]
    inside = (flat >= span[0]) & (flat < span[1])
    sorted_ = torch.argsort(torch.where(inside, flat, count), stable=True)
    used = int(inside.sum())
    source = x[sorted_[:used] // k]
    poison(rows)
    if quant == 1:
        poison(scales)
        smooth = scale.float() if scale is not None else 1.0
        rows[:used], scales[:used] = per_token(source.float() * smooth)
    else:
        rows[:used] = source
    position = torch.full_like(sorted_, -1)  # of what no expert here takes
    position[sorted_[:used]] = torch.arange(used)
    if order == 0:
        write(places, position)
    else:
        poison(places)
        places[:used] = sorted_[:used]
    if flag:
        each = torch.bincount(flat, minlength=count)[span[0] : span[1]]
        write(counts, each.cumsum(0) if kind == 0 else each)


def finalize_check(
    rows: Tensor, places: Tensor, skip1: Tensor | None, skip2: Tensor | None,
    bias: Tensor | None, scales: Tensor | None, experts: Tensor | None, mode: int, out: Tensor,
) -> None:  # fmt: skip
    need_dtype("expanded_permuted_rows", rows, *FLOATS)
    need_dtype("expanded_src_to_dst_row", places, torch.int32)
    need(mode == 2, "drop_pad_mode must be 2, places by token, here", mode)
    need_absent(bias=bias, export_for_source_row=experts)
    need(scales is not None, "scales must be given", scales)
    if scales is not None:
        need_dtype("scales", scales, rows.dtype)
        need(scales.numel() == places.numel(), "a scale a place", list(scales.shape))
    for name, skip in (("skip1", skip1), ("skip2", skip2)):
        if skip is not None:
            need_dtype(name, skip, rows.dtype)
            need_shape(name, skip, *out.shape)
    need(skip2 is None or skip1 is not None, "skip2 needs skip1", skip2)


@kernel("aclnnMoeFinalizeRoutingV2", "tttttttit", finalize_check)
def finalize(
    rows: Tensor, places: Tensor, skip1: Tensor | None, skip2: Tensor | None,
    bias: object, scales: Tensor, experts: None, mode: int, out: Tensor,
) -> None:  # fmt: skip
    """R(skips + sum_j rows[place_j] * scale_j), in float32 and in order."""
    need_range("expanded_src_to_dst_row", places, rows.shape[0])
    place = places.long().reshape(out.shape[0], -1)
    total = torch.zeros(out.shape)
    for skip in (skip1, skip2):
        total = total if skip is None else total + skip.float()
    for j in range(place.shape[1]):
        total = total + rows[place[:, j]].float() * scales[:, j, None].float()
    write(out, total)


def newer(function: object) -> object:
    """V4 has eleven arguments more, all of kinds of experts that this model has not."""

    def call(*values: object) -> None:
        *seven, a, b, c, d, mode, e, f, g, _k, out = values
        need_absent(zero_experts=a, copy_experts=b, constant_experts=c, alpha=d)
        need_absent(zero=e or None, copy=f or None, constant=g or None)
        function(*seven, mode, out)  # type: ignore[operator]

    return call


kernel("aclnnMoeFinalizeRoutingV4", "ttttttttttt" + "iIIIi" + "t", newer(finalize_check))(  # type: ignore[arg-type]
    newer(finalize)  # type: ignore[arg-type]
)


def swiglu_check(x: Tensor, dim: int, out: Tensor) -> None:
    need_dtype("self", x, *FLOATS)
    need(x.shape[dim] % 2 == 0, "the split axis must be even", x.shape[dim])


@kernel("aclnnSwiGlu", "tit", swiglu_check)
def swiglu(x: Tensor, dim: int, out: Tensor) -> None:
    """R(a / (1 + exp(-a)) * b) of the halves."""
    a, b = x.float().chunk(2, dim)
    write(out, a / (1 + torch.exp(-a)) * b)

"""Dense attention as torch's own scaled_dot_product_attention takes it (npu_fusion_attention)."""

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import kernel, need, need_absent, need_dtype, need_shape, poison
from qnext.lowering.softnpu.kernels.elementwise import write

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MASKS = (torch.bool, torch.uint8)


def check(
    q: Tensor, k: Tensor, v: Tensor, shift: object, drop: object, padding: object,
    mask: Tensor | None, prefix: list[int] | None, scale: float, keep: float, before: int,
    after: int, heads: int, layout: str, precise: int, sparse: int, *outs: Tensor,
) -> None:  # fmt: skip
    need(layout == "BNSD", "input_layout must be BNSD here", layout)
    need_absent(real_shift=shift, drop_mask=drop, padding_mask=padding, prefix=prefix)
    need(keep == 1.0, "keep_prob must be 1", keep)
    need(sparse in (0, 1), "sparse_mode must be 0 or 1 here", sparse)
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        need_dtype(name, tensor, *FLOATS)
        need(tensor.dtype == q.dtype, f"{name} must be of query's dtype", tensor.dtype)
        need(tensor.dim() == 4, f"{name} must be [b, n, s, d]", list(tensor.shape))
    need(q.shape[1] == heads, f"query must have {heads} heads", list(q.shape))
    need(heads % k.shape[1] == 0, "query heads must be a multiple of key heads", k.shape[1])
    need_shape("value", v, *k.shape[:3], v.shape[3])
    if mask is not None:
        need_dtype("atten_mask", mask, *MASKS)
        square = [q.shape[2], k.shape[2]]
        need(list(mask.shape[-2:]) == square, f"atten_mask must end in {square}", mask.shape)


@kernel("aclnnFlashAttentionScore", "ttttttt" + "I" + "ddiiisii" + "tttt", check)
def attention(
    q: Tensor, k: Tensor, v: Tensor, shift: object, drop: object, padding: object,
    mask: Tensor | None, prefix: list[int] | None, scale: float, keep: float, before: int,
    after: int, heads: int, layout: str, precise: int, sparse: int, most: Tensor, total: Tensor,
    soft: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """R(softmax(q k^T * scale) v), masked where the mask is 1; a row that sees nothing is NaN."""
    share = heads // k.shape[1]
    key, value = (x.float().repeat_interleave(share, 1) for x in (k, v))
    scores = q.float() @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(mask.bool(), -torch.inf)
    poison(soft)
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - peak).exp()
    sums = weights.sum(-1, keepdim=True)
    most.copy_(peak.expand_as(most))
    total.copy_(sums.expand_as(total))
    write(out, (weights.to(q.dtype).float() @ value / sums).to(out.dtype))

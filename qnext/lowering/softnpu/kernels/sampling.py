"""Filters of the logits (op-plugin npu_top_k_top_p)."""

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import kernel, need, need_dtype, need_shape
from qnext.lowering.softnpu.kernels.elementwise import write


def check(logits: Tensor, p: Tensor | None, k: Tensor | None, out: Tensor) -> None:
    need_dtype("logits", logits, torch.float32, torch.float16, torch.bfloat16)
    need(logits.dim() == 2, "logits must be [b, v]", list(logits.shape))
    need(p is not None and k is not None, "p and k must both be given", (p, k))
    if p is not None and k is not None:
        need_dtype("p", p, logits.dtype)
        need_dtype("k", k, torch.int32)
        need_shape("p", p, logits.shape[0])
        need_shape("k", k, logits.shape[0])


@kernel("aclnnApplyTopKTopP", "tttt", check)
def top_k_top_p(logits: Tensor, p: Tensor, k: Tensor, out: Tensor) -> None:
    """Ties with the k-th survive; then the smallest are dropped while they sum to at most 1 - p."""
    need(((k >= 1) & (k <= 1024)).all(), "k must be 1..1024", k.tolist())
    need(((p >= 0) & (p <= 1)).all(), "p must be in 0..1", p.tolist())
    values, order = logits.float().sort(dim=-1, stable=True)
    last = values.gather(1, values.shape[1] - k.long().clamp(max=values.shape[1])[:, None])
    values = values.masked_fill(values < last, -torch.inf)
    dropped = values.softmax(-1).cumsum(-1) <= 1 - p.float()[:, None]
    dropped[:, -1] = False
    values = values.masked_fill(dropped, -torch.inf)
    write(out, torch.zeros_like(values).scatter(1, order, values))

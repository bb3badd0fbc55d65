"""The short causal convolution of a delta-net layer, carrying its window between calls."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import SUMS, randn, wide


def _samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    for seq, start in ((5, [5, 3]), (1, [1, 0])):
        yield {
            "x": randn(g, 2, seq, 11),
            "weight": randn(g, 11, 4),
            "window": randn(g, 7, 6, 11),  # width - 1 = 3 inputs, and 3 more for drafts
            "rows": torch.tensor([4, 2], dtype=torch.int32),
            "offset": torch.tensor([0, 2], dtype=torch.int32),
            "start": torch.tensor(start, dtype=torch.int32),
        }


@primitive(
    shapes=lambda *, x, window, **_: (torch.empty_like(x), torch.empty_like(window)),
    flops=lambda *, x, weight, **_: x.numel() * (2 * weight.shape[1] + 4),
    bytes=lambda *, x, weight, window, rows, **_: (
        2 * x.nbytes + weight.nbytes + 2 * rows.numel() * window[0].numel() * window.itemsize
    ),
    tolerance=SUMS,
    samples=_samples,
)
def short_conv(
    *,
    x: Float[Tensor, "batch seq conv"],
    weight: Float[Tensor, "conv width"],
    window: Float[Tensor, "rows window conv"],
    rows: Int[Tensor, " batch"],
    offset: Int[Tensor, " batch"],
    start: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch seq conv"], Float[Tensor, "rows window conv"]]:
    """silu of a depthwise causal convolution, no bias; returns (y, the windows after the call).

    The inputs of a sequence are `window[rows, offset : offset + width - 1]` followed by x. Its new
    window row begins at input `start` of that line (the number of valid tokens: exactly the last
    width - 1 inputs come first; 1: every window a draft may be cut back to). Zeros past the end.
    """
    taps, seq = weight.shape[1], x.shape[1]
    past = offset[:, None].long() + torch.arange(taps - 1, device=x.device)
    line = torch.cat([window[rows[:, None].long(), past].to(x.dtype), x], dim=1)
    inputs, taps_first = wide(line), wide(weight).mT.contiguous()
    y = inputs[:, :seq] * taps_first[0]
    for tap in range(1, taps):  # in tap order: the order of the sum is part of the definition
        y = torch.addcmul(y, inputs[:, tap : tap + seq], taps_first[tap])
    y = torch.nn.functional.silu(y).to(x.dtype)

    keep = start[:, None].long() + torch.arange(window.shape[1], device=x.device)
    inside = keep < line.shape[1]
    kept = line.take_along_dim((keep * inside)[..., None], dim=1).where(inside[..., None], 0)
    return y, window.index_put((rows.long(),), kept.to(window.dtype))

"""Rotary position embedding on the leading channels of each head (arXiv:2104.09864)."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import ROUNDS_ONCE, randn, wide


def _samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    yield {
        "query": randn(g, 2, 5, 6, 14),
        "key": randn(g, 2, 5, 3, 14),
        "position": torch.randint(0, 1000, (2, 5), generator=g),
        "frequency": torch.rand(4, generator=g),
        "factor": 1.0,
    }


@primitive(
    shapes=lambda *, query, key, **_: (torch.empty_like(query), torch.empty_like(key)),
    flops=lambda *, query, key, frequency, **_: (
        6 * frequency.numel() * (query.numel() + key.numel()) // query.shape[-1]
    ),
    tolerance=ROUNDS_ONCE,
    samples=_samples,
)
def rotary(
    *,
    query: Float[Tensor, "batch seq hq hd"],
    key: Float[Tensor, "batch seq hkv hd"],
    position: Int[Tensor, "batch seq"],
    frequency: Float[Tensor, " pairs"],
    factor: float,
) -> tuple[Float[Tensor, "batch seq hq hd"], Float[Tensor, "batch seq hkv hd"]]:
    """Turn channel pairs (i, i + pairs) by position * frequency[i]; the rest passes through.

    `factor` scales the turned channels (YaRN's attention factor).
    """
    angle = position[..., None, None].to(frequency.dtype) * frequency
    cos, sin = angle.cos() * factor, angle.sin() * factor
    pairs = frequency.shape[0]

    def turn(x: Tensor) -> Tensor:
        a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
        a, b = wide(a), wide(b)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([turned.to(x.dtype), rest], dim=-1)

    return turn(query), turn(key)

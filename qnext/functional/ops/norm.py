"""Normalisations. All compute in float32 (or float64) and round once at the end."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import NORMS, ROUNDS_ONCE, randn, wide


def _like_x(x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(x)


def _rms_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    for shape in ((2, 5, 7), (3, 11)):
        yield {"x": randn(g, *shape), "weight": randn(g, shape[-1]) * 0.1, "eps": 1e-6}


@primitive(
    shapes=_like_x,
    flops=lambda *, x, **_: 4 * x.numel(),
    tolerance=NORMS,
    samples=_rms_samples,
)
def rms_norm(
    *, x: Float[Tensor, "*batch d"], weight: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*batch d"]:
    """Zero-centred RMS norm: x / sqrt(mean(x^2) + eps) * (1 + weight) (Gemma's form)."""
    f = wide(x)
    scale = torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    return (f * scale * (1.0 + weight.to(f.dtype))).to(x.dtype)


def _gated_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    yield {
        "x": randn(g, 2, 5, 3, 7),
        "weight": 1 + randn(g, 7) * 0.1,
        "gate": randn(g, 2, 5, 3, 7),
        "eps": 1e-6,
    }


@primitive(
    shapes=_like_x,
    flops=lambda *, x, **_: 9 * x.numel(),
    tolerance=NORMS,
    samples=_gated_samples,
)
def gated_rms_norm(
    *,
    x: Float[Tensor, "*batch dv"],
    weight: Float[Tensor, " dv"],
    gate: Float[Tensor, "*batch dv"],
    eps: float,
) -> Float[Tensor, "*batch dv"]:
    """x / sqrt(mean(x^2) + eps) * weight * silu(gate): norm first, plain weight, then the gate."""
    f = wide(x)
    scale = torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    silu = torch.nn.functional.silu(gate.to(f.dtype))
    return (f * scale * weight.to(f.dtype) * silu).to(x.dtype)


def _l2_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    for size in (1.0, 1e-3, 1e-6):  # eps sits inside the root: tiny vectors shrink, not explode
        yield {"x": randn(g, 2, 5, 3, 7) * size, "eps": 1e-6}


@primitive(
    shapes=_like_x,
    flops=lambda *, x, **_: 3 * x.numel(),
    tolerance=ROUNDS_ONCE,
    samples=_l2_samples,
)
def l2_norm(*, x: Float[Tensor, "*batch dk"], eps: float) -> Float[Tensor, "*batch dk"]:
    """x / sqrt(sum(x^2) + eps)."""
    f = wide(x)
    return (f * torch.rsqrt(f.square().sum(-1, keepdim=True) + eps)).to(x.dtype)

"""W8A8: activations in int8 with a scale for each token, times weights in int8 with a scale a row.

    x ~ q * scale,   max |q| = 127,   y = (q w^T) * scale of the token * scale of the row

In this order: the fused call of experts multiplies so before it rounds to int8 again. (The plain
one multiplies by the row's scale first, which the rounding of its result to bfloat16 swallows.)

Integers are summed exactly. A token of zeros has integers 0 and scale 0; one below 1e-36, whose
inverse would be infinite, is rounded as if its largest were that.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn.functional import linear

from qnext.functional.ops.moe import expert_bytes, grouped, swiglu
from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import ROUNDS_ONCE, SUMS, randn, wide

LARGEST = 127  # -128 is never made, so that the range is symmetric
# Three ways to round to it; they differ in the last bit of a scale, and now and then by one in an
# integer. Each fused call has its own, so each place of the model names the one it is defined by.
TIMES = "times"  # q = rint(x * (127 / max)),   scale = 1 / (127 / max)
OVER = "over"  # q = rint(x / scale),         scale = max * (1 / 127)
RECIPROCAL = "reciprocal"  # q = rint(x * (1 / scale)),   scale = max / 127
EXACT_SUMS = 1024  # so many products of two int8 stay within 2^24, where float32 is exact


def _token_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    for rounding in (TIMES, OVER, RECIPROCAL):
        x = randn(g, 2, 5, 7) * torch.tensor([1e-4, 1.0, 30.0, 0.0, 1e3])[:, None]
        yield {"x": x, "rounding": rounding}


def _token_shapes(*, x: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    scale = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=scale)


@primitive(
    shapes=_token_shapes,
    flops=lambda *, x, **_: 4 * x.numel(),
    tolerance=ROUNDS_ONCE,  # of the scale; integers are equal
    samples=_token_samples,
)
def quantize_tokens(
    *, x: Float[Tensor, "*batch d"], rounding: str
) -> tuple[Int8[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
    """Integers and scale of each token, by one of the three ways above."""
    f = wide(x)
    peak = f.abs().amax(-1, keepdim=True)
    zero, peak = peak == 0, peak.clamp(min=2 * LARGEST / torch.finfo(f.dtype).max)
    if rounding == TIMES:  # one division: number / tensor would be 127 * (1 / max), rounded twice
        inverse = torch.full_like(peak, LARGEST) / peak
        scaled, scale = f * inverse, 1 / inverse
    elif rounding == OVER:
        scale = peak * (1 / LARGEST)
        scaled = f / scale
    elif rounding == RECIPROCAL:
        scale = peak / LARGEST
        scaled = f * (1 / scale)
    else:
        raise ValueError(f"rounding must be {TIMES}, {OVER} or {RECIPROCAL}, got {rounding!r}")
    q = scaled.detach().round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return q, scale.masked_fill(zero, 0).squeeze(-1)


def _int8(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-LARGEST, LARGEST + 1, shape, generator=g, dtype=torch.int8)


def _linear_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    for tokens, columns in ((5, 7), (3, 2 * EXACT_SUMS + 11)):
        yield {
            "x": _int8(g, 2, tokens, columns),
            "x_scale": torch.rand(2, tokens, generator=g),
            "weight": _int8(g, 13, columns),
            "scale": torch.rand(13, generator=g),
        }


@primitive(
    shapes=lambda *, x, weight, scale, **_: scale.new_empty(*x.shape[:-1], weight.shape[0]),
    flops=lambda *, x, weight, **_: 2 * x.numel() * weight.shape[0],
    tolerance=ROUNDS_ONCE,
    samples=_linear_samples,
)
def int8_linear(
    *,
    x: Int8[Tensor, "*batch columns"],
    x_scale: Float[Tensor, "*batch"],
    weight: Int8[Tensor, "rows columns"],
    scale: Float[Tensor, " rows"],
) -> Float[Tensor, "*batch rows"]:
    """x weight^T as real numbers: the exact sum of integers, times x_scale, times scale."""
    return _sums(x, weight).to(scale.dtype) * x_scale[..., None] * scale


def _sums(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in int32."""
    runs = zip(x.split(EXACT_SUMS, -1), weight.split(EXACT_SUMS, -1), strict=True)
    products = [linear(a.float(), w.float()).int() for a, w in runs]
    return torch.stack(products).sum(0, dtype=torch.int32)


def _expert_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    for tokens in (13, 1):
        yield {
            "x": randn(g, tokens, 7),
            "expert": torch.rand(tokens, 5, generator=g).argsort(-1)[:, :2],
            "weight": torch.rand(tokens, 2, generator=g),
            "gate_up": _int8(g, 5, 6, 7),
            "gate_up_scale": torch.rand(5, 6, generator=g) / LARGEST,
            "down": _int8(g, 5, 7, 3),
            "down_scale": torch.rand(5, 7, generator=g) / LARGEST,
        }


@primitive(
    shapes=lambda *, x, **_: torch.empty_like(x),
    flops=lambda *, expert, gate_up, down, **_: (
        2 * expert.numel() * (gate_up[0].numel() + down[0].numel())
    ),
    bytes=expert_bytes,
    tolerance=SUMS,
    samples=_expert_samples,
)
def int8_experts(
    *,
    x: Float[Tensor, "tokens d"],
    expert: Int[Tensor, "tokens topk"],
    weight: Float[Tensor, "tokens topk"],
    gate_up: Int8[Tensor, "experts two_ffn d"],
    gate_up_scale: Float[Tensor, "experts two_ffn"],
    down: Int8[Tensor, "experts d ffn"],
    down_scale: Float[Tensor, "experts d"],
) -> Float[Tensor, "tokens d"]:
    """`experts` with int8 weights; between an expert's two products nothing rounds but to int8."""
    order, counts = grouped(expert, gate_up.shape[0])
    token = order // expert.shape[1]
    q, scale = quantize_tokens(x=x, rounding=TIMES)
    groups = zip(q[token].split(counts), scale[token].split(counts), strict=True)
    results = [
        _expert(rows, row_scale, gate_up[e], gate_up_scale[e], down[e], down_scale[e]).to(x.dtype)
        for e, (rows, row_scale) in enumerate(groups)
        if rows.shape[0]
    ]
    weighted = torch.cat([x[:0], *results]) * weight.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, weighted)


def _expert(
    x: Int8[Tensor, "tokens d"],
    x_scale: Float[Tensor, " tokens"],
    gate_up: Int8[Tensor, "two_ffn d"],
    gate_up_scale: Float[Tensor, " two_ffn"],
    down: Int8[Tensor, "d ffn"],
    down_scale: Float[Tensor, " d"],
) -> Float[Tensor, "tokens d"]:
    """down(silu(gate x) * up x) of one expert."""
    inner = swiglu(int8_linear(x=x, x_scale=x_scale, weight=gate_up, scale=gate_up_scale))
    q, scale = quantize_tokens(x=inner, rounding=RECIPROCAL)
    return int8_linear(x=q, x_scale=scale, weight=down, scale=down_scale)

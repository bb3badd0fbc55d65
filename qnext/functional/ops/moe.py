"""Mixture of experts: which experts a token goes to, and what they make of it."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, silu

from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import ROUNDS_ONCE, SUMS, randn, wide


def swiglu(x: Float[Tensor, "*batch two_f"]) -> Float[Tensor, "*batch f"]:
    """silu(first half) * second half."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up


def _route_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    for renormalise in (True, False):
        yield {"logits": randn(g, 5, 11), "topk": 3, "renormalise": renormalise}


def _route_shapes(*, logits: Tensor, topk: int, **_: Any) -> tuple[Tensor, Tensor]:
    chosen = (logits.shape[0], topk)
    return logits.new_empty(chosen), logits.new_empty(chosen, dtype=torch.int64)


@primitive(
    shapes=_route_shapes,
    flops=lambda *, logits, **_: 5 * logits.numel(),
    tolerance=ROUNDS_ONCE,
    samples=_route_samples,
)
def route(
    *, logits: Float[Tensor, "tokens experts"], topk: int, renormalise: bool
) -> tuple[Float[Tensor, "tokens topk"], Int[Tensor, "tokens topk"]]:
    """The `topk` largest of softmax(logits) and their experts, greatest first.

    With `renormalise` the kept probabilities are divided by their sum.
    """
    weight, expert = wide(logits).softmax(-1).topk(topk, dim=-1)
    if renormalise:
        weight = weight / weight.sum(-1, keepdim=True)
    return weight.to(logits.dtype), expert


def grouped(
    expert: Int[Tensor, "tokens topk"], experts: int
) -> tuple[Int[Tensor, " pairs"], list[int]]:
    """Pairs of token and choice expert by expert, and how many each expert has; others left out."""
    numbers = expert.flatten()
    *counts, elsewhere = numbers.clamp(max=experts).bincount(minlength=experts + 1).tolist()
    return numbers.argsort(stable=True)[: numbers.shape[0] - elsewhere], counts


def _expert_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    for tokens in (13, 1):
        yield {
            "x": randn(g, tokens, 7),
            "expert": torch.rand(tokens, 5, generator=g).argsort(-1)[:, :2],
            "weight": torch.rand(tokens, 2, generator=g),
            "gate_up": randn(g, 5, 6, 7),
            "down": randn(g, 5, 7, 3),
        }


def expert_bytes(*, x: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor, **_: Any) -> int:
    """Each expert that can be hit is read once."""
    hit = min(expert.numel(), gate_up.shape[0])
    return 2 * x.nbytes + hit * (gate_up.nbytes + down.nbytes) // gate_up.shape[0]


@primitive(
    shapes=lambda *, x, **_: torch.empty_like(x),
    flops=lambda *, expert, gate_up, down, **_: (
        2 * expert.numel() * (gate_up[0].numel() + down[0].numel())
    ),
    bytes=expert_bytes,
    tolerance=SUMS,
    samples=_expert_samples,
)
def experts(
    *,
    x: Float[Tensor, "tokens d"],
    expert: Int[Tensor, "tokens topk"],
    weight: Float[Tensor, "tokens topk"],
    gate_up: Float[Tensor, "experts two_ffn d"],
    down: Float[Tensor, "experts d ffn"],
) -> Float[Tensor, "tokens d"]:
    """sum over a token's experts e of weight_e * down_e(silu(gate_e x) * up_e x).

    A number of theirs that is no expert's, at least as large as their count, adds nothing.
    """
    order, counts = grouped(expert, gate_up.shape[0])
    token = order // expert.shape[1]
    results = [
        linear(swiglu(linear(rows, gate_up[e])), down[e])
        for e, rows in enumerate(x[token].split(counts))
        if rows.shape[0]
    ]
    weighted = torch.cat([x[:0], *results]) * weight.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, weighted)

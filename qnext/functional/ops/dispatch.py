"""Tokens to the ranks that hold their experts, and what these made of them back.

The exchange has room for whatever a router may choose: a peer gets as many rows as it could, those
that are not needed belong to no expert.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qnext.functional.ops.collective import exchanged
from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import EXACT, SUMS, randn


def _dispatch_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    yield {
        "x": randn(g, 13, 7),
        "expert": torch.rand(13, 5, generator=g).argsort(-1)[:, :2],
        "experts": 5,
        "group": "",
        "size": 1,
        "rank": 0,
    }


def _dispatch_shapes(
    *, x: Tensor, expert: Tensor, experts: int, size: int, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, topk = expert.shape
    came = size * tokens * min(topk, -(-experts // size))
    place = expert.new_empty(came, dtype=torch.int64)
    return x.new_empty(came, x.shape[1]), place, expert.new_empty(expert.shape, dtype=torch.int64)


@primitive(
    shapes=_dispatch_shapes,
    flops=lambda **_: 0,
    tolerance=EXACT,
    samples=_dispatch_samples,
    collective=True,
)
def dispatch(
    *,
    x: Float[Tensor, "tokens d"],
    expert: Int[Tensor, "tokens topk"],
    experts: int,
    group: str,
    size: int,
    rank: int,
) -> tuple[Float[Tensor, "came d"], Int[Tensor, " came"], Int[Tensor, "tokens topk"]]:
    """(rows that came, the place of each one's expert among this rank's, where each pair went).

    Of `experts` in all rank i of `size` holds those from experts * i // size on. A row that nobody
    sent has the number of this rank's experts for a place: `experts` passes over it.
    """
    tokens, topk = expert.shape
    most = tokens * min(topk, -(-experts // size))  # pairs that one rank may send to another
    first = torch.arange(size + 1, device=expert.device) * experts // size
    order = expert.flatten().argsort(stable=True)
    sorted_expert = expert.flatten()[order]
    owner = torch.searchsorted(first[1:], sorted_expert, right=True)
    begins = torch.searchsorted(owner, torch.arange(size, device=owner.device))
    to = owner * most + torch.arange(owner.shape[0], device=owner.device) - begins[owner]
    rows = x.new_zeros(size * most, x.shape[1]).index_put((to,), x[order // topk])
    place = torch.full((size * most,), -1, device=x.device).index_put(
        (to,), (sorted_expert - first[owner]).long()
    )
    sent = torch.empty_like(to).index_put((order,), to).view_as(expert)
    place = exchanged(place, group, size)
    held = experts * (rank + 1) // size - experts * rank // size
    return exchanged(rows, group, size), place.where(place >= 0, held), sent


def _combine_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    sent = torch.rand(26, generator=g).argsort().view(13, 2)
    yield {
        "x": randn(g, 26, 7),
        "expert": torch.rand(13, 5, generator=g).argsort(-1)[:, :2],
        "weight": torch.rand(13, 2, generator=g),
        "sent": sent,
        "group": "",
        "size": 1,
    }


@primitive(
    shapes=lambda *, x, expert, **_: x.new_empty(expert.shape[0], x.shape[1]),
    flops=lambda *, x, expert, **_: 2 * expert.numel() * x.shape[1],
    tolerance=SUMS,
    samples=_combine_samples,
    collective=True,
)
def combine(
    *,
    expert: Int[Tensor, "tokens topk"],
    weight: Float[Tensor, "tokens topk"],
    x: Float[Tensor, "came d"],
    sent: Int[Tensor, "tokens topk"],
    group: str,
    size: int,
) -> Float[Tensor, "tokens d"]:
    """The weighted sum of what became of a token's rows, each sent back to where it came from.

    Summed in the order of experts, as `experts` does.
    """
    back = exchanged(x, group, size)
    order = expert.argsort(dim=1, stable=True)
    sent, weight = sent.gather(1, order), weight.gather(1, order)
    total = x.new_zeros(expert.shape[0], x.shape[1])
    for choice in range(expert.shape[1]):
        total = total + back[sent[:, choice]] * weight[:, choice, None]
    return total

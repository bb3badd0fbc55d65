"""Counter-based Gumbel noise: a pure function of (seed, position, token)."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import ROUNDS_ONCE

_MASK = 0xFFFFFFFF


def _samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    yield {
        "seed": torch.tensor([0, 1, 2**62 - 1]),
        "position": torch.tensor([0, 7, 262_143]),
        "vocab": 11,
    }


@primitive(
    shapes=lambda *, seed, vocab, **_: seed.new_empty((*seed.shape, vocab), dtype=torch.float32),
    flops=lambda *, seed, vocab, **_: 30 * seed.numel() * vocab,
    tolerance=ROUNDS_ONCE,
    samples=_samples,
)
def gumbel(
    *, seed: Int64[Tensor, " batch"], position: Int[Tensor, " batch"], vocab: int
) -> Float32[Tensor, "batch vocab"]:
    """Standard Gumbel noise for every token of every row; finite.

    The counter (seed, position, token) is hashed to 32 bits u, and -log(-log1p(-u)) is Gumbel.
    log1p keeps full precision for small u, where the winners of a large vocabulary are found.
    """
    token = torch.arange(vocab, dtype=torch.int64, device=seed.device)
    stream = _mix(_mix(seed & _MASK) ^ ((seed >> 32) & _MASK))
    stream = _mix(stream ^ _mix(position.long() & _MASK))
    bits = _mix(_mix(stream[:, None] + token * 0x9E3779B9 & _MASK) ^ stream[:, None])
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that flips each output bit with each input bit half the time.

    Wellons' "lowbias32" (github.com/skeeto/hash-prospector), on int64 lanes holding 32 bits.
    """
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _MASK
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _MASK
    return x ^ (x >> 16)

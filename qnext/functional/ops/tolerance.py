"""Shared tolerances with their reasons, and what samples and references of primitives need."""

import torch
from torch import Tensor

from qnext.functional.ops.primitive import Tolerance

ROUNDS_ONCE = {
    torch.float64: Tolerance(1e-14, "53-bit mantissa, short sums in another order"),
    torch.float32: Tolerance(1e-6, "24-bit mantissa, sums of one row in another order"),
    torch.bfloat16: Tolerance(4e-3, "8-bit mantissa, one rounding of the result"),
}
NORMS = ROUNDS_ONCE | {
    torch.bfloat16: Tolerance(
        8e-3,
        "8-bit mantissa; the fused calls that add or gate round the normalised value (and 1 + w) "
        "before the result: up to three roundings of at most 2^-8 each, and the reference's own",
    ),
}
SUMS = {
    torch.float64: Tolerance(1e-12, "53-bit mantissa, long sums in another order"),
    torch.float32: Tolerance(5e-6, "24-bit mantissa, sums over channels or time in another order"),
    torch.bfloat16: Tolerance(
        1.5e-2, "8-bit mantissa; products and intermediate sums may round as well"
    ),
}
EXACT = {
    dtype: Tolerance(0.0, "rows are copied or chosen, nothing is computed")
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
}


def wide(x: Tensor) -> Tensor:
    """x in the dtype that references compute in: float32, or float64 where x has it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """A normal float32 sample."""
    return torch.randn(shape, generator=generator)

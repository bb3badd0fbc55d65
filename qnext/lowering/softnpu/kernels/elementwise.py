"""One result an element: arithmetic, comparisons, casts, fills (aclnn pages of the same names).

Low precision widens to float32 inside a call and is rounded once, at its end.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import kernel, need

LOW = (torch.bfloat16, torch.float16)


def wide(value: Any) -> Any:
    """A low-precision operand in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value


def write(out: Tensor, value: Tensor) -> None:
    """Store a result whose shape must already be the output's."""
    need(out.shape == value.shape, f"the output must be {list(value.shape)}", list(out.shape))
    out.copy_(value)


def unary(name: str, function: Callable[[Tensor], Tensor]) -> None:
    """`aclnnName` and `aclnnInplaceName`."""
    kernel(f"aclnn{name}", "tt")(lambda a, out: write(out, function(wide(a))))
    kernel(f"aclnnInplace{name}", "t")(lambda a: write(a, function(wide(a))))


def binary(
    name: str,
    second: str,
    function: Callable[[Any, Any], Tensor],
    inplace: str | None = None,
) -> None:
    """`aclnnName` of a tensor and a tensor (t) or scalar (S), and its in-place twin."""
    signature = "t" + second
    kernel(f"aclnn{name}", signature + "t")(
        lambda a, b, out: write(out, function(wide(a), wide(b)))
    )
    kernel(inplace or f"aclnnInplace{name}", signature)(
        lambda a, b: write(a, function(wide(a), wide(b)))
    )


def scaled(name: str, second: str, function: Callable[[Any, Any, Any], Tensor]) -> None:
    """Sums and differences, whose second operand has a factor."""
    signature = "t" + second + "S"
    kernel(f"aclnn{name}", signature + "t")(
        lambda a, b, alpha, out: write(out, function(wide(a), wide(b), alpha))
    )
    kernel(f"aclnnInplace{name}", signature)(
        lambda a, b, alpha: write(a, function(wide(a), wide(b), alpha))
    )


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Sqrt": torch.sqrt,
    "Rsqrt": torch.rsqrt,
    "Exp": torch.exp,
    "Expm1": torch.expm1,
    "Log": torch.log,
    "Log1p": torch.log1p,
    "Cos": torch.cos,
    "Sin": torch.sin,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Sign": torch.sign,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "LogicalNot": torch.logical_not,
    "Erf": torch.erf,
    "Log2": torch.log2,
    "Exp2": torch.exp2,
    "Trunc": torch.trunc,
    "Silu": lambda a: a / (1 + torch.exp(-a)),
    "BitwiseNot": torch.bitwise_not,
    "IsFinite": torch.isfinite,
    "IsPosInf": torch.isposinf,
    "IsNegInf": torch.isneginf,
}
for _name, _function in UNARY.items():
    unary(_name, _function)

for _suffix, _second in (("", "t"), ("s", "S")):
    scaled(f"Add{_suffix}", _second, lambda a, b, alpha: a + b * alpha)
    scaled(f"Sub{_suffix}", _second, lambda a, b, alpha: a - b * alpha)
    scaled(f"Rsub{_suffix}", _second, lambda a, b, alpha: b - a * alpha)
    binary(f"Mul{_suffix}", _second, lambda a, b: a * b)
    binary(f"Div{_suffix}", _second, lambda a, b: a / b)
    binary(f"FloorDivide{_suffix}", _second, lambda a, b: torch.floor_divide(a, b))

COMPARISONS: dict[str, Callable[[Any, Any], Tensor]] = {
    "Eq": torch.eq,
    "Ne": torch.ne,
    "Ge": torch.ge,
    "Gt": torch.gt,
    "Le": torch.le,
    "Lt": torch.lt,
}
for _name, _compare in COMPARISONS.items():
    binary(f"{_name}Tensor", "t", _compare)
    binary(f"{_name}Scalar", "S", _compare)

BITS: dict[str, Callable[[Any, Any], Tensor]] = {
    "And": torch.bitwise_and,
    "Or": torch.bitwise_or,
    "Xor": torch.bitwise_xor,
}
for _name, _bits in BITS.items():
    binary(f"Bitwise{_name}Tensor", "t", _bits)
    binary(f"Bitwise{_name}Scalar", "S", _bits)
binary("LogicalAnd", "t", torch.logical_and)
binary("LogicalOr", "t", torch.logical_or)
binary("LogicalXor", "t", torch.logical_xor)
binary("Maximum", "t", torch.maximum)
binary("Minimum", "t", torch.minimum)
binary("RemainderTensorTensor", "t", torch.remainder)
binary("RemainderTensorScalar", "S", torch.remainder)
binary("PowTensorScalar", "S", torch.pow)
binary("PowTensorTensor", "t", torch.pow)

kernel("aclnnPowScalarTensor", "Stt")(lambda a, b, out: write(out, torch.pow(a, wide(b))))


def shift(a: Tensor, by: Tensor, left: bool) -> Tensor:
    """A shift by the width of the type or more is undefined in CANN: refused."""
    inside = (by >= 0) & (by < 8 * a.dtype.itemsize)
    need(inside.all(), f"a shift of {a.dtype} must be below its width", by.flatten().tolist()[:8])
    return torch.bitwise_left_shift(a, by) if left else torch.bitwise_right_shift(a, by)


kernel("aclnnRightShift", "ttt")(lambda a, by, out: write(out, shift(a, by, False)))
kernel("aclnnLeftShift", "ttt")(lambda a, by, out: write(out, shift(a, by, True)))
kernel("aclnnLeftShifts", "tSt")(lambda a, by, out: write(out, shift(a, torch.tensor(by), True)))


@kernel("aclnnDivMod", "ttit")
def div_mod(a: Tensor, b: Tensor, mode: int, out: Tensor) -> None:
    """Mode 0 true, 1 truncated, 2 floored division."""
    modes = {0: None, 1: "trunc", 2: "floor"}
    write(out, torch.div(wide(a), wide(b), rounding_mode=modes[mode]))


@kernel("aclnnDivMods", "tSit")
def div_mods(a: Tensor, b: Any, mode: int, out: Tensor) -> None:
    modes = {0: None, 1: "trunc", 2: "floor"}
    write(out, torch.div(wide(a), b, rounding_mode=modes[mode]))


@kernel("aclnnSoftplus", "tSSt")
def softplus(a: Tensor, beta: Any, threshold: Any, out: Tensor) -> None:
    write(out, torch.nn.functional.softplus(wide(a), beta, threshold))


@kernel("aclnnClamp", "tSSt")
def clamp(a: Tensor, low: Any, high: Any, out: Tensor) -> None:
    write(out, a.clamp(low, high))


kernel("aclnnClampMin", "tSt")(lambda a, low, out: write(out, a.clamp(min=low)))
kernel("aclnnClampMax", "tSt")(lambda a, high, out: write(out, a.clamp(max=high)))
kernel("aclnnInplaceClampMax", "tS")(lambda a, high: a.clamp_(max=high))
kernel("aclnnClampMinTensor", "ttt")(lambda a, low, out: write(out, torch.maximum(a, low)))
kernel("aclnnClampMaxTensor", "ttt")(lambda a, high, out: write(out, torch.minimum(a, high)))


@kernel("aclnnSWhere", "tttt")
def where(condition: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
    write(out, torch.where(condition.bool(), a, b))


@kernel("aclnnInplaceMaskedFillScalar", "ttS")
def masked_fill(a: Tensor, mask: Tensor, value: Any) -> None:
    a.masked_fill_(mask.bool(), value)


@kernel("aclnnInplaceMaskedFillTensor", "ttt")
def masked_fill_tensor(a: Tensor, mask: Tensor, value: Tensor) -> None:
    a.masked_fill_(mask.bool(), value.item())


@kernel("aclnnCast", "tjt")
def cast(a: Tensor, dtype: int, out: Tensor) -> None:
    """Float to bf16 rounds to nearest even (CAST_RINT), to an integer towards zero."""
    write(out, a.to(out.dtype))


kernel("aclnnInplaceCopy", "tt")(lambda a, b: a.copy_(b))
kernel("aclnnInplaceZero", "t")(lambda a: a.zero_())
kernel("aclnnInplaceOne", "t")(lambda a: a.fill_(1))
kernel("aclnnInplaceFillScalar", "tS")(lambda a, value: a.fill_(value))
kernel("aclnnInplaceFillTensor", "tt")(lambda a, value: a.fill_(value.item()))


@kernel("aclnnArange", "SSSt")
def arange(start: Any, end: Any, step: Any, out: Tensor) -> None:
    write(out, torch.arange(start, end, step).to(out.dtype))


@kernel("aclnnAddcmul", "tttSt")
def addcmul(a: Tensor, b: Tensor, c: Tensor, value: Any, out: Tensor) -> None:
    write(out, wide(a) + value * wide(b) * wide(c))


@kernel("aclnnEye", "iit")
def eye(rows: int, columns: int, out: Tensor) -> None:
    write(out, torch.eye(rows, columns).to(out.dtype))

"""The torch_npu calls of int8 tokens and int8 weights. Pages: op-plugin's, of each name.

Three roundings are in use (`qnext.functional.ops.quant`): `npu_dynamic_quant`, the norm and the
routing multiply by 127 / max, `npu_dequant_swiglu_quant` divides by max / 127, and
`npu_grouped_matmul_swiglu_quant_v2` multiplies by 1 / (max / 127).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qnext.lowering.calls import call

NZ = 29  # FRACTAL_NZ: [n / 32, k / 16, 16, 32] for int8, the order that the cube unit reads
FLOAT32 = 0  # dequant_dtype, spelled out: page and package disagree on the default


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _int8(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.int8)


def _scale(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


@call("npu_format_cast", shapes=lambda *, weight: torch.empty_like(weight))
def npu_format_cast(*, weight: Tensor) -> Tensor:
    """The same values in the cube unit's order; shape and strides tell nothing of it."""
    with _private_formats():
        return _npu().npu_format_cast(weight, NZ)


@contextmanager
def _private_formats() -> Iterator[None]:
    """Let tensors be made in the device's own formats, which the package refuses by default."""
    package = _npu()
    allowed = package._C._npu_getOption("ALLOW_INTERNAL_FORMAT") == b"enable"
    package.npu.config.allow_internal_format = True
    try:
        yield
    finally:
        package.npu.config.allow_internal_format = allowed


@call(
    "npu_dynamic_quant",
    shapes=lambda *, x: (_int8(x, *x.shape), _scale(x, *x.shape[:-1])),
    flops=lambda *, x: 4 * x.numel(),
)
def npu_dynamic_quant(*, x: Tensor) -> tuple[Tensor, Tensor]:
    """inv = 127 / max; rint(x * inv) and 1 / inv of each token."""
    return _npu().npu_dynamic_quant(x)


@call(
    "npu_add_rms_norm_dynamic_quant",
    shapes=lambda *, x, **_: (
        _int8(x, *x.shape),
        _scale(x, *x.shape[:-1]),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
    flops=lambda *, x, **_: 9 * x.numel(),
)
def npu_add_rms_norm_dynamic_quant(
    *, x: Tensor, residual: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, scale, R(x + residual)); what is quantised is the normed sum, not rounded before."""
    tokens, _, total, scale, _ = _npu().npu_add_rms_norm_dynamic_quant(
        x, residual, gamma, epsilon=eps, output_mask=[True, False]
    )
    return tokens, scale, total


@call(
    "npu_quant_matmul",
    shapes=lambda *, x, weight, **_: x.new_empty(x.shape[0], weight.shape[1], dtype=torch.bfloat16),
    flops=lambda *, x, weight, **_: 2 * x.numel() * weight.shape[1],
)
def npu_quant_matmul(*, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """R((int32 sum * scale) * x_scale): x [m, k], weight [k, n], scale [n], x_scale [m]."""
    return _npu().npu_quant_matmul(
        x, weight, scale, pertoken_scale=x_scale, output_dtype=torch.bfloat16
    )


@call(
    "npu_dequant_swiglu_quant",
    shapes=lambda *, x: (
        _int8(x, *x.shape[:-1], x.shape[-1] // 2),
        _scale(x, *x.shape[:-1]),
    ),
    flops=lambda *, x: 8 * x.numel(),
)
def npu_dequant_swiglu_quant(*, x: Tensor) -> tuple[Tensor, Tensor]:
    """silu(first half) * second half in float32; scale = max * (1 / 127), rint(r / scale)."""
    return _npu().npu_dequant_swiglu_quant(x, activate_left=True, quant_mode=1)


@call(
    "npu_moe_init_routing_v2",
    shapes=lambda *, x, expert, experts: (
        _int8(x, expert.numel(), x.shape[1]),
        _scale(x, expert.numel()),
        x.new_empty(expert.numel(), dtype=torch.int32),
        x.new_empty(experts, dtype=torch.int64),
    ),
    flops=lambda *, x, expert, **_: 4 * expert.numel() * x.shape[1],
)
def npu_init_routing_quant(
    *, x: Tensor, expert: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens sorted by expert, their scales, where each went, tokens of each expert)."""
    rows, where, counts, scale = _npu().npu_moe_init_routing_v2(
        x,
        expert,
        expert_num=experts,
        active_expert_range=[0, experts],
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        row_idx_type=0,
        quant_mode=1,
    )
    return rows, scale, where, counts


def _read(x: Tensor, weight: Tensor) -> int:
    """Bytes of the tokens, and of each expert that can be hit, once."""
    return x.nbytes + min(x.shape[0], weight.shape[0]) * weight[0].numel()


@call(
    "npu_grouped_matmul_swiglu_quant_v2",
    shapes=lambda *, x, weight, **_: (
        _int8(x, x.shape[0], weight.shape[2] // 2),
        _scale(x, x.shape[0]),
    ),
    flops=lambda *, x, weight, **_: 2 * x.numel() * weight.shape[2],
    bytes=lambda *, x, weight, **_: _read(x, weight) + x.shape[0] * weight.shape[2] // 2,
)
def npu_grouped_matmul_swiglu_quant(
    *, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """c = (sum * x_scale) * scale; tokens and scales of silu(left) * right, nothing rounded before.

    x [rows, k] sorted by expert, weight [experts, k, n] in FRACTAL_NZ, scale [experts, n].
    """
    return _npu().npu_grouped_matmul_swiglu_quant_v2(
        x,
        [weight],
        [scale],
        x_scale,
        counts,
        group_list_type=1,
        dequant_dtype=FLOAT32,
    )


@call(
    "npu_grouped_matmul",
    shapes=lambda *, x, weight, **_: x.new_empty(x.shape[0], weight.shape[2], dtype=torch.bfloat16),
    flops=lambda *, x, weight, **_: 2 * x.numel() * weight.shape[2],
    bytes=lambda *, x, weight, **_: _read(x, weight) + 2 * x.shape[0] * weight.shape[2],
)
def npu_grouped_matmul_quant(
    *, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, counts: Tensor
) -> Tensor:
    """R((sum * scale) * x_scale) of each expert's rows; scale is bfloat16 for a bfloat16 result."""
    return _npu().npu_grouped_matmul(
        [x],
        [weight],
        scale=[scale],
        per_token_scale=[x_scale],
        group_list=counts,
        split_item=3,
        group_type=0,
        group_list_type=1,
        output_dtype=torch.bfloat16,
    )[0]

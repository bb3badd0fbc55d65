"""The norms over the last axis (op-plugin npu_rms_norm, npu_add_rms_norm, npu_gemma_rms_norm)."""

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import kernel, need, need_dtype, need_shape
from qnext.lowering.softnpu.kernels.elementwise import write

LOW = (torch.bfloat16, torch.float16)
# rows that fit one a core: the kernel then reads the rounded sum again
CORES = 48


def rsqrt_mean(x: Tensor, epsilon: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def rms_check(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    """gamma may be of float32 beside a low-precision x on A2 and A3, not the other way round."""
    need_dtype("self", x, *LOW, torch.float32)
    need_dtype("gamma", gamma, x.dtype, torch.float32)
    need_shape("gamma", gamma, *x.shape[-gamma.dim() :])
    need(gamma.dim() == 1, "gamma must be of rank 1 here", gamma.dim())
    need(epsilon >= 0, "epsilon must not be negative", epsilon)
    need_dtype("rstd", rstd, torch.float32)


@kernel("aclnnRmsNorm", "ttdtt", rms_check)
def rms_norm(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    """y = R(x * rstd * gamma)."""
    scale = rsqrt_mean(x.float(), epsilon)
    rstd.copy_(scale.reshape(rstd.shape))
    write(y, x.float() * scale * gamma.float())


def same_check(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    need(x.is_contiguous(), "self must be contiguous", x.stride())
    need_dtype("gamma", gamma, x.dtype)
    rms_check(x, gamma, epsilon, y, rstd)


@kernel("aclnnGemmaRmsNorm", "ttdtt", same_check)
def gemma_rms_norm(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    """y = R(x * rstd * (1 + gamma))."""
    rms_norm(x, 1 + gamma.float(), epsilon, y, rstd)


def add_check(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor, x: Tensor
) -> None:
    need_shape("x2", x2, *x1.shape)
    need_dtype("x2", x2, x1.dtype)
    need_dtype("gamma", gamma, x1.dtype)
    rms_check(x1, gamma, epsilon, y, rstd)


@kernel("aclnnAddRmsNorm", "tttdttt", add_check)
def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor, x: Tensor
) -> None:
    """x = R(x1 + x2), y = R(R(n * rstd) * gamma); n is the sum, rounded where rows fit a core."""
    total = x1.float() + x2.float()
    write(x, total)
    rows = x1.numel() // x1.shape[-1]
    normed = x.float() if rows <= CORES else total
    scale = rsqrt_mean(normed, epsilon)
    rstd.copy_(scale.reshape(rstd.shape))
    write(y, (normed * scale).to(x1.dtype).float() * gamma.float())

"""A short convolution in one call, which packages beside torch_npu register.

sgl-kernel-npu and vllm-ascend have the same kernel under two names. In its update mode it reads a
row's window from input `accepted - 1` on and leaves the row beginning one input later:

    line = row[accepted - 1 : accepted + 2] ++ x;   row[: seq + 2] = line[1:]

What a row has beyond stays. sgl-kernel-npu's other operator, causal_conv1d_update, is no choice: it
moves a row before it reads it, so one token after window (a, b, c) sees (b, c, c) (releases since
April 2026), and for more than 4096 channels it copies the whole pool out and back.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qnext.errors import LoweringError, TargetError
from qnext.lowering.calls import call

Kind = Literal["sgl", "vllm"]
NO_PAD = -1  # an index that would mark a row as padding: ours are all at least 0


class Package(NamedTuple):
    """Where an operator comes from. Releases before `since` lack `counts` as a device tensor."""

    space: str
    operator: str
    module: str  # whose import registers it
    counts: str
    since: str

    @property
    def name(self) -> str:
        return f"torch.ops.{self.space}.{self.operator}"


PACKAGES: dict[Kind, Package] = {
    "sgl": Package("npu", "causal_conv1d", "sgl_kernel_npu", "num_accepted_tokens", "2026.7.1"),
    "vllm": Package(
        "_C_ascend",
        "npu_causal_conv1d_custom",
        "vllm_ascend.vllm_ascend_C",
        "num_accepted_tokens_opt",
        "0.24",
    ),
}


def operator(kind: Kind) -> Any:
    """A package's operator, imported if need be; TargetError says in a line what is absent."""
    package = PACKAGES[kind]
    if not (found := _registered(package)):
        _import(package)
        if not (found := _registered(package)):
            raise TargetError(f"{package.module} registers no {package.operator}")
    arguments = {it.name: str(it.type) for it in found.default._schema.arguments}
    if arguments.get(package.counts) != "Optional[Tensor]":
        raise TargetError(
            f"{package.name} takes no tensor {package.counts}: install "
            f"{package.module.partition('.')[0]} {package.since} or later"
        )
    return found


def _registered(package: Package) -> Any:
    return getattr(getattr(torch.ops, package.space), package.operator, None)


def _import(package: Package) -> None:
    top = package.module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise TargetError(f"{top} is not installed")
    try:
        importlib.import_module(package.module)
    except Exception as error:  # any: it is somebody else's package
        raise TargetError(f"{package.module} does not import: {error}") from error


def _shapes(*, x: Tensor, window: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(window)


def _flops(*, x: Tensor, weight: Tensor, **_: object) -> int:
    return x.numel() * (2 * weight.shape[0] + 4)


def _bytes(*, x: Tensor, weight: Tensor, window: Tensor, rows: Tensor, **_: object) -> int:
    """x and y, the weights, and of each row what is read and what is written."""
    inputs = weight.shape[0] - 1 + window.shape[1]
    return 2 * x.nbytes + weight.nbytes + rows.numel() * inputs * x[0, 0].nbytes


@call("causal_conv1d", shapes=_shapes, writes=("window",), flops=_flops, bytes=_bytes)
def sgl_causal_conv1d(
    *, x: Tensor, weight: Tensor, window: Tensor, rows: Tensor, accepted: Tensor
) -> tuple[Tensor, Tensor]:
    """silu of the convolution; weight [width, conv], rows int64, x and window contiguous.

    An empty `accepted` is none. A shape's first call sends its plan from the host: it must not be
    captured.
    """
    y = operator("sgl")(
        x,
        weight,
        window,
        cache_indices=rows,
        num_accepted_tokens=accepted if accepted.numel() else None,
        activation_mode=1,
        pad_slot_id=NO_PAD,
        run_mode=1,
    )
    return y, window


@call("npu_causal_conv1d_custom", shapes=_shapes, writes=("window",), flops=_flops, bytes=_bytes)
def vllm_causal_conv1d(
    *, x: Tensor, weight: Tensor, window: Tensor, rows: Tensor, accepted: Tensor
) -> tuple[Tensor, Tensor]:
    """silu of the convolution; weight [width, conv], rows int32; an empty `accepted` is none."""
    if not window.is_contiguous():  # the call copies what is not, and would write to the copy
        raise LoweringError(f"window must be contiguous, its strides are {window.stride()}")
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    operator("vllm")(
        y,
        x,
        weight,
        conv_state=window,
        bias_opt=None,
        query_start_loc_opt=None,
        cache_indices_opt=rows,
        initial_state_mode_opt=None,
        num_accepted_tokens_opt=accepted if accepted.numel() else None,
        activation_mode=1,
        pad_slot_id=NO_PAD,
        run_mode=1,
    )
    return y, window


def _accepted(weight: Tensor, window: Tensor, offset: Tensor) -> Tensor:
    """Counts from 1; none where a row has no room for drafts, and so one place to begin at."""
    return offset + 1 if window.shape[1] >= weight.shape[1] else offset[:0]


def conv_sgl(
    *,
    x: Tensor,
    weight: Tensor,
    window: Tensor,
    rows: Tensor,
    offset: Tensor,
    start: Tensor,
    moves_by_one: bool,
) -> tuple[Tensor, Tensor]:
    """One launch, and one more to copy x where it is columns of a joined projection."""
    return sgl_causal_conv1d(
        x=x.contiguous(),
        weight=weight.t().contiguous(),
        window=window,
        rows=rows.long(),
        accepted=_accepted(weight, window, offset),
    )


def conv_vllm(
    *,
    x: Tensor,
    weight: Tensor,
    window: Tensor,
    rows: Tensor,
    offset: Tensor,
    start: Tensor,
    moves_by_one: bool,
) -> tuple[Tensor, Tensor]:
    """One launch; where x is columns of a joined projection, aclnn itself copies it before."""
    return vllm_causal_conv1d(
        x=x,
        weight=weight.t().contiguous(),
        window=window,
        rows=rows,
        accepted=_accepted(weight, window, offset),
    )


EMITS: dict[Kind, Callable[..., tuple[Tensor, Tensor]]] = {"sgl": conv_sgl, "vllm": conv_vllm}

"""Matrix products: a float32 sum over k, one rounding (aclnnMatmul, Mm, Addmm, BatchMatMul)."""

from typing import Any

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import kernel, need, need_dtype, poison
from qnext.lowering.softnpu.kernels.elementwise import wide, write

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check(a: Tensor, b: Tensor, out: Tensor, mode: int) -> None:
    need_dtype("self", a, *FLOATS)
    need(a.dtype == b.dtype, "self and mat2 must be of one dtype", (a.dtype, b.dtype))
    inner = b.shape[-2] if b.dim() > 1 else b.shape[0]
    need(a.shape[-1] == inner, "the inner axes must agree", (list(a.shape), list(b.shape)))


def product(a: Tensor, b: Tensor, out: Tensor, mode: int) -> None:
    write(out, (wide(a) @ wide(b)).to(out.dtype))


for _name in ("Matmul", "Mm", "BatchMatMul", "MatmulWeightNz", "BatchMatMulWeightNz"):
    kernel(f"aclnn{_name}", "tttc", check)(product)


def added(c: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any) -> Tensor:
    scaled = alpha * (wide(a) @ wide(b))
    return scaled if beta == 0 else beta * wide(c) + scaled  # with 0 a NaN of c does not matter


@kernel("aclnnAddmm", "tttSStc")
def addmm(c: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any, out: Tensor, mode: int) -> None:
    write(out, added(c, a, b, beta, alpha))


kernel("aclnnInplaceAddmm", "tttSSc")(
    lambda c, a, b, beta, alpha, mode: write(c, added(c, a, b, beta, alpha))
)
kernel("aclnnBaddbmm", "tttSStc")(addmm)


@kernel("aclnnTriangularSolve", "ttbbbtt")
def triangular_solve(
    b: Tensor, a: Tensor, upper: bool, transpose: bool, unit: bool, x: Tensor, copy: Tensor
) -> None:
    """x of a x = b, or of a^T x = b; `copy` is a once more."""
    need_dtype("A", a, torch.float32)
    matrix = a.mT if transpose else a
    solve = torch.linalg.solve_triangular
    write(x, solve(matrix, b, upper=upper != transpose, unitriangular=unit))
    write(copy, a)


def groups(list_: Tensor, kind: int, rows: int, experts: int) -> list[tuple[int, int]]:
    """First and last row of each expert; kind 0 has running sums, 1 counts."""
    need(list_.shape == (experts,), f"group_list must be [{experts}]", list(list_.shape))
    ends = list_ if kind == 0 else list_.cumsum(0)
    starts = [0, *ends.tolist()[:-1]]
    spans = list(zip(starts, ends.tolist(), strict=True))
    need(all(0 <= i <= j for i, j in spans), "groups must not be negative", list_.tolist())
    need(spans[-1][1] <= rows, f"groups must sum to at most {rows} rows", list_.tolist())
    return spans


def grouped_check(
    x: list[Tensor], weight: list[Tensor], bias: Any, scale: Any, offset: Any, antiquant: Any,
    antioffset: Any, per_token: Any, list_: Tensor | None, act_in: Any, act_scale: Any,
    act_offset: Any, split: int, group_type: int, list_kind: int, act: int, *rest: Any,
) -> None:  # fmt: skip
    """op-plugin npu_grouped_matmul, the form of a mixture of experts."""
    need(len(x) == len(weight) == 1, "x and weight must be one tensor each", (len(x), len(weight)))
    a, w = x[0], weight[0]
    need(a.dim() == 2 and w.dim() == 3, "x must be [m, k], weight [e, k, n]", (a.dim(), w.dim()))
    need(a.shape[1] == w.shape[1], "the inner axes must agree", (list(a.shape), list(w.shape)))
    need(w.shape[0] <= 1024, "at most 1024 experts", w.shape[0])
    need(a.dtype == w.dtype, "x and weight must be of one dtype", (a.dtype, w.dtype))
    need_dtype("x", a, torch.bfloat16, torch.float16, torch.int8)
    need(list_ is not None and list_.dtype == torch.int64, "group_list must be of int64", list_)
    need(split in (2, 3), "split_item must be 2 or 3", split)
    need(group_type == 0, "group_type must be 0", group_type)
    need(list_kind in (0, 1), "group_list_type must be 0 or 1", list_kind)
    need(act == 0, "act_type must be 0", act)
    need(not bias or not any(b is not None for b in bias), "bias must be absent", bias)
    out = rest[-3][0]
    if a.dtype == torch.int8:
        need(scale and per_token, "int8 needs scale and per_token_scale", (scale, per_token))
        need_dtype(
            "scale", scale[0], torch.bfloat16 if out.dtype == torch.bfloat16 else torch.float32
        )
        need_dtype("per_token_scale", per_token[0], torch.float32)


def grouped(
    x: list[Tensor], weight: list[Tensor], bias: Any, scale: Any, offset: Any, antiquant: Any,
    antioffset: Any, per_token: Any, list_: Tensor, act_in: Any, act_scale: Any, act_offset: Any,
    split: int, group_type: int, list_kind: int, act: int, *rest: Any,
) -> None:  # fmt: skip
    """Rows beyond the last group are undefined."""
    a, w, out = x[0], weight[0], rest[-3][0]
    spans = groups(list_, list_kind, a.shape[0], w.shape[0])
    poison(out)
    for expert, (start, end) in enumerate(spans):
        if a.dtype == torch.int8:
            total = (a[start:end].double() @ w[expert].double()).float()  # exact in int32
            result = total * scale[0][expert].float() * per_token[0][start:end, None]
        else:
            result = a[start:end].float() @ w[expert].float()
        out[start:end] = result.to(out.dtype)


kernel("aclnnGroupedMatmulV4", "LLLLLLLLtLLLiiiiLLL", grouped_check)(grouped)
kernel("aclnnGroupedMatmulV5", "LLLLLLLLtLLLiiiiILLL", grouped_check)(grouped)
kernel("aclnnGroupedMatmulWeightNz", "LLLLLLLLtLLLiiiiIiLLL", grouped_check)(grouped)

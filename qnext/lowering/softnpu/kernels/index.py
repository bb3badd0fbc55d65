"""Moving elements: joins, gathers, scatters, reductions, sorts (aclnn pages of the same names).

An index out of range is refused; on the chip it reads or writes somewhere else.
"""

from typing import Any

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import kernel, need
from qnext.lowering.softnpu.kernels.elementwise import wide, write


def need_range(name: str, index: Tensor, size: int, low: int = 0) -> None:
    """Indices must lie in `low <= i < size`."""
    if index.numel():
        least, most = int(index.min()), int(index.max())
        need(low <= least and most < size, f"{name} must be in {low}..{size - 1}", (least, most))


def axes(tensor: Tensor, dims: list[int] | None) -> list[int]:
    return [d % tensor.dim() for d in dims] if dims else list(range(tensor.dim()))


kernel("aclnnCat", "Lit")(lambda parts, dim, out: write(out, torch.cat(parts, dim)))
kernel("aclnnStack", "Lit")(lambda parts, dim, out: write(out, torch.stack(parts, dim)))
kernel("aclnnRepeat", "tIt")(lambda a, times, out: write(out, a.repeat(times)))
kernel("aclnnFlip", "tIt")(lambda a, dims, out: write(out, a.flip(dims)))
kernel("aclnnTriu", "tit")(lambda a, diagonal, out: write(out, a.triu(diagonal)))
kernel("aclnnTril", "tit")(lambda a, diagonal, out: write(out, a.tril(diagonal)))
kernel("aclnnInplaceTriu", "ti")(lambda a, diagonal: a.triu_(diagonal))
kernel("aclnnInplaceTril", "ti")(lambda a, diagonal: a.tril_(diagonal))


@kernel("aclnnConstantPadNd", "tISt")
def constant_pad(a: Tensor, pad: list[int], value: Any, out: Tensor) -> None:
    write(out, torch.nn.functional.pad(a, pad, value=value))


@kernel("aclnnRepeatInterleaveIntWithDim", "tiiit")
def repeat_interleave(a: Tensor, times: int, dim: int, size: int, out: Tensor) -> None:
    write(out, a.repeat_interleave(times, dim))


@kernel("aclnnIndexSelect", "titt")
def index_select(a: Tensor, dim: int, index: Tensor, out: Tensor) -> None:
    need_range("index", index, a.shape[dim])
    write(out, a.index_select(dim, index.long()))


@kernel("aclnnEmbedding", "ttt")
def embedding(weight: Tensor, index: Tensor, out: Tensor) -> None:
    need_range("indices", index, weight.shape[0])
    write(out, weight[index.long()])


@kernel("aclnnGather", "titt")
def gather(a: Tensor, dim: int, index: Tensor, out: Tensor) -> None:
    need_range("index", index, a.shape[dim])
    write(out, a.gather(dim, index.long()))


@kernel("aclnnGatherV3", "titiit")
def gather_rows(a: Tensor, dim: int, index: Tensor, batch: int, mode: int, out: Tensor) -> None:
    need(batch == 0, "batchDims must be 0", batch)
    need_range("index", index, a.shape[dim])
    flat = a.index_select(dim, index.long().flatten())
    dim %= a.dim()
    write(out, flat.reshape(*a.shape[:dim], *index.shape, *a.shape[dim + 1 :]))


def table(a: Tensor, indices: list[Tensor | None]) -> tuple[Any, ...]:
    """Indices as torch takes them; an empty handle stands for a whole axis."""
    key: list[Any] = []
    for dim, index in enumerate(indices):
        if index is None or index.numel() == 0:
            key.append(slice(None))
        elif index.dtype == torch.bool or index.dtype == torch.uint8:
            key.append(index.bool())
        else:
            need_range("an index", index, a.shape[dim], -a.shape[dim])
            key.append(index.long())
    return tuple(key)


@kernel("aclnnIndex", "tLt")
def index_(a: Tensor, indices: list[Tensor | None], out: Tensor) -> None:
    write(out, a[table(a, indices)])


@kernel("aclnnIndexPutImpl", "tLtbb")
def index_put(
    a: Tensor, indices: list[Tensor | None], value: Tensor, accumulate: bool, unsafe: bool
) -> None:
    """Twice the same place without accumulation: which value stays is undefined, so refused
    unless it is the first row (a scratch row) or the values are equal."""
    key = table(a, indices)
    if not accumulate and all(
        isinstance(each, Tensor) and each.dtype != torch.bool for each in key
    ):
        wrapped = [each % size for each, size in zip(key, a.shape, strict=False)]
        spread = torch.broadcast_tensors(*wrapped)
        place = torch.zeros_like(spread[0])
        for each, size in zip(spread, a.shape, strict=False):
            place = place * size + each
        kept = place[spread[0] != 0]
        need(kept.unique().numel() == kept.numel(), "places must be distinct but for row 0", kept)
    a[key] = a[key] + value if accumulate else value.to(a.dtype)


@kernel("aclnnScatter", "tittit")
def scatter(a: Tensor, dim: int, index: Tensor, value: Tensor, mode: int, out: Tensor) -> None:
    need_range("index", index, a.shape[dim])
    need(mode in (0, 1), "reduce must be 0 or 1 (add)", mode)
    done = a.clone()
    write(
        out,
        done.scatter_add_(dim, index, value) if mode else done.scatter_(dim, index, value),
    )


@kernel("aclnnInplaceScatter", "titti")
def scatter_(a: Tensor, dim: int, index: Tensor, value: Tensor, mode: int) -> None:
    scatter(a, dim, index, value, mode, a)


@kernel("aclnnScatterValue", "titSit")
def scatter_value(a: Tensor, dim: int, index: Tensor, value: Any, mode: int, out: Tensor) -> None:
    scatter(a, dim, index, torch.full(index.shape, value, dtype=a.dtype), mode, out)


@kernel("aclnnInplaceScatterValue", "titSi")
def scatter_value_(a: Tensor, dim: int, index: Tensor, value: Any, mode: int) -> None:
    scatter_value(a, dim, index, value, mode, a)


@kernel("aclnnScatterAdd", "tittt")
def scatter_add(a: Tensor, dim: int, index: Tensor, value: Tensor, out: Tensor) -> None:
    scatter(a, dim, index, value, 1, out)


@kernel("aclnnScatterNdUpdate", "ttt")
def scatter_nd(a: Tensor, index: Tensor, value: Tensor) -> None:
    """op-plugin npu_scatter_nd_update_: rows of the first axes; places distinct."""
    for dim, each in enumerate(index.unbind(-1)):
        need_range("indices", each, a.shape[dim])
    rows = index.reshape(-1, index.shape[-1])
    need(rows.unique(dim=0).shape[0] == rows.shape[0], "indices must be distinct", rows.tolist())
    a[tuple(index.long().unbind(-1))] = value


@kernel("aclnnIndexCopy", "tittt")
def index_copy(a: Tensor, dim: int, index: Tensor, value: Tensor, out: Tensor) -> None:
    need_range("index", index, a.shape[dim])
    write(out, a.index_copy(dim, index.long(), value))


@kernel("aclnnInplaceIndexCopy", "titt")
def index_copy_(a: Tensor, dim: int, index: Tensor, value: Tensor) -> None:
    need_range("index", index, a.shape[dim])
    a.index_copy_(dim, index.long(), value)


@kernel("aclnnIndexAdd", "tittSt")
def index_add(a: Tensor, dim: int, index: Tensor, value: Tensor, alpha: Any, out: Tensor) -> None:
    need_range("index", index, a.shape[dim])
    write(out, wide(a).index_add(dim, index.long(), wide(value), alpha=alpha))


@kernel("aclnnOneHot", "tittit")
def one_hot(index: Tensor, classes: int, on: Tensor, off: Tensor, axis: int, out: Tensor) -> None:
    write(out, (index[..., None] == torch.arange(classes)).to(out.dtype))


@kernel("aclnnBincount", "ttit")
def bincount(a: Tensor, weights: Tensor | None, least: int, out: Tensor) -> None:
    need_range("self", a, out.shape[0])
    write(out, a.long().bincount(weights, minlength=least).to(out.dtype))


@kernel("aclnnReduceSum", "tIbjt")
def reduce_sum(a: Tensor, dims: list[int], keep: bool, dtype: int, out: Tensor) -> None:
    wide_a = wide(a) if out.dtype.is_floating_point else a.to(out.dtype)
    write(out, wide_a.sum(axes(a, dims), keepdim=keep).to(out.dtype))


@kernel("aclnnMean", "tIbjt")
def mean(a: Tensor, dims: list[int], keep: bool, dtype: int, out: Tensor) -> None:
    write(out, wide(a).mean(axes(a, dims), keepdim=keep))


kernel("aclnnAmax", "tIbt")(lambda a, dims, keep, out: write(out, a.amax(axes(a, dims), keep)))
kernel("aclnnAmin", "tIbt")(lambda a, dims, keep, out: write(out, a.amin(axes(a, dims), keep)))
kernel("aclnnMax", "tt")(lambda a, out: write(out, a.max()))
kernel("aclnnMin", "tt")(lambda a, out: write(out, a.min()))
kernel("aclnnArgMax", "tibt")(lambda a, dim, keep, out: write(out, a.argmax(dim, keep)))
kernel("aclnnArgMin", "tibt")(lambda a, dim, keep, out: write(out, a.argmin(dim, keep)))
kernel("aclnnAny", "tIbt")(lambda a, dims, keep, out: write(out, a.bool().any(axes(a, dims), keep)))
kernel("aclnnAll", "tIbt")(lambda a, dims, keep, out: write(out, a.bool().all(axes(a, dims), keep)))
kernel("aclnnCumsum", "tijt")(lambda a, dim, dtype, out: write(out, wide(a).cumsum(dim)))
kernel("aclnnEqual", "ttt")(lambda a, b, out: out.fill_(torch.equal(a, b)))


@kernel("aclnnMaxDim", "tibtt")
def max_dim(a: Tensor, dim: int, keep: bool, out: Tensor, index: Tensor) -> None:
    found = a.max(dim, keep)
    write(out, found.values)
    write(index, found.indices)


@kernel("aclnnMinDim", "tibtt")
def min_dim(a: Tensor, dim: int, keep: bool, out: Tensor, index: Tensor) -> None:
    found = a.min(dim, keep)
    write(out, found.values)
    write(index, found.indices)


@kernel("aclnnTopk", "tiibbtt")
def topk(
    a: Tensor, k: int, dim: int, largest: bool, order: bool, out: Tensor, index: Tensor
) -> None:
    """Of equal values the lower index comes first."""
    found = torch.sort(a, dim=dim, descending=largest, stable=True)
    write(out, found.values.narrow(dim, 0, k))
    write(index, found.indices.narrow(dim, 0, k))


@kernel("aclnnTopkV2", "tiibbitt")
def topk_v2(
    a: Tensor, k: int, dim: int, largest: bool, order: bool, mode: int, out: Tensor, index: Tensor
) -> None:
    """The sixth argument is 1 in every call of the wheel; no header of it is public."""
    topk(a, k, dim, largest, order, out, index)


@kernel("aclnnSort", "tbibtt")
def sort(a: Tensor, stable: bool, dim: int, down: bool, out: Tensor, index: Tensor) -> None:
    found = torch.sort(a, dim=dim, descending=down, stable=True)
    write(out, found.values)
    write(index, found.indices)


kernel("aclnnSoftmax", "tit")(lambda a, dim, out: write(out, torch.softmax(wide(a), dim)))
kernel("aclnnLogSoftmax", "tit")(lambda a, dim, out: write(out, torch.log_softmax(wide(a), dim)))
kernel("aclnnLogSumExp", "tIbt")(
    lambda a, dims, keep, out: write(out, torch.logsumexp(wide(a), axes(a, dims), keep))
)

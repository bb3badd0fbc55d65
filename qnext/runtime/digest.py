"""A name for the weights of a model, the same whether one process holds them or several ranks."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qnext.functional.config import Config
from qnext.functional.mesh import Mesh
from qnext.functional.params import Params
from qnext.functional.shard import divided_dim
from qnext.shapes import annotated_leaves

SAMPLES = 4096  # numbers of a tensor that tell it from another
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
# odd numbers of 63 bits, so that products fill all bits of a sum
FIRST, SECOND = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9


def weights_digest(params: Params, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> str:
    """A hash of the config and of numbers out of every tensor, wherever they are.

    total: the sum of every rank's numbers, where ranks hold parts of the tensors.
    """
    config = params.config
    sizes = replace(config, mesh=Mesh()).axes
    leaves = list(annotated_leaves(params, ""))
    whole = [
        tuple(sizes.get(axis, size) for axis, size in zip(hint.axes, leaf.shape, strict=True))
        for _, leaf, hint in leaves
    ]
    sums = [
        _sum(leaf.detach(), shape, hint.axes, config)
        for (_, leaf, hint), shape in zip(leaves, whole, strict=True)
    ]
    digest = hashlib.sha256(config.fingerprint.encode())
    totals = total(torch.stack(sums)).tolist()
    for (path, leaf, _), shape, number in zip(leaves, whole, totals, strict=True):
        digest.update(f"{path} {leaf.dtype} {list(shape)} {number}".encode())
    return digest.hexdigest()[:32]


def _sum(leaf: Tensor, whole: tuple[int, ...], axes: tuple[str, ...], config: Config) -> Tensor:
    """Of some numbers of the whole tensor those that this rank tells of, mixed with their places.

    int64, and wraps; a number that several ranks hold is told by the first of them.
    """
    count = torch.Size(whole).numel()
    index = torch.arange(0, count, max(count // SAMPLES, 1))
    dim = divided_dim(axes, config)
    if dim is None:
        index = index if config.mesh.rank == 0 else index[:0]
        place = index
    else:
        inner = torch.Size(whole[dim + 1 :]).numel()
        outer, along, rest = (
            index // inner // whole[dim],
            index // inner % whole[dim],
            index % inner,
        )
        local = _told(whole[dim], axes[dim], config)[along]
        place = ((outer * leaf.shape[dim] + local) * inner + rest)[local >= 0]
        index = index[local >= 0]
    some = leaf.flatten()[place.to(leaf.device)].cpu()
    bits = some.view(INTEGERS[some.itemsize]).to(torch.int64)
    mixed = (bits * FIRST + index + 1) * SECOND
    return ((mixed ^ (mixed >> 29)) * FIRST).sum()


def _told(size: int, axis: str, config: Config) -> Tensor:
    """Where each place of a divided axis lies in this rank's part; -1: another rank tells of it."""
    local, at = torch.full((size,), -1), 0
    for span in config.mesh.spans(config.divided[axis]):
        local[span.start : sum(span)] = torch.arange(at, at + span.size)
        at += span.size
    for rank in range(config.mesh.rank):
        for span in replace(config.mesh, rank=rank).spans(config.divided[axis]):
            local[span.start : sum(span)] = -1
    return local

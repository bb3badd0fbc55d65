"""Params as a checkpoint that `load`, transformers and compressed-tensors read."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qnext.errors import InputError
from qnext.functional.checkpoint.formats import DESCRIPTION
from qnext.functional.checkpoint.plan import scale_of
from qnext.functional.checkpoint.shards import INDEX, replacing, write_json
from qnext.functional.checks import params_mismatches
from qnext.functional.layout import Piece, layout
from qnext.functional.mesh import Mesh
from qnext.functional.params import Params, Quantized, matrices
from qnext.functional.scheme import quantization_config
from qnext.functional.tree import leaves_with_paths


def save(params: Params, path: str | Path, *, max_shard_bytes: int = 5 << 30) -> None:
    """Write a checkpoint that `load` and transformers read: config.json and *.safetensors.

    Int8 matrices are written as compressed-tensors' `int-quantized`, the rest is in the config's
    `ignore`. Files appear under their names only when they are complete; older model files that
    are not part of this checkpoint are removed last. Raises InputError for broken params.
    """
    path = Path(path)
    if wrong := params_mismatches(params):
        raise InputError("params do not fit their config:\n  " + "\n  ".join(wrong))
    if params.config.mesh != Mesh():
        raise InputError("params are one rank's part: save those of the whole model")
    path.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[Tensor, Piece]]] = [[]]
    size = 0
    for together in _tensors(params):
        nbytes = sum(leaf.itemsize * torch.Size(piece.shape).numel() for leaf, piece in together)
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += together
        size += nbytes
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]
    weight_map: dict[str, str] = {}
    index = path / f"model{INDEX}"
    with replacing() as new:
        for name, shard in zip(names, shards, strict=True):
            tensors = {p.name: _written(t, p) for t, p in shard}
            save_file(tensors, new(path / name), {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        if count > 1:
            total = sum(leaf.nbytes for _, leaf in leaves_with_paths(params))
            write_json(new(index), {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(new(path / "config.json"), params.config.to_hf() | quantised(params))
    older = {*path.glob("model*.safetensors"), index, path / DESCRIPTION}
    for stale in older - {path / n for n in names}:
        if not (stale == index and count > 1):
            stale.unlink(missing_ok=True)


def quantised(params: Params) -> dict[str, object]:
    """What config.json says of int8 matrices; nothing where there are none."""
    int8 = {path for path, leaf in matrices(params) if isinstance(leaf, Quantized)}
    kept = [entry for entry in layout(params.config) if entry.path not in int8]
    names = [piece.name for entry in kept for piece in entry.ways[0]]
    return {"quantization_config": quantization_config(names)} if int8 else {}


def _tensors(params: Params) -> Iterator[list[tuple[Tensor, Piece]]]:
    """Each tensor to store, as the leaf and the piece of it; int8 together with its scales."""
    leaves = dict(leaves_with_paths(params))
    for entry in layout(params.config):
        for piece in entry.ways[0]:
            if entry.path in leaves:
                yield [(leaves[entry.path], piece)]
            else:
                weight, scale = leaves[f"{entry.path}.weight"], leaves[f"{entry.path}.scale"]
                yield [(weight, piece), (scale, scale_of(piece))]


def _written(leaf: Tensor, piece: Piece) -> Tensor:
    tensor = piece.written_from(leaf).detach().contiguous().cpu()
    return tensor[:, None] if piece.name.endswith("_scale") else tensor

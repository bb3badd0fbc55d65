"""Checkpoints read and written without qnext, to compare with."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import qnext as qn
from qnext.functional.tree import leaves_with_paths

Tensors = dict[str, Tensor]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read(path: Path) -> Tensors:
    """Every tensor of a checkpoint directory."""
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def write(path: Path, tensors: Tensors, config: dict[str, Any], shards: int = 1) -> Path:
    """A checkpoint written without qnext."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    files = [f"part-{i}.safetensors" for i in range(shards)] if shards > 1 else [SINGLE]
    where = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        held = {k: v.clone() for k, v in tensors.items() if where[k] == file}
        save_file(held, path / file)
    if shards > 1:
        (path / INDEX).write_text(json.dumps({"weight_map": where}))
    return path


def assert_same(got: qn.Params, want: qn.Params) -> None:
    """Equal bit for bit, in the same dtypes."""
    assert got.config == want.config
    for (path, a), (_, b) in zip(leaves_with_paths(got), leaves_with_paths(want), strict=True):
        assert a.dtype == b.dtype and a.equal(b), path


def files(path: Path) -> dict[str, str]:
    """All that is in a directory, hidden things too; digests, so that a difference prints well."""
    found = {str(f.relative_to(path)): f for f in path.rglob("*")}
    held = {name: f.read_bytes() if f.is_file() else b"" for name, f in found.items()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in held.items()}

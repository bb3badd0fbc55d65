"""The files of a checkpoint: what their headers announce, and how new ones take their names."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from qnext.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
}
FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
INDEX = ".safetensors.index.json"


class Stored(NamedTuple):
    """A tensor as a shard's header announces it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    begin: int  # bytes of the file before it

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


def refusal(path: Path, wrong: list[str], most: int = 40) -> CheckpointError:
    """The error that lists everything that is wrong with a checkpoint."""
    more = [f"... and {len(wrong) - most} more"] if len(wrong) > most else []
    lines = "\n  ".join(wrong[:most] + more)
    return CheckpointError(f"{path} does not hold the model of its config.json:\n  {lines}")


def inventory(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor that the shards' headers announce, and what is wrong with shards and index."""
    wrong: list[str] = []
    index = _the_one(path, "model" + INDEX, "*" + INDEX)
    single = _the_one(path, "model.safetensors", "*.safetensors")
    if index is not None:
        weight_map = _weight_map(index)
        files = sorted({path / name for name in weight_map.values()})
    elif single is not None:
        weight_map, files = None, [single]
    else:
        raise CheckpointError(
            f"{path} is no checkpoint: it has neither model.safetensors nor model{INDEX}"
        )
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            stored |= headers(file)
        except FileNotFoundError:
            named = index.name if index else path.name
            wrong.append(f"missing shard: {file.name}, named by {named}")
        except (SafetensorError, OSError) as error:
            wrong.append(f"corrupt or truncated shard: {file.name} ({error})")
    if wrong:  # tensor by tensor, everything in a lost shard would be missing: say the cause only
        raise refusal(path, wrong)
    if weight_map is not None and index is not None:
        wrong += _index_differences(weight_map, stored, index.name)
    return stored, wrong


def headers(file: Path) -> dict[str, Stored]:
    """What one shard's header announces."""
    with safe_open(file, framework="pt") as shard:
        parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (no mapping)
    begins = _begins(file)
    return {
        name: Stored(file, tuple(part.get_shape()), part.get_dtype(), begins[name])
        for name, part in parts.items()
    }


def _begins(file: Path) -> dict[str, int]:
    """Where the tensors of a shard begin, which the safetensors package has found sound."""
    with file.open("rb") as shard:
        size = int.from_bytes(shard.read(8), "little")
        header = json.loads(shard.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + told["data_offsets"][0] for name, told in header.items()}


def _the_one(path: Path, name: str, pattern: str) -> Path | None:
    """The file of the usual name, or the only one of its kind: ModelSlim names its own way."""
    if (path / name).is_file():
        return path / name
    found = sorted(path.glob(pattern))
    return found[0] if len(found) == 1 else None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index: it must hold a JSON object with a weight_map ({error!r})"
        ) from error


def _index_differences(
    weight_map: dict[str, str], stored: dict[str, Stored], index: str
) -> Iterator[str]:
    for name, file in sorted(weight_map.items()):
        if name not in stored or stored[name].file.name != file:
            yield f"wrong index entry: {name} is not in {file}, where {index} says it is"
    for name in sorted(set(stored) - set(weight_map)):
        yield f"missing index entry: {name} is in {stored[name].file.name} but not in {index}"


def partial_name(file: Path) -> Path:
    """What a file is called until it is complete."""
    return file.with_name(f".{file.name}.partial")


@contextmanager
def replacing() -> Iterator[Callable[[Path], Path]]:
    """Write files to `new(file)`; all take their names, over older ones, once all are written."""
    parts: dict[Path, Path] = {}

    def new(file: Path) -> Path:
        return parts.setdefault(file, partial_name(file))

    try:
        yield new
        for file, part in parts.items():
            part.replace(file)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

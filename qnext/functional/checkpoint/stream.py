"""Tensors read and written some rows at a time, so that memory stays small whatever their size.

The safetensors package writes a file from tensors that are all in memory. `ShardWriter` writes the
same format (github.com/huggingface/safetensors, "Format") without that; the package reads it back.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from qnext.errors import CheckpointError
from qnext.functional.checkpoint.shards import DTYPES, Stored, headers

READ_AT_ONCE = 8 << 20  # bytes of a tensor read together


class Reader:
    """Rows of stored tensors. No mapping: its pages would count as memory in use."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows begin..end of a tensor, or as many as there are."""
        stored = self._stored[name]
        count, *rest = stored.shape
        rows = torch.empty((min(end, count) - begin, *rest), dtype=DTYPES[stored.dtype])
        self.read(name, begin, rows)
        return rows

    def read(self, name: str, begin: int, out: Tensor) -> bool:
        """Fill `out` with the rows from `begin` on; False where it cannot hold them as stored."""
        stored = self._stored[name]
        as_stored = out.dtype == DTYPES.get(stored.dtype)
        if not (as_stored and out.device.type == "cpu" and out.is_contiguous()):
            return False
        row_bytes = stored.nbytes // max(stored.shape[0], 1)
        memory = out.view(torch.uint8).numpy().data.cast("B")
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.begin + begin * row_bytes)
            while memory and (count := file.readinto(memory)):
                memory = memory[count:]
        if memory:
            raise CheckpointError(f"{stored.file} ends within {name}: it became shorter meanwhile")
        return True


def rows_at_once(row_bytes: int) -> int:
    """How many rows of this size are read together."""
    return max(READ_AT_ONCE // max(row_bytes, 1), 1)


class Spec(NamedTuple):
    """A tensor to be written, in the words of the format."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


class ShardWriter:
    """One safetensors file, its tensors written by runs of rows, each tensor's rows in order."""

    def __init__(self, file: Path, specs: Mapping[str, Spec]) -> None:
        # wide dtypes first: then every tensor begins at a multiple of its item size
        order = sorted(specs, key=lambda name: (-DTYPES[specs[name].dtype].itemsize, name))
        self.specs, self._begin, end = specs, dict[str, int](), 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name in order:
            begin, end = end, end + specs[name].nbytes
            self._begin[name] = begin
            header[name] = {
                "dtype": specs[name].dtype,
                "shape": list(specs[name].shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._written = dict.fromkeys(specs, 0)
        self.checksums = dict.fromkeys(specs, 0)
        self._file = file.open("wb")
        self._data = 8 + len(text)
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
        except OSError:
            self.abandon()
            raise

    def write(self, name: str, rows: Tensor) -> None:
        """The next rows of a tensor."""
        data = rows.detach().contiguous().cpu().view(torch.uint8).numpy().data.cast("B")
        self._file.seek(self._data + self._begin[name] + self._written[name])
        self._file.write(data)
        self._written[name] += len(data)
        self.checksums[name] = zlib.crc32(data, self.checksums[name])

    def close(self) -> None:
        """Bring everything to the disk; raises CheckpointError where rows are missing."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for name, spec in self.specs.items():
            if self._written[name] != spec.nbytes:
                raise CheckpointError(
                    f"{name} has {self._written[name]} of {spec.nbytes} bytes in {self._file.name}"
                )

    def abandon(self) -> None:
        """Close what is not finished; a full disk refuses the last of it once more."""
        try:
            self._file.close()
        except OSError:
            self._file.raw.close()


def verify(file: Path, specs: Mapping[str, Spec], checksums: Mapping[str, int]) -> None:
    """Read a shard back; raise CheckpointError unless it holds exactly what was written."""
    try:
        stored = headers(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} reads back other than it was written: {error}") from error
    told = {name: Spec(have.dtype, have.shape) for name, have in stored.items()}
    if told != dict(specs):
        raise CheckpointError(f"{file} does not announce the tensors that were written to it")
    reader = Reader(stored)
    for name, spec in specs.items():
        count = spec.shape[0] if spec.shape else 1
        step, checksum = rows_at_once(spec.nbytes // max(count, 1)), 0
        for begin in range(0, count, step):
            rows = reader.rows(name, begin, begin + step)
            checksum = zlib.crc32(
                rows.contiguous().view(torch.uint8).numpy().data.cast("B"), checksum
            )
        if checksum != checksums[name]:
            raise CheckpointError(f"{name} in {file} reads back other than it was written")

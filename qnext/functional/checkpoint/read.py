"""A checkpoint as Params, float or int8."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from qnext.errors import CheckpointError, InputError
from qnext.functional.checkpoint.formats import announced
from qnext.functional.checkpoint.mapped import Pages, Run, mappable
from qnext.functional.checkpoint.plan import Part, offset_of, plan, scale_of
from qnext.functional.checkpoint.shards import FLOATS, Stored, inventory, refusal
from qnext.functional.checkpoint.stream import Reader, rows_at_once
from qnext.functional.config import Config
from qnext.functional.layout import Piece, held
from qnext.functional.mesh import Mesh
from qnext.functional.params import Params, empty_params, quantized_specs
from qnext.functional.tree import leaves_with_paths, rebuild
from qnext.shapes import annotated_leaves

READERS = 4  # leaves read side by side: a disk answers several questions sooner than one


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    mapped: bool = False,
    check_finite: bool = False,
    progress: bool | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Params of a Hugging Face checkpoint directory (config.json and *.safetensors).

    Int8 matrices, as compressed-tensors (`int-quantized`) or ModelSlim (W8A8_DYNAMIC) store them,
    become `Quantized` leaves. Rows are read where they belong, so that peak memory stays near the
    model's size. `dtype` converts floating tensors (default: as stored; `A_log`, `dt_bias` and
    scales stay float32); `check_finite` reads all and also refuses NaN and infinity; `progress`
    shows a bar (default: on a terminal). With a `mesh` only what its rank holds is read, see
    `shard`. Raises ConfigError for the config, CheckpointError listing everything else that is
    wrong.

    With `mapped` large leaves stored as they are needed are, for the CPU on Linux, pages of the
    files instead (copy on write): sooner there, and of an embedding only the rows that are asked
    for. But nobody may change the files in place while the params live, a disk that cannot give
    such a row ends the process, and eager PyTorch's last bits may be others, as they depend on
    where in a cache line a matrix begins.
    """
    path, device = Path(path), torch.device(device or "cpu")
    if dtype is not None and dtype not in FLOATS.values():
        raise InputError(f"dtype must be one of {[*FLOATS.values()]}, got {dtype}")
    config, stored, parts = examine(path, dtype)
    if mesh is not None:
        config, parts = _of_rank(config, parts, mesh)
    params = quantized_specs(empty_params(config, "meta"), {p.path for p in parts if p.int8})
    specs = dict(leaves_with_paths(params))
    runs = dict[str, list[Run]]()
    if mapped and device.type == "cpu":
        unread = [leaf for part in parts for leaf in _leaves(part, check_finite) if not leaf.finite]
        runs = mappable([(leaf.path, specs[leaf.path], leaf.pieces) for leaf in unread], stored)

    def bring(part: Part) -> tuple[dict[str, Tensor], list[str]]:
        reader, brought, wrong = Reader(stored), dict[str, Tensor](), list[str]()
        for path, pieces, finite in _leaves(part, check_finite):
            if path in runs:
                continue
            spec = specs[path]  # `empty_like` of a meta tensor would import sympy: a second
            brought[path] = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            wrong += _fill(brought[path], pieces, reader, finite)
        return brought, [*wrong, *_offsets(part, stored, reader)]

    leaves, wrong = dict[str, Tensor](), list[str]()
    hidden = None if progress is None else not progress
    total = sum(spec.nbytes for spec in specs.values())
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="load", disable=hidden) as bar,
        ThreadPoolExecutor(READERS) as readers,
        Pages() as pages,
    ):
        by_rows = () if config.tie_word_embeddings else (".embed",)  # tied, it is the head as well
        leaves |= {name: pages.leaf(specs[name], runs[name], name in by_rows) for name in runs}
        others = readers.map(bring, parts)
        pages.bring_in(bar.update)
        for brought, lines in others:
            bar.update(sum(leaf.nbytes for leaf in brought.values()))
            leaves |= brought
            wrong += lines
    if wrong:
        raise refusal(path, wrong)
    return rebuild(params, [leaves[name] for name in specs])


def _of_rank(config: Config, parts: list[Part], mesh: Mesh) -> tuple[Config, list[Part]]:
    """The config of a rank, and what fills its leaves."""
    whole = annotated_leaves(empty_params(config, "meta"), "")
    axes = {path: hint.axes for path, _, hint in whole}
    config = replace(config, mesh=mesh)
    return config, [p._replace(pieces=held(p.pieces, axes[p.path], config)) for p in parts]


def examine(
    path: Path, dtype: torch.dtype | None = None
) -> tuple[Config, dict[str, Stored], list[Part]]:
    """Everything that headers tell of a checkpoint: config, tensors, and what fills which leaf.

    Raises as `load` does, before any weight is read.
    """
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the directory that holds it")
    config = Config.from_hf(path)
    stored, wrong = inventory(path)
    if any(name.startswith("mtp.") for name in stored):
        config = replace(config, mtp_layers=1)
    elif config.mtp_layers:
        config = replace(config, mtp_layers=0)
    compute = dtype or _stored_dtype(stored)
    config = config.with_precision(compute=compute, logits=compute)
    values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    parts, more = plan(config, stored, announced(path, values), convert=dtype is not None)
    if wrong or more:
        raise refusal(path, wrong + more)
    return config, stored, parts


def _stored_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """The checkpoint's dtype: that of its embedding."""
    embed = stored.get("model.embed_tokens.weight")
    return FLOATS.get(embed.dtype, torch.float32) if embed else torch.float32


class _Leaf(NamedTuple):
    path: str
    pieces: tuple[Piece, ...]  # that fill it
    finite: bool  # whether values must be


def _leaves(part: Part, check_finite: bool) -> Iterator[_Leaf]:
    """The tensors of a part."""
    if not part.int8:
        yield _Leaf(part.path, part.pieces, check_finite)
        return
    yield _Leaf(f"{part.path}.weight", part.pieces, False)
    # a converter without a guard makes NaN of a row of zeros: scales are always looked at
    yield _Leaf(f"{part.path}.scale", tuple(map(scale_of, part.pieces)), True)


def _fill(leaf: Tensor, pieces: tuple[Piece, ...], reader: Reader, finite: bool) -> Iterator[str]:
    """Copy pieces into a leaf; yields a line for each piece that had to be finite and is not."""
    for piece in pieces:
        count = piece.rows[0].size if piece.is_plain else piece.shape[0]
        row_bytes = leaf.itemsize * piece.target(leaf)[0].numel()
        step = rows_at_once(row_bytes) if piece.is_plain else count
        good = True
        for first in range(0, count, step):
            rows = _rows(leaf, piece, reader, first, min(step, count - first))
            good = good and (not finite or bool(rows.to(leaf.dtype).isfinite().all()))
        if not good:
            yield f"not finite: {piece.name}"


def _rows(leaf: Tensor, piece: Piece, reader: Reader, first: int, count: int) -> Tensor:
    """Bring rows of a piece into a leaf: as they are where they lie together, or else by a copy."""
    begin = first
    if piece.is_plain:
        begin += piece.rows[0].offset
        place = piece.place_in(leaf, first, count)
        if reader.read(piece.name, begin, place):
            return place
    rows = reader.rows(piece.name, begin, begin + count)
    piece.read_into(leaf, rows, first)
    return rows


def _offsets(part: Part, stored: dict[str, Stored], reader: Reader) -> Iterator[str]:
    """A line for each offset that is not zero: the scheme is symmetric."""
    rows = {offset_of(piece): piece.shape[0] for piece in part.pieces if part.int8}
    for name, count in rows.items():
        if name in stored and bool(reader.rows(name, 0, count).any()):
            yield f"not symmetric: {name} is not zero"

"""A checkpoint quantised file by file: the model need not fit into memory.

Each shard of the source becomes a shard of the result, written under another name, read back,
renamed, and noted in a journal. If the work is cut off, the same command goes on where it was.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from qnext.errors import CheckpointError, InputError
from qnext.functional.checkpoint.formats import DESCRIPTION
from qnext.functional.checkpoint.plan import Part
from qnext.functional.checkpoint.read import examine
from qnext.functional.checkpoint.shards import INDEX, Stored, partial_name, replacing, write_json
from qnext.functional.checkpoint.stream import Reader, ShardWriter, Spec, rows_at_once, verify
from qnext.functional.config import Config
from qnext.functional.layout import Piece, layout
from qnext.functional.params import empty_params, matrices
from qnext.functional.quantize import CHOICES, dequantize, kept_paths, quantize_rows
from qnext.functional.scheme import quantization_config

JOURNAL, BEGUN = ".quantize", "source.json"  # what is done while not all is, and of what
# how files end that are not copied: weights, and what is said of them
REPLACED = (".safetensors", INDEX, ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", DESCRIPTION)
SPARE = 64 << 20  # bytes that must stay free beside the weights: config, tokenizer, journal


class Run(NamedTuple):
    """Rows of a stored tensor (of one expert's part of it) and the tensor they are stored as."""

    source: str
    expert: int | None
    begin: int
    end: int
    target: str


@dataclass
class Summary:
    """What became of a checkpoint's tensors."""

    quantised: int = 0
    kept: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    zero_rows: int = 0  # output channels that are zero throughout
    worst: float = 0.0  # relative RMS error of a matrix, and its name
    worst_name: str = ""

    def __iadd__(self, other: "Summary") -> "Summary":
        if other.worst > self.worst:
            self.worst, self.worst_name = other.worst, other.worst_name
        for name in ("quantised", "kept", "bytes_before", "bytes_after", "zero_rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


@dataclass
class Shard:
    """One file of the source and what is to be made of it."""

    file: Path
    name: str  # of the file to be written
    copied: list[str] = field(default_factory=list)
    quantised: list[Run] = field(default_factory=list)

    def specs(self, stored: Mapping[str, Stored]) -> dict[str, Spec]:
        """The tensors that the new file holds."""
        specs = {name: Spec(stored[name].dtype, stored[name].shape) for name in self.copied}
        for run in self.quantised:
            rows = run.end - run.begin
            specs[run.target] = Spec("I8", (rows, stored[run.source].shape[-1]))
            specs[f"{run.target}_scale"] = Spec("F32", (rows, 1))
        return specs


def convert(
    source: str | Path,
    target: str | Path,
    ignore: Collection[str] | None = None,
    choice: str = "default",
    progress: bool | None = None,
) -> Summary:
    """Quantise the checkpoint `source` to W8A8 into the directory `target`.

    Writes compressed-tensors' `int-quantized` and copies tokenizer and config. `ignore` as in
    `quantize`; without it the matrices of a `choice` (of `CHOICES`) are kept. `progress` shows a
    bar (default: on a terminal). A run that was cut off is gone on with. Raises CheckpointError
    for a source that does not load, a target that holds something else, and a disk with too
    little room; InputError for a wrong `ignore`.
    """
    source, target = Path(source), Path(target)
    if choice not in CHOICES:
        raise InputError(f"choice must be one of {[*CHOICES]}, got {choice!r}")
    config, stored, parts = examine(source)
    if done := next((part.pieces[0].name for part in parts if part.int8), None):
        raise CheckpointError(f"{source} is quantised already: {done} is int8")
    shards = _shards(config, parts, stored, kept_paths(config, ignore, choice))
    kept = [name for shard in shards for name in shard.copied]
    hidden = None if progress is None else not progress
    total, summary = sum(have.nbytes for have in stored.values()), Summary()
    try:
        with _journal(source, target, kept) as journal:
            _need_room(target, shards, stored, journal)
            with tqdm(
                total=total, unit="B", unit_scale=True, desc="quantize", disable=hidden
            ) as bar:
                for shard in shards:
                    before = journal.summary(shard)
                    summary += before or _made(shard, stored, target, journal, bar)
                    bar.update(before.bytes_before if before else 0)
            _finish(source, target, shards, stored, kept)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error}. What was finished is kept; make room and run "
            "the same command again"
        ) from error
    return summary


def _shards(
    config: Config, parts: list[Part], stored: dict[str, Stored], kept: Collection[str]
) -> list[Shard]:
    """What is to be made of each file."""
    files = sorted({have.file for have in stored.values()})
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else ["model.safetensors"]
    shards = {file: Shard(file, name) for file, name in zip(files, names, strict=True)}
    chosen = {path for path, _ in matrices(empty_params(config, "meta"))} - set(kept)
    published = {entry.path: entry.ways[0] for entry in layout(config)}
    for part in parts:
        for piece in part.pieces:
            shard = shards[stored[piece.name].file]
            if part.path in chosen:
                shard.quantised += _runs(piece, published[part.path])
            else:
                shard.copied.append(piece.name)
    return list(shards.values())


def _runs(piece: Piece, published: tuple[Piece, ...]) -> Iterator[Run]:
    """A matrix as it is; stacked experts one by one, as checkpoints are published."""
    if len(piece.shape) == 2:
        yield Run(piece.name, None, 0, piece.shape[0], piece.name)
        return
    for each in published:
        rows = each.rows[0]
        yield Run(piece.name, each.expert, rows.start, rows.start + rows.size, each.name)


def _made(
    shard: Shard, stored: dict[str, Stored], target: Path, journal: "Journal", bar: Any
) -> Summary:
    """Write, read back, rename and note one shard; a file that is cut short is removed."""
    file, specs = target / shard.name, shard.specs(stored)
    partial, summary = partial_name(file), Summary(kept=len(shard.copied))
    writer = None
    try:
        writer = ShardWriter(partial, specs)
        reader = Reader(stored)
        for name in shard.copied:
            for rows in _rows(
                reader, stored[name], Run(name, None, 0, stored[name].shape[0], name)
            ):
                writer.write(name, rows)
                bar.update(rows.nbytes)
        for run in shard.quantised:
            summary += _quantised(reader, stored[run.source], run, writer, bar)
        writer.close()
        verify(partial, specs, writer.checksums)
        partial.replace(file)
    finally:
        if writer is not None:
            writer.abandon()
        partial.unlink(missing_ok=True)
    names = {*shard.copied, *(run.source for run in shard.quantised)}
    summary.bytes_before = sum(stored[name].nbytes for name in names)
    summary.bytes_after = sum(spec.nbytes for spec in specs.values())
    journal.note(shard, summary)
    return summary


def _rows(reader: Reader, have: Stored, run: Run) -> Iterator[Tensor]:
    """The rows of a run, some at a time."""
    if run.expert is not None:
        yield reader.rows(run.source, run.expert, run.expert + 1)[0, run.begin : run.end]
        return
    step = rows_at_once(have.nbytes // max(have.shape[0], 1))
    for begin in range(run.begin, run.end, step):
        yield reader.rows(run.source, begin, min(begin + step, run.end))


def _quantised(reader: Reader, have: Stored, run: Run, writer: ShardWriter, bar: Any) -> Summary:
    """Quantise the rows of one matrix; its summary."""
    summary, wrong, total = Summary(quantised=1, worst_name=run.target), 0.0, 0.0
    for rows in _rows(reader, have, run):
        made = quantize_rows(rows, run.target)
        writer.write(run.target, made.weight)
        writer.write(f"{run.target}_scale", made.scale[:, None])
        exact = rows.double()
        wrong += float((dequantize(made, torch.float64) - exact).square().sum())
        total += float(exact.square().sum())
        summary.zero_rows += int((made.weight == 0).all(-1).sum())
        bar.update(rows.nbytes)
    summary.worst = (wrong / total) ** 0.5 if total else 0.0
    return summary


class Journal:
    """What of a conversion is done: a file a shard, written after the shard has its name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def summary(self, shard: Shard) -> Summary | None:
        """The summary of a shard that is done."""
        note = _read(self._folder / f"{shard.name}.json")
        return Summary(**note) if note and (self._folder.parent / shard.name).is_file() else None

    def note(self, shard: Shard, summary: Summary) -> None:
        with replacing() as new:
            write_json(new(self._folder / f"{shard.name}.json"), asdict(summary))


def _read(file: Path) -> Any:
    """What a file of the journal holds; None where there is none, or one that power cut off."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


@contextmanager
def _journal(source: Path, target: Path, kept: list[str]) -> Iterator[Journal]:
    """The journal in `target`, new or of the same work; nobody else may work there meanwhile.

    It goes when the work is done, and when it fails before anything was.
    """
    folder = target / JOURNAL
    _check_target(source, target, folder)
    identity = {
        "kept": kept,
        "files": [
            [file.name, file.stat().st_size, file.stat().st_mtime_ns]
            for file in sorted(source.glob("*.safetensors"))
        ],
    }
    fresh = not target.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            if (begun := _read(folder / BEGUN)) not in (None, identity):
                raise CheckpointError(
                    f"{target} holds the beginning of another conversion (another source, or "
                    "another choice of what to ignore); empty it or give a new directory"
                )
            try:
                if begun is None:
                    with replacing() as new:
                        write_json(new(folder / BEGUN), identity)
                yield Journal(folder)
            except BaseException:
                if not any(target.glob("*.safetensors")):
                    shutil.rmtree(target if fresh else folder)
                raise
            shutil.rmtree(folder)
    except Timeout:
        raise CheckpointError(f"another process is writing to {target}") from None


def _check_target(source: Path, target: Path, folder: Path) -> None:
    if target.is_file():
        raise CheckpointError(f"{target} is a file; give a directory to write to")
    if target.exists() and target.resolve() == source.resolve():
        raise InputError(f"{target} is the source itself; give another directory to write to")
    if target.is_dir() and any(target.iterdir()) and not folder.is_dir():
        raise CheckpointError(f"{target} is not empty; give a new directory, or empty it")


def _need_room(
    target: Path, shards: list[Shard], stored: dict[str, Stored], journal: Journal
) -> None:
    """Refuse a disk that cannot hold what is still to be written."""
    left = [shard for shard in shards if journal.summary(shard) is None]
    for shard in left:  # of a run that was killed
        partial_name(target / shard.name).unlink(missing_ok=True)
    need = sum(spec.nbytes for shard in left for spec in shard.specs(stored).values()) + SPARE
    free = shutil.disk_usage(target).free
    if free < need:
        raise CheckpointError(
            f"{target} is on a disk with {free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are "
            "still to be written"
        )


def _finish(
    source: Path, target: Path, shards: list[Shard], stored: dict[str, Stored], kept: list[str]
) -> None:
    """Everything but the weights; config.json comes last, and makes it a checkpoint."""
    with replacing() as new:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(REPLACED):
                shutil.copyfile(file, new(target / file.name))
        if len(shards) > 1:
            where = {name: shard.name for shard in shards for name in shard.specs(stored)}
            sizes = [spec.nbytes for shard in shards for spec in shard.specs(stored).values()]
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
            write_json(new(target / f"model{INDEX}"), index)
        values = json.loads((source / "config.json").read_text(encoding="utf-8"))
        values["quantization_config"] = quantization_config(kept)
        write_json(new(target / "config.json"), values)

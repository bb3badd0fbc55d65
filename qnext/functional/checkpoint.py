"""Reading and writing files: checkpoints in Hugging Face's format, and states.

Nothing is read before the headers of all shards agree with the config, and nothing half-written
ever has its final name.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from qnext.errors import CheckpointError, InputError
from qnext.functional.checks import check_trees, state_mismatches, table_mismatches
from qnext.functional.config import Config
from qnext.functional.layout import Entry, Piece, layout
from qnext.functional.params import Params, empty_params
from qnext.functional.state import State, init_state
from qnext.functional.tree import leaves_with_paths, rebuild

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
MAPPED_AT_ONCE = 32 << 20  # bytes of a shard touched before it is unmapped again
READ_AT_ONCE = 8 << 20  # bytes of a tensor read together
STATE_FORMAT = "qnext-state-1"


class Stored(NamedTuple):
    """A tensor as a shard's header announces it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    check_finite: bool = False,
    progress: bool | None = None,
) -> Params:
    """Params of a Hugging Face checkpoint directory (config.json and *.safetensors).

    Shards are memory-mapped piece by piece, so that peak memory stays near the model's size.
    `dtype` converts floating tensors (default: as stored; `A_log` and `dt_bias` stay float32);
    `check_finite` also refuses NaN and infinity; `progress` shows a bar (default: on a terminal).
    Raises ConfigError for the config, CheckpointError listing everything else that is wrong.
    """
    path = Path(path)
    if dtype is not None and dtype not in FLOATS.values():
        raise InputError(f"dtype must be one of {[*FLOATS.values()]}, got {dtype}")
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the directory that holds it")
    config = Config.from_hf(path)
    stored, wrong = _inventory(path)
    if any(name.startswith("mtp.") for name in stored):
        config = replace(config, mtp_layers=1)
    elif config.mtp_layers:
        config = replace(config, mtp_layers=0)
    compute = dtype or _stored_dtype(stored)
    config = config.with_precision(compute=compute, logits=compute)
    params = empty_params(config, "meta")
    specs = dict(leaves_with_paths(params))
    chosen = [(e.path, _choose(e, stored)) for e in layout(config)]
    wrong += _differences(chosen, specs, stored, convert=dtype is not None)
    if wrong:
        raise _refusal(path, wrong)
    params = empty_params(config, device)
    targets = dict(leaves_with_paths(params))
    not_finite = []
    total = sum(spec.nbytes for spec in specs.values())
    hidden = None if progress is None else not progress
    with tqdm(total=total, unit="B", unit_scale=True, desc="load", disable=hidden) as bar:
        for leaf_path, pieces in chosen:
            not_finite += _fill(targets[leaf_path], pieces, stored, check_finite)
            bar.update(targets[leaf_path].nbytes)
    if not_finite:
        raise _refusal(path, [f"not finite: {name}" for name in not_finite])
    return params


def _refusal(path: Path, wrong: list[str], most: int = 40) -> CheckpointError:
    more = [f"... and {len(wrong) - most} more"] if len(wrong) > most else []
    lines = "\n  ".join(wrong[:most] + more)
    return CheckpointError(f"{path} does not hold the model of its config.json:\n  {lines}")


def _inventory(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor that the shards' headers announce, and what is wrong with shards and index."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    wrong: list[str] = []
    if index.is_file():
        weight_map = _weight_map(index)
        files = sorted({path / name for name in weight_map.values()})
    elif single.is_file():
        weight_map, files = None, [single]
    else:
        raise CheckpointError(
            f"{path} is no checkpoint: it has neither {single.name} nor {index.name}"
        )
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (a shard is no mapping)
                    part = shard.get_slice(name)
                    stored[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        except FileNotFoundError:
            wrong.append(f"missing shard: {file.name}, named by {index.name}")
        except (SafetensorError, OSError) as error:
            wrong.append(f"corrupt or truncated shard: {file.name} ({error})")
    if wrong:  # tensor by tensor, everything in a lost shard would be missing: say the cause only
        raise _refusal(path, wrong)
    if weight_map is not None:
        wrong += _index_differences(weight_map, stored, index.name)
    return stored, wrong


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


def _stored_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """The checkpoint's dtype: that of its embedding."""
    embed = stored.get("model.embed_tokens.weight")
    return FLOATS.get(embed.dtype, torch.float32) if embed else torch.float32


def _choose(entry: Entry, stored: dict[str, Stored]) -> tuple[Piece, ...]:
    """The way of holding a leaf of which the checkpoint has most tensors (all, if it is whole)."""
    return max(entry.ways, key=lambda way: sum(p.name in stored for p in way) / len(way))


def _differences(
    chosen: list[tuple[str, tuple[Piece, ...]]],
    specs: dict[str, Tensor],
    stored: dict[str, Stored],
    convert: bool,
) -> Iterator[str]:
    expected = set()
    for path, pieces in chosen:
        for piece in pieces:
            expected.add(piece.name)
            have = stored.get(piece.name)
            if have is None:
                yield f"missing: {piece.name} {list(piece.shape)}"
                continue
            if have.shape != piece.shape:
                yield f"wrong shape: {piece.name} is {list(have.shape)}, not {list(piece.shape)}"
            kind = FLOATS.get(have.dtype)
            wanted = {specs[path].dtype, specs[".embed"].dtype}
            if kind is None or not (convert or kind in wanted):
                names = " or ".join(sorted(str(w).removeprefix("torch.") for w in wanted))
                hint = "" if kind is None else "; load(path, dtype=...) would convert it"
                yield f"wrong dtype: {piece.name} is {have.dtype}, not {names}{hint}"
    for name in sorted(set(stored) - expected):
        yield f"unexpected: {name} {list(stored[name].shape)}"


def _fill(
    leaf: Tensor, pieces: tuple[Piece, ...], stored: dict[str, Stored], check_finite: bool
) -> list[str]:
    """Copy pieces into a leaf; returns the names of those that had to be finite and are not.

    Shards are unmapped often: mapped pages count as memory in use.
    """
    file, touched, shard = None, 0, None
    not_finite: dict[str, None] = {}
    for piece in pieces:
        have = stored[piece.name]
        row_bytes = max(leaf.itemsize * piece.target(leaf)[0].numel(), 1)
        step = max(READ_AT_ONCE // row_bytes, 1) if piece.is_plain else have.shape[0]
        for first in range(0, have.shape[0], step):
            if shard is None or have.file != file or touched > MAPPED_AT_ONCE:
                shard, file, touched = safe_open(have.file, framework="pt"), have.file, 0
            rows = shard.get_slice(piece.name)[first : first + step]
            piece.read_into(leaf, rows, first)
            if check_finite and not bool(rows.to(leaf.dtype).isfinite().all()):
                not_finite[piece.name] = None
            touched += rows.nbytes
    return list(not_finite)


def save(params: Params, path: str | Path, *, max_shard_bytes: int = 5 << 30) -> None:
    """Write a checkpoint that `load` and transformers read: config.json and *.safetensors.

    Files appear under their names only when they are complete; older model files that are not part
    of this checkpoint are removed last.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    targets = dict(leaves_with_paths(params))
    pieces = [(targets[e.path], piece) for e in layout(params.config) for piece in e.ways[0]]
    shards: list[list[tuple[Tensor, Piece]]] = [[]]
    size = 0
    for leaf, piece in pieces:
        nbytes = leaf.itemsize * torch.Size(piece.shape).numel()
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((leaf, piece))
        size += nbytes
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]
    weight_map: dict[str, str] = {}
    index = path / "model.safetensors.index.json"
    with _replacing() as new:
        for name, shard in zip(names, shards, strict=True):
            tensors = {p.name: p.written_from(t).detach().contiguous().cpu() for t, p in shard}
            save_file(tensors, new(path / name), {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        if count > 1:
            total = sum(leaf.nbytes for leaf in targets.values())
            _write_json(new(index), {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(new(path / "config.json"), params.config.to_hf())
    for stale in {*path.glob("model*.safetensors"), index} - {path / n for n in names}:
        if not (stale == index and count > 1):
            stale.unlink(missing_ok=True)


@contextmanager
def _replacing() -> Iterator[Callable[[Path], Path]]:
    """Write files to `new(file)`; all take their names, over older ones, once all are written."""
    parts: dict[Path, Path] = {}

    def new(file: Path) -> Path:
        return parts.setdefault(file, file.with_name(f".{file.name}.partial"))

    try:
        yield new
        for file, part in parts.items():
            part.replace(file)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_state(params: Params, state: State, path: str | Path) -> None:
    """Write a state as one safetensors file, with its model's fingerprint and its position.

    Raises InputError where the state is not one of this model.
    """
    check_trees(params, state)
    metadata = {
        "format": STATE_FORMAT,
        "model": params.config.fingerprint,
        "position": json.dumps(state.lengths.tolist()),
    }
    tensors = {name: leaf.detach().contiguous().cpu() for name, leaf in leaves_with_paths(state)}
    with _replacing() as new:
        save_file(tensors, new(Path(path)), metadata)


def load_state(params: Params, path: str | Path, device: torch.device | str | None = None) -> State:
    """The state that `save_state` wrote, bit for bit.

    Raises CheckpointError where the file is no state, or belongs to another model.
    """
    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no state file: {error}") from error
    if metadata.get("format") != STATE_FORMAT:
        raise CheckpointError(f"{path} is no state file: save_state did not write it")
    if metadata.get("model") != params.config.fingerprint:
        raise CheckpointError(
            f"{path} is a state of another model: its config hash is {metadata.get('model')}, "
            f"this model's is {params.config.fingerprint}"
        )
    skeleton = init_state(params.config, 1, 1, device="meta")
    names = [name for name, _ in leaves_with_paths(skeleton)]
    if set(names) != set(tensors):
        raise CheckpointError(f"{path} lacks or adds tensors: {sorted(set(names) ^ set(tensors))}")
    state = rebuild(skeleton, [tensors[name] for name in names])
    wrong = state_mismatches(params, state) or table_mismatches(state)
    if not wrong and metadata.get("position") != json.dumps(state.lengths.tolist()):
        wrong = [f"state.lengths is not the position {metadata.get('position')} in its header"]
    if wrong:
        raise CheckpointError(f"{path} does not fit the model:\n  " + "\n  ".join(wrong))
    return state

"""Which stored tensors fill which leaves, and all that is wrong: decided from headers alone."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from qnext.functional.checkpoint.formats import Announced
from qnext.functional.checkpoint.shards import FLOATS, Stored
from qnext.functional.config import Config
from qnext.functional.layout import Entry, Piece, is_experts, layout
from qnext.functional.params import empty_params, matrices
from qnext.functional.tree import leaves_with_paths


class Part(NamedTuple):
    """A leaf of Params and the stored tensors that fill it."""

    path: str
    pieces: tuple[Piece, ...]
    int8: bool  # then each piece has a scale beside it, and perhaps an offset of zeros


def plan(
    config: Config, stored: Mapping[str, Stored], said: Announced | None, convert: bool
) -> tuple[list[Part], list[str]]:
    """The parts of a checkpoint in the order of Params, and a line for each thing that is wrong.

    `convert` admits floating tensors of any dtype.
    """
    specs = empty_params(config, "meta")
    dtypes = {path: leaf.dtype for path, leaf in leaves_with_paths(specs)}
    quantisable = {path for path, _ in matrices(specs)}
    parts, wrong, expected = [], [], set[str]()
    for entry in layout(config):
        pieces = choose(entry, stored)
        have = {stored[p.name].dtype for p in pieces if p.name in stored}
        part = Part(entry.path, pieces, "I8" in have and entry.path in quantisable)
        parts.append(part)
        if part.int8 and have != {"I8"}:
            wrong.append(f"half quantised: {', '.join(_described(pieces, stored))}: one matrix")
        for piece in pieces:
            expected |= {piece.name} | set(beside(piece, stored) if part.int8 else ())
            if piece.name not in stored:
                wrong.append(f"missing: {piece.name} {list(piece.shape)}")
                continue
            wrong += _shapes(piece, stored[piece.name].shape)
            if stored[piece.name].dtype == "I8" and part.int8:
                wrong += _int8(piece, stored)
            if not part.int8:
                wanted = {dtypes[entry.path], config.precision.compute}
                wrong += _dtypes(piece.name, stored[piece.name].dtype, wanted, convert)
            wrong += said.contradictions(piece, stored[piece.name].dtype) if said else ()
    wrong += _half_experts(parts)
    if said is None and (int8 := next((p.pieces[0].name for p in parts if p.int8), None)):
        wrong.append(
            f"int8 without a word of it: {int8} is I8, but config.json has no quantization_config "
            "and there is no quant_model_description.json"
        )
    wrong += [f"unexpected: {n} {list(stored[n].shape)}" for n in sorted(stored.keys() - expected)]
    wrong += said.unused(stored) if said else ()
    return parts, wrong


def choose(entry: Entry, stored: Mapping[str, Stored]) -> tuple[Piece, ...]:
    """The way of holding a leaf of which the checkpoint has most tensors (all, if it is whole)."""
    return max(entry.ways, key=lambda way: sum(p.name in stored for p in way) / len(way))


def scale_of(piece: Piece) -> Piece:
    """The piece that holds the scales of an int8 piece, by the same rows."""
    return piece._replace(name=f"{piece.name}_scale", shape=piece.shape[:-1])


def offset_of(piece: Piece) -> str:
    return f"{piece.name}_offset"


def beside(piece: Piece, stored: Mapping[str, Stored]) -> Iterator[str]:
    """The names of what belongs to an int8 tensor."""
    yield scale_of(piece).name
    if offset_of(piece) in stored:
        yield offset_of(piece)


def _described(pieces: tuple[Piece, ...], stored: Mapping[str, Stored]) -> Iterator[str]:
    have = [(p.name, stored[p.name].dtype) for p in pieces if p.name in stored]
    for kind in ("I8", *FLOATS):
        first = next((name for name, dtype in have if dtype == kind), None)
        if first:
            yield f"{first} is {kind}"


def _shapes(piece: Piece, shape: tuple[int, ...]) -> Iterator[str]:
    if shape != piece.shape:
        yield f"wrong shape: {piece.name} is {list(shape)}, not {list(piece.shape)}"


def _dtypes(name: str, have: str, wanted: set[torch.dtype], convert: bool) -> Iterator[str]:
    kind = FLOATS.get(have)
    if kind is None or not (convert or kind in wanted):
        names = " or ".join(sorted(str(w).removeprefix("torch.") for w in wanted))
        hint = "" if kind is None else "; load(path, dtype=...) would convert it"
        yield f"wrong dtype: {name} is {have}, not {names}{hint}"


def _int8(piece: Piece, stored: Mapping[str, Stored]) -> Iterator[str]:
    """What is wrong beside an int8 tensor: its scales, and its offset if it has one."""
    scale = scale_of(piece)
    if scale.name not in stored:
        yield f"int8 without scale: {piece.name} needs {scale.name}"
    for name in beside(piece, stored):
        have = stored.get(name)
        if have is not None and have.shape not in (scale.shape, (*scale.shape, 1)):
            yield f"wrong shape: {name} is {list(have.shape)}, not {[*scale.shape, 1]}"
        if have is not None and have.dtype not in FLOATS and name == scale.name:
            yield f"wrong dtype: {name} is {have.dtype}, not floating point"


def _half_experts(parts: list[Part]) -> Iterator[str]:
    """Experts are one primitive: both their matrices are int8, or neither is."""
    int8 = {part.path: part.int8 for part in parts}
    many = {part.path for part in parts if is_experts(part.pieces)}
    for path in int8:
        other = path.removesuffix("gate_up") + "down"
        if path.endswith(".ffn.gate_up") and path in many and int8[path] != int8[other]:
            yield f"half quantised: {path[1:]} and {other[1:]} must both be int8, or neither"

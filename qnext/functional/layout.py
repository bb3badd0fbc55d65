"""Where each tensor of a Hugging Face checkpoint lives in Params, for reading and for writing.

Checkpoints keep query and gate interleaved by head, q, k, v and z by key head, and one tensor an
expert; Params keeps whole blocks. Both are rows of the same matrices, so a `Rows` record maps one
onto the other in either direction, and the list below is the only place that knows the names.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.errors import CheckpointError
from qnext.functional.config import ATTENTION, Config
from qnext.functional.mesh import Span


class Rows(NamedTuple):
    """In each of `groups` equal runs of a stored tensor's rows, `size` rows from `offset` on.

    Gathered from all groups they are the rows of the leaf from `start` on.
    """

    groups: int
    offset: int
    size: int
    start: int

    def within(self, span: Span, stored: int) -> "list[Rows]":
        """Those of its rows that lie in a span of the leaf, counted from there, as plain runs."""
        runs, stride = list[Rows](), stored // self.groups
        for group in range(self.groups):
            first = self.start + group * self.size
            low, high = max(first, span.start), min(first + self.size, sum(span))
            source, target = self.offset + group * stride + low - first, low - span.start
            if low >= high:
                continue
            last = runs[-1] if runs else Rows(1, 0, 0, -1)
            if (last.offset + last.size, last.start + last.size) == (source, target):
                runs[-1] = last._replace(size=last.size + high - low)
            else:
                runs.append(Rows(1, source, high - low, target))
        return runs


class Piece(NamedTuple):
    """A stored tensor and the rows of the leaf it fills (of one expert, if given)."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    expert: int | None = None

    @property
    def module(self) -> str:
        """The name of the module that holds the tensor, as lists of modules give it."""
        return self.name.removesuffix(".weight")

    def target(self, leaf: Tensor) -> Tensor:
        return leaf if self.expert is None else leaf[self.expert]

    def held(self, spans: Sequence[Span]) -> "Iterator[Piece]":
        """What fills a leaf that has these spans of the whole leaf's rows: a plain run each."""
        at = 0
        for span in spans:
            for part in self.rows:
                for run in part.within(span, self.shape[0]):
                    yield self._replace(rows=(run._replace(start=at + run.start),))
            at += span.size

    def read_into(self, leaf: Tensor, stored: Tensor, first: int = 0) -> None:
        """Copy stored rows (of a plain run those from its row `first` on) into the leaf."""
        if self.is_plain:
            place = self.place_in(leaf, first, stored.shape[0])
            place.copy_(stored.reshape(place.shape))
            return
        leaf = self.target(leaf)
        stored = stored.reshape(stored.shape[0], *leaf.shape[1:])
        for part in self.rows:
            _run(leaf, part).copy_(_picked(stored, part))

    def place_in(self, leaf: Tensor, first: int, count: int) -> Tensor:
        """Where `count` stored rows from row `first` on lie in the leaf, if they are one run."""
        begin = self.rows[0].start + first
        return self.target(leaf)[begin : begin + count]

    def written_from(self, leaf: Tensor) -> Tensor:
        """The tensor to store, a view of the leaf where that is possible."""
        leaf = self.target(leaf)
        if self.is_plain:
            start, count = self.rows[0].start, self.rows[0].size
            return leaf[start : start + count].reshape(self.shape)
        stored = torch.empty(self.shape[0], *leaf.shape[1:], dtype=leaf.dtype, device=leaf.device)
        for part in self.rows:
            _picked(stored, part).copy_(_run(leaf, part))
        return stored.reshape(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether it is one run of stored rows that is one run of the leaf's, in order."""
        return len(self.rows) == 1 and self.rows[0].groups == 1


class Entry(NamedTuple):
    """A leaf of Params and the ways a checkpoint may hold it; the first is the one we write."""

    path: str
    ways: tuple[tuple[Piece, ...], ...]


def held(pieces: tuple[Piece, ...], axes: tuple[str, ...], config: Config) -> tuple[Piece, ...]:
    """What fills a rank's part of a leaf with these axes, of the `pieces` that fill all of it."""
    if axes[0] not in config.divided:
        return pieces
    spans = config.mesh.spans(config.divided[axes[0]])
    if pieces[0].expert is None:
        return tuple(part for piece in pieces for part in piece.held(spans))
    (experts,) = spans
    return tuple(
        piece._replace(expert=piece.expert - experts.start)
        for piece in pieces
        if piece.expert is not None and experts.start <= piece.expert < sum(experts)
    )


def is_experts(pieces: tuple[Piece, ...]) -> bool:
    """Whether these tensors are a matrix of each expert, apart or stacked."""
    return pieces[0].expert is not None or len(pieces[0].shape) == 3


def _picked(stored: Tensor, part: Rows) -> Tensor:
    return stored.unflatten(0, (part.groups, -1))[:, part.offset : part.offset + part.size]


def _run(leaf: Tensor, part: Rows) -> Tensor:
    block = leaf[part.start : part.start + part.groups * part.size]
    return block.unflatten(0, (part.groups, part.size))


def _plain(name: str, *shape: int, start: int = 0, expert: int | None = None) -> Piece:
    return Piece(name, shape, (Rows(1, 0, shape[0], start),), expert)


def _whole(path: str, name: str, *shape: int) -> Entry:
    return Entry(path, ((_plain(name, *shape),),))


def _blocks(prefix: str, d: int, **sizes: int) -> tuple[Piece, ...]:
    """Tensors whose rows follow each other in the leaf, in the order given."""
    pieces, start = [], 0
    for name, rows in sizes.items():
        pieces.append(_plain(f"{prefix}{name}.weight", rows, d, start=start))
        start += rows
    return tuple(pieces)


def _interleaved(name: str, d: int, groups: int, *sizes: int) -> Piece:
    """A tensor whose groups each hold `sizes` rows of the leaf's consecutive blocks."""
    parts, offset, start = [], 0, 0
    for size in sizes:
        parts.append(Rows(groups, offset, size, start))
        offset, start = offset + size, start + groups * size
    return Piece(name, (groups * offset, d), tuple(parts))


def layout(config: Config) -> Iterator[Entry]:
    """Every leaf of Params with the checkpoint tensors that fill it."""
    x = config.axes
    yield _whole(".embed", "model.embed_tokens.weight", x["vocab"], x["d"])
    for i, (kind, moe) in enumerate(zip(config.layer_types, config.is_moe, strict=True)):
        yield from _layer(f".layers[{i}]", f"model.layers.{i}", config, kind == ATTENTION, moe)
    yield _whole(".norm", "model.norm.weight", x["d"])
    if not config.tie_word_embeddings:
        yield _whole(".head[0].weight", "lm_head.weight", x["vocab"], x["d"])
    for i in range(config.mtp_layers):
        yield from _mtp(f".mtp[{i}]", config, i)


def _mtp(path: str, config: Config, i: int) -> Iterator[Entry]:
    d = config.hidden_size
    if i:  # published checkpoints have one module; its joining part carries no index
        raise CheckpointError(
            f"a checkpoint holds at most one MTP module, this model has {config.mtp_layers}"
        )
    yield _whole(f"{path}.embed_norm", "mtp.pre_fc_norm_embedding.weight", d)
    yield _whole(f"{path}.hidden_norm", "mtp.pre_fc_norm_hidden.weight", d)
    yield _whole(f"{path}.fc", "mtp.fc.weight", d, 2 * d)
    yield from _layer(f"{path}.layer", "mtp.layers.0", config, True, config.num_experts > 0)
    yield _whole(f"{path}.norm", "mtp.norm.weight", d)


def _layer(path: str, name: str, config: Config, attention: bool, moe: bool) -> Iterator[Entry]:
    d = config.hidden_size
    yield _whole(f"{path}.input_norm", f"{name}.input_layernorm.weight", d)
    mixer = _attention if attention else _delta_net
    yield from mixer(
        f"{path}.mixer", f"{name}.self_attn." if attention else f"{name}.linear_attn.", config.axes
    )
    yield _whole(f"{path}.post_norm", f"{name}.post_attention_layernorm.weight", d)
    yield from (_moe if moe else _dense)(f"{path}.ffn", f"{name}.mlp.", config.axes)


def _attention(path: str, name: str, x: dict[str, int]) -> Iterator[Entry]:
    d, hq, hd, kv = x["d"], x["hq"], x["hd"], x["hkv"] * x["hd"]
    q = x["q"]
    query_and_gate = Piece(
        f"{name}q_proj.weight",
        (2 * q, d),
        (Rows(hq, 0, hd, 0), Rows(hq, hd, hd, q + 2 * kv)),
    )
    key = _plain(f"{name}k_proj.weight", kv, d, start=q)
    value = _plain(f"{name}v_proj.weight", kv, d, start=q + kv)
    yield Entry(f"{path}.in_proj", ((query_and_gate, key, value),))
    yield _whole(f"{path}.q_norm", f"{name}q_norm.weight", hd)
    yield _whole(f"{path}.k_norm", f"{name}k_norm.weight", hd)
    yield _whole(f"{path}.out_proj", f"{name}o_proj.weight", d, q)


def _delta_net(path: str, name: str, x: dict[str, int]) -> Iterator[Entry]:
    d, hk, hv, dk = x["d"], x["hk"], x["hv"], x["dk"]
    per_key_head = x["v"] // hk
    fused = _interleaved(f"{name}in_proj_qkvz.weight", d, hk, dk, dk, per_key_head, per_key_head)
    split = _blocks(f"{name}in_proj_", d, qkv=x["conv"], z=x["v"])
    apart = _blocks(f"{name}in_proj_", d, q=hk * dk, k=hk * dk, v=x["v"], z=x["v"])
    yield Entry(f"{path}.in_proj", ((fused,), split, apart))
    fused = _interleaved(f"{name}in_proj_ba.weight", d, hk, hv // hk, hv // hk)
    yield Entry(f"{path}.gate_proj", ((fused,), _blocks(f"{name}in_proj_", d, b=hv, a=hv)))
    yield _whole(f"{path}.conv", f"{name}conv1d.weight", x["conv"], 1, x["width"])
    yield _whole(f"{path}.A_log", f"{name}A_log", hv)
    yield _whole(f"{path}.dt_bias", f"{name}dt_bias", hv)
    yield _whole(f"{path}.norm", f"{name}norm.weight", x["dv"])
    yield _whole(f"{path}.out_proj", f"{name}out_proj.weight", d, x["v"])


def _dense(path: str, name: str, x: dict[str, int]) -> Iterator[Entry]:
    d, ffn = x["d"], x["dense"]
    yield Entry(f"{path}.gate_up", (_blocks(name, d, gate_proj=ffn, up_proj=ffn),))
    yield _whole(f"{path}.down", f"{name}down_proj.weight", d, ffn)


def _moe(path: str, name: str, x: dict[str, int]) -> Iterator[Entry]:
    d, count, ffn, shared = x["d"], x["experts"], x["ffn"], x["shared"]
    yield _whole(f"{path}.router", f"{name}gate.weight", count, d)

    def each(part: str, rows: int, columns: int, start: int = 0) -> list[Piece]:
        return [
            _plain(f"{name}experts.{e}.{part}.weight", rows, columns, start=start, expert=e)
            for e in range(count)
        ]

    def stacked(part: str, rows: int, columns: int) -> Iterator[tuple[Piece, ...]]:
        for suffix in ("", ".weight"):
            yield (_plain(f"{name}experts.{part}{suffix}", count, rows, columns),)

    gate_up = (*each("gate_proj", ffn, d), *each("up_proj", ffn, d, start=ffn))
    yield Entry(f"{path}.gate_up", (gate_up, *stacked("gate_up_proj", 2 * ffn, d)))
    yield Entry(f"{path}.down", (tuple(each("down_proj", d, ffn)), *stacked("down_proj", d, ffn)))
    yield _whole(f"{path}.shared_gate", f"{name}shared_expert_gate.weight", 1, d)
    halves = _blocks(f"{name}shared_expert.", d, gate_proj=shared, up_proj=shared)
    yield Entry(f"{path}.shared_gate_up", (halves,))
    yield _whole(f"{path}.shared_down", f"{name}shared_expert.down_proj.weight", d, shared)

"""The side of the engine that owns the state: it does what a `Work` says, step after step."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qnext.functional.params import Params
from qnext.functional.sampling import Sampling, knobs
from qnext.functional.state import State, init_state, narrow, pages_of, view, widen
from qnext.functional.tree import map_leaves
from qnext.runtime.draws import Draws
from qnext.runtime.kept import Kept
from qnext.runtime.logprobs import told
from qnext.runtime.request import RankError
from qnext.runtime.rounds import ENDS, Form
from qnext.runtime.steps import Steps
from qnext.runtime.work import Complete, Done, Piece, Put, Read, Take, Work


class Worker:
    """`rows` places for sequences of up to `capacity` tokens over pools of `pages` pages.

    `near` is the part of the tables that decodes, padded to a bucket: as long as the same rows
    decode it goes from step to step as it is.
    """

    def __init__(
        self, steps: Steps, rows: int, capacity: int, pages: int, drafted: int = 0
    ) -> None:
        self.steps, self.moves, self.drafted = steps, steps.moves, drafted
        like = self.params.embed
        self.state = init_state(
            self.params.config,
            rows,
            capacity,
            dtype=like.dtype,
            device=like.device,
            draft=drafted,
            pages=pages,
        )
        self._tables = map_leaves(Tensor.clone, self.state._replace(layers=(), mtp=()))
        self._near: State | None = None
        self.reset()

    @property
    def params(self) -> Params:
        return self.steps.params

    @property
    def like(self) -> State:
        """Specs of the state that values are taken out of: that of all ranks together."""
        return self.moves.specs(self.state)

    def reset(self) -> None:
        """Begin anew, with empty pools: all sequences are lost.

        The pools are the same memory as ever, as captured steps know no other.
        """
        alive = self._near or self.state
        layers, mtp = map_leaves(lambda leaf: leaf.view_as(leaf), (alive.layers, alive.mtp))
        self.moves.zero(alive)
        self.state = map_leaves(Tensor.clone, self._tables)._replace(layers=layers, mtp=mtp)
        self.draws = Draws(self.params.config.vocab_size, self.state.batch, layers[0][0].device)
        self._rows: tuple[int, ...] = ()
        self._near = None

    def run(self, work: Work) -> Done:
        """Do the work. A call that raises fails its rows, the others' results are as ever."""
        done = Done()
        with torch.no_grad():
            if work.first or work.wipes or work.puts or work.grants:
                self._blur()
            done.first = [self._take(each) for each in work.first]
            for row, pages in work.wipes:
                self.moves.wipe(self.state, row, pages)
            for each in work.puts:
                self._put(each)
            for row, pages in work.grants:
                self._grant(row, pages)
            for group in self._groups(work.prefill):
                self._try(done, [p.row for p in group], partial(self._prefill, group, done))
            if work.then:
                self._blur()
            done.then = [None if t.row in done.failed else self._take(t) for t in work.then]
            if rows := tuple(row for row in work.decode if row not in done.failed):
                self._try(done, rows, partial(self._decode, rows, done))
        return done

    def attend(self, over: bool = False) -> Form:
        """Without work, take part in what other groups do; what that was."""
        with torch.no_grad():
            self._blur()
            called, self.state = self.steps.attend(self.state, over)
        return called

    def _try(self, done: Done, rows: Sequence[int], call: Callable[[], None]) -> None:
        try:
            call()
        except RankError:
            raise
        except Exception as error:  # whatever it is, it must not reach the other rows
            done.failed |= dict.fromkeys(rows, error)
            self._revive()

    # The pools are in `state` or, while rows decode, in `near`, which has gone through more calls.

    def _focus(self, rows: tuple[int, ...]) -> State:
        """The tables of these rows, padded to a bucket, with the pools."""
        if self._near is None or rows != self._rows:
            self._blur()
            near = view(self.state, self._index(rows))
            self._near, self._rows = widen(near, self.steps.batch_of(len(rows))), rows
            self.draws.focus(rows, self._near.batch)
        return self._near

    def _blur(self) -> None:
        """Bring what decoding changed back into the tables of all rows."""
        if self._near is None:
            return
        self.state = self._merged(self._near, self._rows)
        self._near = None
        self.draws.blur()

    def _merged(self, part: State, rows: Sequence[int]) -> State:
        """All rows' tables with those of some rows, and that part's pools."""
        index, part = self._index(rows), narrow(part, len(rows))
        changed = {
            name: getattr(self.state, name).index_copy(0, index, getattr(part, name))
            for name in ("lengths", "capacity", "slots", "accepted", "mtp_lengths")
        }
        return self.state._replace(layers=part.layers, mtp=part.mtp, **changed)

    def _revive(self) -> None:
        """After a call that raised: the pools are there, whatever became of its own rows."""
        alive = self._near or self.state
        layers, mtp = map_leaves(lambda leaf: leaf.view_as(leaf), (alive.layers, alive.mtp))
        if self._near is not None:
            self._near = self._near._replace(layers=layers, mtp=mtp)
            self._blur()
        self.state = self.state._replace(layers=layers, mtp=mtp)

    def _index(self, rows: Iterable[int]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.long, device=self.state.lengths.device)

    def _take(self, each: Take | Complete) -> tuple[int, Kept]:
        if isinstance(each, Complete):
            return each.length, self.moves.completed(self.state, each.pages, each.kept)
        row = each.row
        length = int(self.state.lengths[row])
        pages = self.state.block_table[row, : pages_of(length)].tolist()
        pages = pages[each.first :] if each.whole else pages[-1:]
        if each.into is None:
            return length, self.moves.take(self.state, row, pages)
        return length, self.moves.take_into(each.into, self.state, row, pages, each.states)

    def _put(self, each: Put) -> None:
        tables = self.state
        values = {"lengths": each.length, "capacity": each.limit, "accepted": 0}
        if self.drafted:
            values["mtp_lengths"] = max(each.length - 1, 0)
        changed = {name: getattr(tables, name).clone() for name in values}
        for name, value in values.items():
            changed[name][each.row] = value
        self.state = tables._replace(**changed)
        self._grant(each.row, each.pages)
        self.moves.put(self.state, each.row, each.fill, each.kept)
        self.draws.begin(each.row, each.tokens, each.manner)

    def _grant(self, row: int, pages: Sequence[int]) -> None:
        table = self.state.block_table.clone()
        table[row] = 0
        table[row, : len(pages)] = torch.tensor(pages, dtype=table.dtype, device=table.device)
        self.state = self.state._replace(block_table=table)

    def _decode(self, rows: tuple[int, ...], done: Done) -> None:
        near = self._resting(self._focus(rows), len(rows))
        if self.drafted:
            near, drawn = self.draws.speculate(self.steps, near, self.drafted)
        else:
            near, drawn = self.draws.decode(self.steps, near)
        self._near = near
        done.drawn |= zip(rows, drawn, strict=True)

    def _resting(self, near: State, rows: int) -> State:
        """With rows of padding where they began, on scratch; where rows guess they have no room."""
        if near.batch == rows:
            return near
        real = torch.arange(near.batch, device=near.lengths.device) < rows
        near = near._replace(lengths=near.lengths * real)
        return near._replace(capacity=near.capacity * real) if self.drafted else near

    def _groups(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Pieces that share a call: of one bucket's length, in as large batches as there are."""
        by_form: dict[tuple[int, bool], list[Piece]] = {}
        for piece in pieces:  # as if others came along: lengths of lone ones would part them
            form = (self.steps.seq_of(len(piece.tokens), 2), piece.score is not None)
            by_form.setdefault(form, []).append(piece)
        groups = []
        for (seq, _), alike in by_form.items():
            most = self.steps.most_rows(seq)
            groups += [alike[first : first + most] for first in range(0, len(alike), most)]
        return groups

    def warm(self, progress: bool = False) -> None:
        """Compile the steps that serving needs; those that tell of prompts wait for the first."""
        device = self.state.lengths.device
        greedy = knobs([Sampling(temperature=0.0)], device)

        def rows(batch: int) -> State:
            return widen(view(self.state, self._index([0])), batch)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        calls: list[tuple[Any, ...]] = []
        for batch in self.steps.batches:
            if not self.drafted:
                calls += [(name, rows(batch), zeros(batch)) for name in ("next", "decode")]
                continue
            calls.append(("ahead", rows(batch), zeros(batch), self.drafted, zeros(batch, ENDS)))
            settings = map_leaves(lambda leaf, b=batch: leaf.expand(b).clone(), greedy)
            for each in (None, settings):
                calls.append(("guess", rows(batch), zeros(batch), self.drafted, each))
            calls.append(("verify", rows(batch), zeros(batch, self.drafted + 1)))
        for seq in self.steps.lone:
            most = self.steps.most_rows(seq) if seq in self.steps.seqs else 1
            for batch in (b for b in self.steps.batches if b <= most):
                lengths = zeros(batch, dtype=torch.int32)
                calls.append(("consume", rows(batch), zeros(batch, seq), lengths))
        self.steps.warm(calls, progress)

    def _prefill(self, group: Sequence[Piece], done: Done) -> None:
        rows = [piece.row for piece in group]
        self._blur()
        state = view(self.state, self._index(rows))
        state = widen(state, self.steps.batch_of(len(rows)))
        seq = self.steps.seq_of(max(len(piece.tokens) for piece in group), len(group))
        line = [list(p.tokens) + [0] * (seq - len(p.tokens)) for p in group]
        counts = [len(p.tokens) for p in group]
        device = state.lengths.device
        more = state.batch - len(rows)
        tokens = pad(torch.tensor(line, device=device), (0, 0, 0, more))
        lengths = pad(torch.tensor(counts, dtype=torch.int32, device=device), (0, more))
        if group[0].score is None:
            finite, state = self.steps("consume", state, tokens, lengths)
            self.state = self._merged(state, rows)
            for row, fine in zip(rows, finite.tolist(), strict=False):
                done.read[row] = Read(fine)
            return
        logits, state = self.steps("score", state, tokens, lengths)
        self.state = self._merged(state, rows)
        for piece, own in zip(group, logits, strict=False):
            after = [*piece.tokens[1:], *([] if piece.after is None else [piece.after])]
            own = own[: len(piece.tokens)]
            assert piece.score is not None  # of all in this group
            finite = bool(own[-1].isfinite().all())
            done.read[piece.row] = Read(finite, told(own[: len(after)], after, piece.score))

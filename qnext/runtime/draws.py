"""How the rows of a worker draw their tokens, and what they drew: a side table of its state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qnext.functional.sampling import Bias, Counts, Drawing, Sampling, drawing
from qnext.functional.speculate import judge, newest
from qnext.functional.state import State
from qnext.runtime.logprobs import told
from qnext.runtime.rounds import ENDS
from qnext.runtime.steps import Steps, halted
from qnext.runtime.work import Drawn, Manner

RESTS = Manner(Sampling(temperature=0.0))
NEVER = float("-inf")


class Draws:
    """The manner and the newest token of each row; `focus` lays out those of a batch.

    The newest token is drawn and not consumed: the next step takes it. It stays on the device.
    """

    def __init__(self, vocab: int, rows: int, device: torch.device) -> None:
        self.vocab, self.device = vocab, device
        self.manners = [RESTS] * rows
        self._counts: dict[int, Counts] = {}
        self._all = torch.zeros(rows, dtype=torch.int64, device=device)
        self._rows: tuple[int, ...] = ()
        self.newest = self._all
        self._draws, self._plain = Drawing(), True
        self._ends = torch.empty(0)

    def begin(self, row: int, tokens: Sequence[int], manner: Manner) -> None:
        """A sequence takes a row, with these tokens so far."""
        self.manners[row] = manner
        self._all = self._all.clone()
        self._all[row] = tokens[-1]
        self._counts.pop(row, None)
        if manner.sampling.penalises:
            self._counts[row] = self._counted(tokens, manner.prompt)

    def _counted(self, tokens: Sequence[int], prompt: int) -> Counts:
        def count(ids: Sequence[int]) -> Tensor:
            index = torch.tensor(ids, dtype=torch.long, device=self.device)
            return torch.bincount(index, minlength=self.vocab).to(torch.int32)[None]

        return Counts(count(tokens[:prompt]) > 0, count(tokens[prompt:]))

    def focus(self, rows: tuple[int, ...], batch: int) -> None:
        """Lay out these rows as a batch, padded with rows that take the likeliest."""
        self._rows = rows
        each = [self.manners[row] for row in rows] + [RESTS] * (batch - len(rows))
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        more = self._all.new_zeros(batch - len(rows))
        self.newest = torch.cat([self._all.index_select(0, index), more])
        draws = drawing([m.sampling for m in each], self._stacked(rows, batch), self.device)
        self._draws = draws._replace(bias=self._bias(each))
        width = -(-max(1, *(len(m.ends) for m in each)) // ENDS) * ENDS
        ends = [[*m.ends, *[-2] * (width - len(m.ends))] for m in each]  # -2 is no token
        self._ends = torch.tensor(ends, device=self.device)
        told = any(m.guide is not None or m.logprobs is not None for m in each)
        self._plain = not told and self._draws == Drawing()

    def _stacked(self, rows: tuple[int, ...], batch: int) -> Counts | None:
        if not any(row in self._counts for row in rows):
            return None
        nothing = self._counted((), 0)
        each = [self._counts.get(row, nothing) for row in rows] + [nothing] * (batch - len(rows))
        return Counts(*(torch.cat(parts) for parts in zip(*each, strict=True)))

    def _bias(self, each: Sequence[Manner]) -> Bias | None:
        if not any(m.bias or (m.min_new_tokens and m.ends) for m in each):
            return None
        always = torch.zeros(len(each), self.vocab, device=self.device)
        early = torch.zeros_like(always)
        for row, manner in enumerate(each):
            for token, value in manner.bias.items():
                always[row, token] = value
            if manner.min_new_tokens:
                early[row, list(manner.ends)] = NEVER
        until = [m.prompt + m.min_new_tokens for m in each]
        return Bias(always, early, torch.tensor(until, dtype=torch.int32, device=self.device))

    def blur(self) -> None:
        """Bring the newest tokens and the counts of the batch back to their rows."""
        index = torch.tensor(self._rows, dtype=torch.long, device=self.device)
        self._all = self._all.index_copy(0, index, self.newest[: len(self._rows)])
        if self._draws.counts is not None:
            for at, row in enumerate(self._rows):
                if row in self._counts:
                    self._counts[row] = Counts(*(c[at : at + 1] for c in self._draws.counts))
        self._rows = ()

    def decode(self, steps: Steps, near: State) -> tuple[State, list[Drawn]]:
        """Consume the newest token of each row and draw the next."""
        if self._plain:
            self.newest, finite, near = steps("next", near, self.newest)
            each = zip(self._rows, self.newest.tolist(), finite.tolist(), strict=False)
            return near, [Drawn((token,), good, ()) for _, token, good in each]
        logits, near = steps("decode", near, self.newest)
        return near, self._draw(logits, near.lengths)

    def _draw(self, logits: Tensor, position: Tensor) -> list[Drawn]:
        """A token for each row of logits [batch, vocab], and what there is to tell of it."""
        drawn = self._draws.draw(self._guided(logits[:, None], None)[:, 0], position)
        self._draws = self._draws.after(drawn)
        self.newest = drawn
        return self._told(logits[:, None], drawn[:, None], [1] * len(self._rows))

    def speculate(self, steps: Steps, near: State, drafted: int) -> tuple[State, list[Drawn]]:
        """`functional.speculate` on the compiled steps, halting at tokens that end a row."""
        if self._plain:
            given = (near, self.newest, drafted, self._ends)
            drawn, kept, self.newest, finite, near = steps("ahead", *given)
            lists = (drawn.tolist(), kept.tolist(), finite.tolist())
            each = zip(self._rows, *lists, strict=False)
            return near, [Drawn(tuple(made[:count]), good, ()) for _, made, count, good in each]
        settings = self._draws.settings
        guesses, near = steps("guess", near, self.newest, drafted, settings)
        line = torch.cat([self.newest[:, None], guesses], dim=1)
        accepted = near.accepted.clone()
        logits, pending = steps("verify", near, line)
        near = pending._replace(accepted=accepted)
        ruled = self._guided(logits, line)
        drawn, count, near = judge(near, pending, ruled, line, self._draws)
        kept, near = halted(near, drawn, count, self._ends)
        drawn = drawn.where(torch.arange(drawn.shape[1], device=drawn.device) < kept[:, None], -1)
        for column in drawn.unbind(1):
            self._draws = self._draws.after(column)
        self.newest = newest(drawn, kept).where(kept > 0, self.newest)
        return near, self._told(logits, drawn, kept.tolist())

    def _guided(self, logits: Tensor, line: Tensor | None) -> Tensor:
        """Logits [batch, seq, vocab] with what guides rule out at -inf."""
        guides = [(at, self.manners[row].guide) for at, row in enumerate(self._rows)]
        for at, guide in guides:
            if guide is None:
                continue
            ahead = [] if line is None else line[at, 1:].tolist()
            logits = logits.clone()
            for place in range(logits.shape[1]):
                allowed = guide.allowed(ahead[:place])
                if allowed is None:
                    break
                logits[at, place] = logits[at, place].where(allowed.to(logits.device), NEVER)
        return logits

    def _told(self, logits: Tensor, drawn: Tensor, counts: Sequence[int]) -> list[Drawn]:
        """Each row's results; logits [batch, seq, vocab] are the model's own."""
        picked = logits.gather(2, drawn.clamp(min=0)[..., None]).squeeze(2)
        finite = (picked.isfinite() | (drawn < 0)).all(1).tolist()
        results = []
        for at, (row, tokens) in enumerate(zip(self._rows, drawn.tolist(), strict=False)):
            made = tuple(tokens[: counts[at]])
            top = self.manners[row].logprobs
            each = () if top is None else told(logits[at, : len(made)], made, top)
            results.append(Drawn(made, finite[at], each))
        return results

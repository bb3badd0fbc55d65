"""What the engine does next, as a pure function of what is waiting, what runs and what is free.

    made = plan(waiting, running, budget)

A step is chunks of prompts, of `budget.tokens` at most, and then one call of decoding for all that
decode, those whose prompt ended just now among them: nobody who decodes waits for longer than that.
Requests go by (priority, arrival), the lower the sooner. Nobody overtakes whoever is first in the
line, so nobody starves; among prompts that are being read, half of the tokens go to the first in
that order and the rest to those who have come least far, so a long prompt does not hold up short
ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qnext.functional.state import pages_of


class Job(NamedTuple):
    """What planning knows of a request, in tokens of its sequence.

    prompt: to be consumed before it decodes. length: consumed, at most, once all steps under way
    have run; of a waiting job, what a cached prefix or its swapped state will give it. pages: held
    already, or shared with that prefix; own: those that no other sequence holds; idle: those that
    only the cache holds, and that count as free until a waiting job is admitted. limit: the longest
    it can become. marks: lengths, in order, at which a chunk of its prompt must end, as its state
    is wanted there.
    """

    id: int
    arrival: int
    prompt: int
    limit: int
    length: int = 0
    pages: int = 0
    own: int = 0
    idle: int = 0
    priority: int = 0
    deadline: float | None = None
    marks: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.arrival

    @property
    def decodes(self) -> bool:
        return self.decodes_after(0)

    def decodes_after(self, count: int) -> bool:
        """Whether it decodes once it has consumed so many tokens of its prompt."""
        return self.prompt <= self.length + count < self.limit

    @property
    def reads(self) -> bool:
        return self.length < self.prompt

    def need(self, ahead: int) -> int:
        """Pages it lacks to have consumed its prompt and to decode `ahead` tokens further."""
        return max(pages_of(min(max(self.length, self.prompt) + ahead, self.limit)) - self.pages, 0)


class Budget(NamedTuple):
    """What a step may use. `ahead` is what one step of decoding may consume of a sequence."""

    rows: int  # free
    pages: int  # free, or cached and in no sequence
    tokens: int = 256  # of prompts
    ahead: int = 1
    now: float = 0.0


@dataclass(frozen=True)
class Chunk:
    """The next `count` tokens of a job's prompt."""

    id: int
    count: int


class Plan(NamedTuple):
    """Jobs by id. In this order: expire, preempt (swap out), admit, prefill, decode."""

    expire: tuple[int, ...]
    preempt: tuple[int, ...]
    admit: tuple[int, ...]
    prefill: tuple[Chunk, ...]
    decode: tuple[int, ...]

    def __bool__(self) -> bool:
        return any(self)


def plan(waiting: Sequence[Job], running: Sequence[Job], budget: Budget) -> Plan:
    """The next step. Every job in it has a row, and finds the pages that `Job.need` tells.

    A sequence is admitted with the pages of all its prompt. Where decoding finds none, the last in
    the line are swapped out; so is whoever runs at a lower priority than the first who waits.
    """
    late = {
        j.id for j in (*waiting, *running) if j.deadline is not None and j.deadline <= budget.now
    }
    ledger = _Ledger(budget, running)
    for job in running:
        if job.id in late:
            ledger.remove(job)
    ledger.grow()
    admitted = ledger.admit(sorted((j for j in waiting if j.id not in late), key=_order))
    prefill = tuple(_share_out(ledger.running, budget.tokens))
    counts = {chunk.id: chunk.count for chunk in prefill}
    return Plan(
        expire=tuple(sorted(late)),
        preempt=tuple(j.id for j in ledger.gone),
        admit=tuple(j.id for j in admitted),
        prefill=prefill,
        decode=tuple(j.id for j in ledger.running if j.decodes_after(counts.get(j.id, 0))),
    )


def _order(job: Job) -> tuple[int, int]:
    return job.order


class _Ledger:
    """Rows and pages while a plan is made: what is free, who runs, who is swapped out for it."""

    def __init__(self, budget: Budget, running: Sequence[Job]) -> None:
        self.rows, self.pages, self.ahead = budget.rows, budget.pages, budget.ahead
        self.running = sorted(running, key=_order)
        self.gone: list[Job] = []
        self.grown: dict[int, int] = {}  # pages for this step's tokens, by who will take them

    def remove(self, job: Job) -> None:
        self.running.remove(job)
        self.rows += 1
        self.pages += job.own + self.grown.pop(job.id, 0)

    def grow(self) -> None:
        """Pages for whoever decodes, the first in the line first, at the cost of the last."""
        place = 0
        while place < len(self.running):  # it becomes shorter, from its end
            job = self.running[place]
            need = job.need(self.ahead) if job.decodes else 0
            while need > self.pages and place < len(self.running):
                self.swap_out(self.running[-1])
            if place < len(self.running):
                self.pages -= need
                self.grown[job.id] = need
            place += 1

    def swap_out(self, job: Job) -> None:
        self.remove(job)
        self.gone.append(job)

    def admit(self, line: Sequence[Job]) -> list[Job]:
        """Whoever is first in the line, as long as there are a row and pages for a whole prompt.

        What was swapped out in this step does not come back in it, nor do others get ahead of it.
        """
        admitted: list[Job] = []
        for job in line:
            if any(job.order > j.order for j in self.gone):
                break
            if not self._has_room(job) and not self._make_room(job):
                break
            self.rows -= 1
            self.pages -= self._cost(job)
            self.running.append(job)
            admitted.append(job)
        self.running.sort(key=_order)
        return admitted

    def _cost(self, job: Job) -> int:
        """Pages that are there for others no more once a waiting job is admitted."""
        return job.need(self.ahead) + job.idle

    def _has_room(self, job: Job) -> bool:
        return self.rows > 0 and self._cost(job) <= self.pages

    def _make_room(self, job: Job) -> bool:
        """Swap out the last in the line who are of a lower priority, if that is enough."""
        lower = [j for j in self.running if j.priority > job.priority][::-1]
        rows, pages = self.rows, self.pages
        for count, victim in enumerate(lower, start=1):
            rows, pages = rows + 1, pages + victim.own + self.grown.get(victim.id, 0)
            if rows > 0 and self._cost(job) <= pages:
                for each in lower[:count]:
                    self.swap_out(each)
                return True
        return False


def _share_out(running: Sequence[Job], tokens: int) -> list[Chunk]:
    """Chunks of the prompts being read, at most one each, `tokens` in all."""
    reading = [j for j in running if j.reads]
    if not reading:
        return []
    first, *others = sorted(reading, key=_order)
    rest = tokens
    counts: dict[int, int] = {}
    if others:
        counts[first.id] = _next_chunk(first, max(tokens // 2, 1))
        rest -= counts[first.id]
    for job in sorted(others, key=lambda j: (j.length, j.order)):
        if rest > 0:
            counts[job.id] = _next_chunk(job, rest)
            rest -= counts[job.id]
    if rest > 0:  # what nobody else wanted
        counts[first.id] = _next_chunk(first, counts.get(first.id, 0) + rest)
    return [Chunk(i, count) for i, count in counts.items()]


def _next_chunk(job: Job, most: int) -> int:
    """Tokens up to the prompt's end, the next mark, or as many as may be."""
    ends = [mark for mark in (*job.marks, job.prompt) if mark > job.length]
    return min(min(ends) - job.length, most)

"""Who has what: rows, pages and cached prefixes, and the next step's work. Touches no tensor."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from qnext.functional.config import PAGE
from qnext.functional.state import pages_of
from qnext.runtime.kept import Kept
from qnext.runtime.options import Options
from qnext.runtime.pages import Pages
from qnext.runtime.plan import Budget, Job, Plan, plan
from qnext.runtime.prefix import Hit, PrefixCache, Snapshot, shared_pages
from qnext.runtime.sequence import Sequence
from qnext.runtime.stats import Stats
from qnext.runtime.work import Complete, Piece, Put, Take, Work

Taken = tuple[int, Kept] | None  # a length and its state; None where the step failed
# have something taken out, and what to do with it
Then = Callable[[Taken], None]
Spill = Callable[[tuple[int, ...], Kept], None]


@dataclass
class Course:
    """A step to be done: its work, whose it is, and what is to be done with what it takes out."""

    work: Work
    expired: list[Sequence] = field(default_factory=list)
    decoding: list[tuple[int, Sequence]] = field(default_factory=list)  # and their rows
    reading: list[tuple[int, Sequence, int]] = field(default_factory=list)  # and length after it
    first: list[Then] = field(default_factory=list)
    then: list[Then] = field(default_factory=list)


class Board:
    """The engine's books. A sequence is waiting, running, or leaving: being swapped out.

    `spill(tokens, kept)` is given the whole states that the prefix cache gives up.
    """

    def __init__(self, options: Options, stats: Stats, spill: Spill | None = None) -> None:
        self.options, self.stats, self.spill = options, stats, spill
        self.ahead = options.draft + 1
        self.waiting: dict[int, Sequence] = {}
        self.reset()

    def reset(self) -> None:
        """Everything is free, and nothing is cached; who waits, waits on."""
        self.pages = Pages(self.options.pool)
        on_evict = self._evicted if self.spill else None
        self.cache = PrefixCache(self.pages, self.options.cache_bytes, on_evict)
        self.running: dict[int, Sequence] = {}
        self.leaving: dict[int, Sequence] = {}
        self._free = list(range(self.options.rows - 1, -1, -1))
        self._first: list[tuple[Take | Complete, Then]] = []
        self._wipes: list[tuple[int, tuple[int, ...]]] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.leaving or self._first or self._wipes)

    @property
    def free_rows(self) -> int:
        return len(self._free)

    def known(self) -> list[Sequence]:
        """Every sequence that has not ended."""
        return [*self.waiting.values(), *self.running.values(), *self.leaving.values()]

    def _evicted(self, tokens: tuple[int, ...], pages: list[int], snapshot: Snapshot) -> None:
        """Have a snapshot's pages copied before they are anybody's: the next step begins so."""

        def completed(result: Taken) -> None:
            if result is not None and self.spill:
                self.spill(tokens, result[1])

        order = Complete(snapshot.length, tuple(pages), snapshot.kept)
        self._first.append((order, completed))

    # ---- the next step

    def next(self, now: float) -> Course:
        """Plan a step and book it: rows and pages are given out as if it were done."""
        hits = self._hits()
        free = self.pages.free
        # where it is not, pages need no counting
        scarce = free < pages_of(self.options.capacity) + self.options.rows
        made = plan(
            [self._waiting_job(s, hits.get(n), scarce) for n, s in self.waiting.items()],
            [s.job(own=self._own(s) if scarce else 0) for s in self.running.values()],
            Budget(
                rows=len(self._free),
                pages=free + self.cache.evictable if scarce else free,
                tokens=self.options.chunk,
                ahead=self.ahead,
                now=now,
            ),
        )
        expired = [s for s in self.known() if s.number in made.expire]
        for sequence in expired:
            self.remove(sequence)
        for number in made.preempt:
            self._swap_out(self.running[number])
        admitted = [(self.waiting[n], hits.get(n)) for n in made.admit]
        for _, hit in admitted:  # before room is made for any of them
            self.pages.share(hit.pages if hit else ())
        puts = [self._admit(*each) for each in admitted]
        course = self._course(made, tuple(put for put in puts if put))
        course.expired = expired
        return course

    def _hits(self) -> dict[int, Hit]:
        """What the cache knows of those who may be admitted."""
        found: dict[int, Hit] = {}
        line = sorted(self.waiting.values(), key=lambda s: (s.request.priority, s.number))
        for sequence in line[: len(self._free)]:
            if sequence.swapped is None and sequence.caches:
                hit = self.cache.find(sequence.tokens, sequence.reusable)
                if hit:
                    found[sequence.number] = hit
        return found

    def _waiting_job(self, sequence: Sequence, hit: Hit | None, scarce: bool) -> Job:
        job = sequence.job()
        if hit is None:
            return job
        idle = sum(self.pages.holders(page) == 1 for page in hit.pages) if scarce else 0
        return job._replace(length=hit.length, pages=len(hit.pages), idle=idle)

    def _own(self, sequence: Sequence) -> int:
        """Pages that no other sequence holds."""
        pages, cache = self.pages, self.cache
        return sum(pages.holders(page) - cache.holds(page) == 1 for page in sequence.pages)

    def _admit(self, sequence: Sequence, hit: Hit | None) -> Put | None:
        """Give a sequence its row and pages; None, and it waits on, where they are not there.

        It holds the pages of its hit already.
        """
        shared = hit.pages if hit else []
        job = self._waiting_job(sequence, hit, False)
        need = job.need(self.ahead)
        if not self.cache.make_room(need):
            self.pages.give_back(shared)
            return None
        del self.waiting[sequence.number]
        sequence.pages = [*shared, *self.pages.take(need)]
        sequence.place = self._free.pop()
        sequence.sent = sequence.length = job.length
        self.running[sequence.number] = sequence
        kept, fill = sequence.swapped, sequence.pages[: pages_of(job.length)]
        if hit:
            kept, fill = hit.snapshot.kept, fill[shared_pages(job.length) :]
        self._count(sequence, job.length)
        sequence.swapped = None
        return Put(
            sequence.row,
            tuple(sequence.tokens),
            job.length,
            sequence.limit,
            tuple(sequence.pages),
            tuple(fill),
            kept,
            sequence.manner(),
        )

    def _count(self, sequence: Sequence, length: int) -> None:
        """Of a request's first turn to run: its prompt, and what was known of it already."""
        if sequence.admitted:
            return
        sequence.admitted = True
        self.stats.prompt += sequence.prompt
        if not sequence.caches:
            return
        sequence.cached = sequence.snapshot = length
        self.stats.cache_queries += sequence.prompt
        self.stats.cache_hits += length

    def _swap_out(self, sequence: Sequence) -> None:
        """Have a running sequence's state taken out; it waits again once that is done."""

        def taken(result: Taken) -> None:
            # without a result the state is lost, and all who are leaving will be ended; one that is
            # leaving no more has ended already
            if result is not None and self.leaving.pop(sequence.number, None) is not None:
                sequence.length, sequence.swapped = result
                self.waiting[sequence.number] = sequence

        self._first.append((Take(sequence.row, whole=True), taken))
        self.remove(sequence)
        self.leaving[sequence.number] = sequence
        self.stats.preempted += 1

    def _course(self, made: Plan, puts: tuple[Put, ...]) -> Course:
        grants: list[tuple[int, tuple[int, ...]]] = []
        copies: list[tuple[Take, Then]] = []
        course = Course(Work())
        pieces: list[Piece] = []
        counts = {chunk.id: chunk.count for chunk in made.prefill}
        for sequence in self._present(counts):
            pieces.append(_piece(sequence, counts[sequence.number]))
            sequence.sent += counts[sequence.number]
            course.reading.append((sequence.row, sequence, sequence.sent))
            if sequence.caches and _is_marked(sequence):
                copies.append(self._copy(sequence))
            copies += self._hand(sequence)
        for sequence in self._present(made.decode):
            if not self._grow(sequence, grants):
                continue
            if self._is_due(sequence) and sequence.caches:
                copies.append(self._copy(sequence))
            sequence.flying += 1
            sequence.sent = min(sequence.sent + self.ahead, sequence.limit)
            course.decoding.append((sequence.row, sequence))
        first, self._first = self._first, []
        wipes, self._wipes = self._wipes, []
        course.first = [then for _, then in first]
        course.then = [then for _, then in copies]
        course.work = Work(
            first=tuple(take for take, _ in first),
            wipes=tuple(wipes),
            puts=puts,
            grants=tuple(grants),
            prefill=tuple(pieces),
            then=tuple(take for take, _ in copies),
            decode=tuple(row for row, _ in course.decoding),
        )
        return course

    def _present(self, numbers: Iterable[int]) -> list[Sequence]:
        """Those that run; one that was to be admitted may have found no pages after all."""
        return [self.running[n] for n in numbers if n in self.running]

    def _grow(self, sequence: Sequence, grants: list[tuple[int, tuple[int, ...]]]) -> bool:
        """Take the pages that its next tokens need; False where there are none after all."""
        room = min(sequence.sent + self.ahead, sequence.limit)
        need = pages_of(room) - len(sequence.pages)
        if need > 0:
            if not self.cache.make_room(need):
                return False
            sequence.pages += self.pages.take(need)
            grants.append((sequence.row, tuple(sequence.pages)))
        return True

    def _is_due(self, sequence: Sequence) -> bool:
        every = self.options.snapshot_every
        return sequence.sent // every > sequence.snapshot // every

    def _copy(self, sequence: Sequence) -> tuple[Take, Then]:
        """Have a snapshot of a sequence taken, for the cache."""
        pages = list(sequence.pages)
        self.pages.share(pages)
        sequence.snapshot = sequence.sent
        cache, held = self.cache, self.pages  # of now: a reset makes new ones

        def taken(result: Taken) -> None:
            # of a sequence that failed the very numbers may be none; of one that went on past its
            # end nobody knows the last tokens
            if result is not None and sequence.error is None and result[0] <= len(sequence.tokens):
                length, kept = result
                cache.add(sequence.tokens[:length], pages, kept)
            held.give_back(pages)

        return Take(sequence.row), taken

    def _hand(self, sequence: Sequence) -> list[tuple[Take, Then]]:
        """Have handed off what is new: pages that are complete, or at its prompt's end the rest."""
        handoff, first = sequence.request.handoff, sequence.handed
        ends = sequence.sent >= sequence.limit
        complete = pages_of(sequence.sent) if ends else sequence.sent // PAGE
        if handoff is None or not (ends or complete > first):
            return []
        sequence.handed = complete
        portion = handoff.portion(first, complete - first, ends)
        if portion is None:
            return []

        def taken(result: Taken) -> None:
            portion.filled(whole=result is not None and sequence.error is None)

        take = Take(sequence.row, whole=True, first=first, states=ends, into=portion.into)
        return [(take, taken)]

    # ---- ends

    def remove(self, sequence: Sequence, keep: bool = False, wipe: bool = False) -> None:
        """A sequence is no longer served: its row and pages are free for the next step.

        `keep`: have its state kept for whoever goes on from there; `wipe`: leave none of its
        numbers behind.
        """
        for place in (self.waiting, self.running, self.leaving):
            place.pop(sequence.number, None)
        if sequence.place is None:
            return
        if keep and sequence.caches:
            self._first.append(self._copy(sequence))
        if wipe:
            own = [p for p in sequence.pages if self.pages.holders(p) == 1]
            self._wipes.append((sequence.row, tuple(own)))
        self.pages.give_back(sequence.pages)
        self._free.append(sequence.row)
        sequence.place, sequence.pages = None, []


def _piece(sequence: Sequence, count: int) -> Piece:
    begin, end = sequence.sent, sequence.sent + count
    tokens = tuple(sequence.tokens[begin:end])
    return Piece(sequence.row, tokens, sequence.request.prompt_logprobs, sequence.tokens[end])


def _is_marked(sequence: Sequence) -> bool:
    return sequence.sent in (*sequence.marks, sequence.prompt - 1)

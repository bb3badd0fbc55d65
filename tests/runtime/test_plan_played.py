"""Plans carried out step after step, on real books, until every job is done: nobody starves."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.runtime.pages import Pages
from qnext.runtime.plan import Budget, Job, Plan, plan

PREFIX = 300  # tokens that a family's prompts have in common


def pages_of(tokens: int) -> int:
    return (tokens + 127) // 128


class Arrival(NamedTuple):
    """The step a request comes at, its prompt, what it will draw; family 0 shares no prefix."""

    step: int
    prompt: int
    more: int
    priority: int = 0
    family: int = 0
    deadline: float | None = None

    @property
    def limit(self) -> int:
        return max(self.prompt + self.more, 1)


class Play:
    """Carries out plans; `Pages` raises where one counts on pages that are not there.

    A new job begins on the pages that it shares with a running one of its family. A step of
    decoding consumes 1 to `ahead` tokens.
    """

    def __init__(self, arrivals: Sequence[Arrival], pool: int, budget: Budget) -> None:
        self.arrivals, self.budget, self.pool = arrivals, budget, Pages(pool)
        self.rng = random.Random(1)
        self.jobs: dict[int, Job] = {}  # neither done nor expired
        self.held: dict[int, list[int]] = {}  # pages of those that run
        self.now, self.first = -1, -1  # who was first in the line in the last step

    @property
    def over(self) -> bool:
        return not self.jobs and all(each.step <= self.now for each in self.arrivals)

    def shared(self, job: Job) -> list[int]:
        """Pages of a running job that one that has consumed nothing can begin on."""
        family, best = self.arrivals[job.id].family, list[int]()
        for i, pages in self.held.items():
            if family and not job.length and self.arrivals[i].family == family:
                same = min(PREFIX, self.jobs[i].length, job.prompt)
                best = max(best, pages[: max(same - 1, 0) // 128], key=len)
        return best

    def step(self) -> Plan:
        self.now += 1
        assert self.now < 9999, "this goes on for ever"
        for i, each in enumerate(self.arrivals):
            if each.step == self.now:
                self.jobs[i] = Job(
                    i,
                    i,
                    each.prompt,
                    each.limit,
                    priority=each.priority,
                    deadline=each.deadline,
                    marks=(50, 128, 200),
                )
        line = sorted((job.priority, i) for i, job in self.jobs.items() if not self.late(job))
        self.first = line[0][1] if line else -1
        hits = {i: self.shared(job) for i, job in self.jobs.items() if i not in self.held}
        for pages in hits.values():
            self.pool.share(pages)  # so they are nobody's own meanwhile
        waiting = [
            self.jobs[i]._replace(length=128 * len(pages) + 1, pages=len(pages))
            if pages
            else self.jobs[i]
            for i, pages in hits.items()
        ]
        running = [
            self.jobs[i]._replace(pages=len(pages), own=self.own(pages))
            for i, pages in self.held.items()
        ]
        rows = self.budget.rows - len(self.held)
        budget = self.budget._replace(rows=rows, pages=self.pool.free, now=float(self.now))
        made = plan(waiting, running, budget)
        self.carry_out(made, {job.id: job for job in waiting}, hits)
        for pages in hits.values():
            self.pool.give_back(pages)
        for i in [i for i, job in self.jobs.items() if job.length == job.limit]:
            self.remove(i)
            del self.jobs[i]
        assert len(self.held) <= self.budget.rows
        return made

    def late(self, job: Job) -> bool:
        return job.deadline is not None and job.deadline <= self.now

    def own(self, pages: Sequence[int]) -> int:
        return sum(self.pool.holders(page) == 1 for page in pages)

    def remove(self, i: int) -> None:
        self.pool.give_back(self.held.pop(i, []))

    def carry_out(self, made: Plan, waiting: dict[int, Job], hits: dict[int, list[int]]) -> None:
        for i in made.expire:
            self.remove(i)
            del self.jobs[i]
        for i in made.preempt:
            self.remove(i)
        for i in made.admit:
            assert i not in self.held
            self.jobs[i] = waiting[i]._replace(pages=0)
            self.pool.share(hits[i])
            self.held[i] = [*hits[i]]
            self.grow(i)
        for i in made.decode:
            self.grow(i)
        for chunk in made.prefill:
            self.consume(chunk.id, chunk.count)
        for i in made.decode:
            self.consume(i, self.rng.randint(1, self.budget.ahead))

    def grow(self, i: int) -> None:
        job, pages = self.jobs[i], self.held[i]
        end = min(max(job.length, job.prompt) + self.budget.ahead, job.limit)
        pages += self.pool.take(max(pages_of(end) - len(pages), 0))

    def consume(self, i: int, count: int) -> None:
        job = self.jobs[i]
        length = min(job.length + count, job.limit)
        assert pages_of(length) <= len(self.held[i])
        self.jobs[i] = job._replace(length=length)


def sorted_by_step(requests: list[Arrival]) -> list[Arrival]:
    return sorted(requests, key=lambda each: each.step)


def arrivals(families: int) -> st.SearchStrategy[list[Arrival]]:
    each = st.builds(
        Arrival,
        step=st.integers(0, 30),
        prompt=st.one_of(st.integers(0, 400), st.sampled_from([127, 128, 129, 256])),
        more=st.integers(0, 140),
        priority=st.integers(0, 2),
        family=st.integers(0, families),
        deadline=st.sampled_from([None] * 5 + [5.0, 20.0, 90.0]),
    )
    return st.lists(each, min_size=1, max_size=6).map(sorted_by_step)


BUDGETS = st.builds(
    Budget,
    rows=st.integers(1, 4),
    pages=st.just(0),
    tokens=st.sampled_from([1, 7, 64, 256]),
    ahead=st.integers(1, 3),
)


def whole(requests: Sequence[Arrival]) -> int:
    """Pages of the longest: a pool has no less."""
    return max(pages_of(each.limit) for each in requests)


@settings(deadline=None, max_examples=40)
@given(arrivals(families=0), st.integers(0, 3), BUDGETS)
def test_who_is_first_in_the_line_goes_on_in_every_step(
    requests: list[Arrival], more: int, budget: Budget
) -> None:
    """So all are done at last, even where the pool holds a single one."""
    play = Play(requests, whole(requests) + more, budget)
    while not play.over:
        made = play.step()
        assert play.first in (-1, *made.decode, *(each.id for each in made.prefill))
    assert play.pool.free == play.pool.count


@settings(deadline=None, max_examples=40)
@given(arrivals(families=2), st.integers(0, 3), BUDGETS)
def test_all_are_done_where_pages_are_shared(
    requests: list[Arrival], more: int, budget: Budget
) -> None:
    """Who is swapped out gives back only what is its own, so somebody may wait for a step."""
    play = Play(requests, whole(requests) + more, budget)
    idle = 0
    while not play.over:
        made = play.step()
        idle = 0 if made.decode or made.prefill or play.first < 0 else idle + 1
        assert idle < 3
    assert play.pool.free == play.pool.count


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("more", [0, 1, 6])
def test_many_in_the_smallest_pool(rows: int, more: int) -> None:
    """All grow over the end of a page at once, and are swapped out and in again."""
    requests = [Arrival(step, prompt=120 - step, more=200) for step in range(6)]
    play = Play(requests, 3 + more, Budget(rows=rows, pages=0, ahead=2))
    preempted = 0
    while not play.over:
        made = play.step()
        assert play.first in (*made.decode, *(each.id for each in made.prefill))
        preempted += len(made.preempt)
    assert (preempted > 0) == (rows == 3 and more < 6)


def first_token(requests: Sequence[Arrival], budget: Budget) -> int:
    """Steps from the arrival of the last request until it decodes."""
    play, last = Play(requests, 200, budget), len(requests) - 1
    while last not in play.step().decode:
        pass
    return play.now - requests[last].step


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 600),
    st.integers(0, 9),
    st.sampled_from([16, 64, 256]),
    st.integers(0, 2),
)
def test_a_long_prompt_makes_a_short_one_twice_as_slow_at_most(
    short: int, step: int, tokens: int, priority: int
) -> None:
    budget = Budget(rows=4, pages=0, tokens=tokens)
    mine = Arrival(step, short, more=1)
    long = Arrival(0, 20_000, more=1, priority=priority)
    alone, beside = first_token([mine], budget), first_token([long, mine], budget)
    assert alone <= beside <= 2 * alone + 1

"""Plans: what each may hold is recomputed from budget and jobs; and played until all is done."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.functional.config import PAGE
from qnext.runtime.plan import Budget, Chunk, Job, Plan, plan

MANY = settings(deadline=None, max_examples=300)


def pages_of(tokens: int) -> int:
    return (tokens + 127) // 128


class Sketch(NamedTuple):
    """What a case is made of: strategies may not make jobs, as their checks use `random`."""

    waiting: list[dict[str, Any]]
    running: list[dict[str, Any]]
    budget: Budget


class Case(NamedTuple):
    waiting: list[Job]
    running: list[Job]
    budget: Budget

    def plan(self) -> Plan:
        return plan(self.waiting, self.running, self.budget)


def case_of(sketch: Sketch) -> Case:
    waiting, running, budget = sketch
    return Case([Job(**each) for each in waiting], [Job(**each) for each in running], budget)


@st.composite
def sketches(draw: st.DrawFn) -> Sketch:
    """Jobs at any point of their lives, and a budget too small for some of them.

    Those that read hold the pages of their whole prompt, those that decode those of what they have
    consumed, at least; those that wait what they share with somebody.
    """
    ahead = draw(st.integers(1, 3))
    waiting, running = [], []
    for number, arrival in enumerate(draw(st.permutations(range(draw(st.integers(0, 7)))))):
        prompt = draw(st.sampled_from([0, 1, 100, 126, 127, 128, 129, 200, 256, 257, 450]))
        limit = max(prompt + draw(st.sampled_from([0, 1, 2, 100, 300, 300])), 1)
        full = pages_of(prompt) * 128
        lengths = [0, prompt // 2, prompt, full - 1, full, limit - 1, limit]
        length = max(min(draw(st.sampled_from(lengths)), limit), 0)
        runs = draw(st.booleans())
        most = pages_of(min(max(length, prompt) + ahead, limit))
        pages = draw(st.integers(0, max(min(length, prompt) - 1, 0) // 128))
        if runs:
            pages = most if length < prompt else draw(st.integers(pages_of(length), most))
        job = {
            "id": 100 + number,
            "arrival": arrival,
            "prompt": prompt,
            "limit": limit,
            "length": length,
            "pages": pages,
            "own": draw(st.sampled_from([0, pages, max(pages - 1, 0)])) if runs else 0,
            "priority": draw(st.integers(0, 2)),
            "deadline": draw(st.sampled_from([None] * 9 + [0.5, 1.0, 1.5])),
            "marks": tuple(sorted(draw(st.sets(st.integers(1, 600), max_size=3)))),
        }
        (running if runs else waiting).append(job)
    budget = Budget(
        rows=draw(st.integers(0, 3)),
        pages=draw(st.sampled_from([0, 1, 2, 3, 9])),
        tokens=draw(st.sampled_from([1, 2, 3, 64, 256, 1000])),
        ahead=ahead,
        now=1.0,
    )
    return Sketch(waiting, running, budget)


class Books(NamedTuple):
    """A plan beside the jobs it is about, and what it leaves."""

    kept: list[Job]  # run on
    preempted: list[Job]
    admitted: list[Job]
    left: list[Job]  # wait on
    rows: int
    pages: int

    @property
    def present(self) -> list[Job]:
        return [*self.kept, *self.admitted]


def booked(case: Case, made: Plan) -> Books:
    """What is left of a budget, counted from the plan alone; also that it is about these jobs."""
    waiting, running, budget = case
    by_id = {job.id: job for job in (*waiting, *running)}
    for ids in (made.expire, made.preempt, made.admit, made.decode, [c.id for c in made.prefill]):
        assert len(set(ids)) == len(ids) and set(ids) <= by_id.keys()
    here = [job for job in running if job.id not in made.expire]
    preempted, admitted = ([by_id[i] for i in ids] for ids in (made.preempt, made.admit))
    assert all(job in here for job in preempted)
    assert all(job in waiting and job.id not in made.expire for job in admitted)
    kept = [job for job in here if job not in preempted]
    gone = [job for job in running if job not in kept]
    return Books(
        kept,
        preempted,
        admitted,
        [job for job in waiting if job.id not in (*made.expire, *made.admit)],
        budget.rows + len(gone) - len(admitted),
        budget.pages
        + sum(job.own for job in gone)
        - sum(lacks(job, budget) for job in (*admitted, *growing(kept))),
    )


def growing(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.prompt <= job.length < job.limit]


def lacks(job: Job, budget: Budget) -> int:
    """Pages for its prompt and one step of decoding, which it does not have."""
    end = min(max(job.length, job.prompt) + budget.ahead, job.limit)
    return max(pages_of(end) - job.pages, 0)


def line(jobs: Sequence[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: (job.priority, job.arrival))


def chunk_end(job: Job) -> int:
    return min([mark for mark in job.marks if mark > job.length] + [job.prompt])


# --- what holds of every plan --------------------------------------------------------------------


def check_rows_and_pages(case: Case, made: Plan) -> None:
    books = booked(case, made)
    assert books.rows >= 0 and books.pages >= 0


def check_deadlines(case: Case, made: Plan) -> None:
    jobs = [*case.waiting, *case.running]
    late = [job.id for job in jobs if job.deadline is not None and job.deadline <= 1.0]
    assert list(made.expire) == sorted(late)


def check_work(case: Case, made: Plan) -> None:
    """All who can decode do; chunks end at marks and prompts; no token is left over in vain."""
    present = booked(case, made).present
    counts = {each.id: each.count for each in made.prefill}
    after = [job._replace(length=job.length + counts.get(job.id, 0)) for job in present]
    assert list(made.decode) == [job.id for job in line(growing(after))]
    reading = [job for job in present if job.length < job.prompt]
    most = {job.id: chunk_end(job) - job.length for job in reading}
    assert all(0 < count <= most[i] for i, count in counts.items())
    assert sum(counts.values()) == min(case.budget.tokens, sum(most.values()))
    for first in line(reading)[:1]:
        assert counts[first.id] >= min(most[first.id], max(case.budget.tokens // 2, 1))


def check_nobody_overtakes(case: Case, made: Plan) -> None:
    """Not those who wait on, nor those who were swapped out for others."""
    books = booked(case, made)
    for job in books.admitted:
        for other in (*books.left, *books.preempted):
            assert line([other, job])[0] is job


def check_swapped_out(case: Case, made: Plan) -> None:
    """The last in the line, and no more than must."""
    books = booked(case, made)
    assert line([*books.kept, *books.preempted]) == [*line(books.kept), *line(books.preempted)]
    if books.preempted:  # had the first of them stayed, there would be too little of something
        assert books.rows < 1 or books.pages < returned(line(books.preempted)[:1], case.budget)
    if not growing(case.running):  # then it is for those who wait, of a higher priority
        for job in books.preempted:
            assert any(job.priority > other.priority for other in books.admitted)


def check_left(case: Case, made: Plan) -> None:
    """Who is first of those who wait on finds no room, even with all lower ones swapped out."""
    books = booked(case, made)
    for first in line(books.left)[:1]:
        if any(line([job, first])[0] is job for job in books.preempted):
            continue  # who was swapped out comes before
        lower = [job for job in books.kept if job.priority > first.priority]
        pages = books.pages + returned(lower, case.budget)
        assert books.rows + len(lower) < 1 or pages < lacks(first, case.budget)


def returned(jobs: Sequence[Job], budget: Budget) -> int:
    """Pages there are if these, who run on in a plan, do not: theirs, and what they would take."""
    return sum(job.own for job in jobs) + sum(lacks(job, budget) for job in growing(jobs))


CHECKS = (
    check_rows_and_pages,
    check_deadlines,
    check_work,
    check_nobody_overtakes,
    check_swapped_out,
    check_left,
)


@settings(deadline=None, max_examples=500)
@given(sketches())
def test_every_plan(sketch: Sketch) -> None:
    case = case_of(sketch)
    for check in CHECKS:
        check(case, case.plan())


@settings(deadline=None, max_examples=50)
@given(sketches(), st.randoms(use_true_random=False))
def test_a_plan_is_a_pure_function_of_sets_of_jobs(sketch: Sketch, rng: random.Random) -> None:
    case = case_of(sketch)
    made = case.plan()
    assert made == case.plan() and case == case_of(sketch)
    shuffled = [rng.sample(jobs, len(jobs)) for jobs in (case.waiting, case.running)]
    assert plan(*shuffled, case.budget) == made


# --- single steps --------------------------------------------------------------------------------


def job(id: int, prompt: int, more: int = 100, **values: Any) -> Job:
    return Job(**{"id": id, "arrival": id, "prompt": prompt, "limit": prompt + more} | values)


def test_nothing_to_do_is_no_plan() -> None:
    assert plan([], [], Budget(3, 9)) == ((), (), (), (), ()) and not plan([], [], Budget(3, 9))
    done = job(1, 5, more=2, length=7, pages=1, own=1)
    assert not plan([job(2, 5)], [done], Budget(0, 9))  # it keeps its row until it is settled
    assert plan([], [done._replace(length=6)], Budget(0, 9)).decode == (1,)


def test_who_has_read_its_prompt_decodes_in_the_same_step() -> None:
    reads, none_to_come = job(1, 20, length=14, pages=1, own=1), job(2, 9, more=0)
    made = plan([none_to_come], [reads], Budget(rows=1, pages=9, tokens=15))
    assert made.prefill == (Chunk(1, 6), Chunk(2, 9)) and made.decode == (1,)
    made = plan([], [reads], Budget(rows=1, pages=9, tokens=5))  # a token is left of it
    assert made.prefill == (Chunk(1, 5),) and made.decode == ()


def test_pages_that_a_job_lacks() -> None:
    assert [job(1, n, more=9).need(1) for n in (0, 126, 127, 128, 255)] == [1, 1, 1, 2, 2]
    assert job(1, 128, more=0).need(3) == 1  # it will not go beyond its limit
    assert job(1, 126, more=1).need(3) == 1
    assert job(1, 200, length=300, pages=2, more=999).need(3) == 1
    assert job(1, 200, length=3, pages=2).need(3) == 0
    assert job(1, 200, length=3, pages=5).need(3) == 0


def test_tokens_are_shared_out() -> None:
    budget = Budget(rows=0, pages=0, tokens=100)
    long, short, shorter = (job(i, n, pages=9) for i, n in ((1, 999), (2, 30), (3, 8)))
    assert plan([], [long], budget).prefill == (Chunk(1, 100),)
    assert {*plan([], [long, short, shorter], budget).prefill} == {
        *(Chunk(1, 50 + 12), Chunk(2, 30), Chunk(3, 8))
    }
    given_more = short._replace(prompt=300, limit=300, length=20)
    assert {*plan([], [long, given_more, shorter], budget).prefill} == {
        *(Chunk(1, 50), Chunk(2, 42), Chunk(3, 8))
    }
    marked = long._replace(length=40, marks=(10, 40, 47, 90))
    assert {*plan([], [marked, given_more], budget).prefill} == {Chunk(1, 7), Chunk(2, 93)}
    assert plan([], [long, short], budget._replace(tokens=1)).prefill == (Chunk(1, 1),)


@pytest.mark.parametrize("priority", [0, 1, 2])
@pytest.mark.parametrize("read", [0, 1, 5000])
def test_a_long_prompt_does_not_hold_up_a_short_one(priority: int, read: int) -> None:
    """Whatever their order, and however much of the long one was read."""
    long = job(1, 90_000, length=read, pages=704, own=704, priority=1)
    short = job(2, 128, priority=priority)
    made = plan([short], [long], Budget(rows=1, pages=2, tokens=256))
    assert made.admit == (2,) and {*made.prefill} == {Chunk(1, 128), Chunk(2, 128)}


def test_who_decodes_grows_at_the_cost_of_the_last() -> None:
    ready = [job(i, 100, length=128, pages=1, own=1, more=300) for i in (1, 2, 3)]
    budget = Budget(rows=5, pages=1)
    made = plan([job(4, 9)], ready, budget)
    assert (made.preempt, made.decode, made.admit) == ((3,), (1, 2), ())
    rich = [*ready[:2], ready[2]._replace(pages=3, own=3)]
    assert plan([job(4, 9)], rich, budget) == made  # 4 does not get what was taken from 3
    assert plan([job(0, 9)], rich, budget).admit == (0,)
    assert plan([], ready, budget._replace(pages=3)).decode == (1, 2, 3)
    alone = plan([], ready[:1], budget._replace(pages=0))
    assert (alone.preempt, alone.decode) == ((1,), ())
    shared = [ready[0], ready[1]._replace(own=0), ready[2]]  # who gives nothing goes as well
    assert plan([], shared[:2], budget._replace(pages=0)).preempt == (2, 1)


def test_a_higher_priority_swaps_out_lower_ones_if_that_is_enough() -> None:
    low = [job(i, 250, length=9, pages=3, own=own, priority=5) for i, own in ((1, 3), (2, 1))]
    urgent = job(3, 500, more=12)  # 4 pages
    made = plan([urgent], low, Budget(rows=0, pages=0))
    assert (made.preempt, made.admit, made.prefill) == ((2, 1), (3,), (Chunk(3, 256),))
    made = plan([urgent], low, Budget(rows=0, pages=3))
    assert (made.preempt, made.admit) == ((2,), (3,))
    made = plan([urgent._replace(limit=513)], low, Budget(rows=0, pages=0))  # one token more
    assert (made.preempt, made.admit) == ((2, 1), (3,))
    made = plan([urgent._replace(prompt=512, limit=513)], low, Budget(rows=0, pages=0))
    assert not made.preempt and not made.admit and len(made.prefill) == 2
    made = plan([urgent._replace(priority=5)], low, Budget(rows=0, pages=9))
    assert not made.preempt and not made.admit


def test_pages_for_tokens_that_will_not_be_drawn_are_free() -> None:
    """A job was to take the last page; it is swapped out, so another may."""
    low = job(1, 9, length=128, pages=1, priority=1, more=300)
    made = plan([job(2, 9)], [low], Budget(rows=0, pages=1))
    assert (made.preempt, made.admit, made.prefill) == ((1,), (2,), (Chunk(2, 9),))
    made = plan([job(2, 9), job(3, 9)], [low._replace(own=1)], Budget(rows=1, pages=1))
    assert (made.preempt, made.admit) == ((1,), (2, 3))


def test_the_late_make_room_for_others() -> None:
    late = job(1, 200, length=200, pages=2, own=2, deadline=5.0)
    waits = [job(2, 9, deadline=5.0), job(3, 9, deadline=5.1), job(4, 9)]
    made = plan(waits, [late], Budget(rows=0, pages=0, now=5.0))
    assert made == ((1, 2), (), (3,), (Chunk(3, 9),), (3,))
    made = plan(waits, [late], Budget(rows=0, pages=0, now=4.9))
    assert made == ((), (), (), (), (1,))


def test_who_comes_back_goes_on_at_once() -> None:
    swapped = job(1, 100, length=120)
    made = plan([swapped, job(2, 7)], [], Budget(rows=2, pages=2))
    assert made == ((), (), (1, 2), (Chunk(2, 7),), (1, 2))
    begun = job(1, 100, length=60)
    assert plan([begun], [], Budget(rows=1, pages=1)).prefill == (Chunk(1, 40),)


def test_idle_pages_of_a_hit_are_spent_once_it_is_admitted() -> None:
    """They count as free for others until then, the first in the line among them."""
    hit = Job(1, 1, prompt=3 * PAGE, limit=3 * PAGE + 9, length=2 * PAGE, pages=2, idle=2)
    assert plan([hit], [], Budget(rows=1, pages=4)).admit == (1,)  # needs 2 beside them
    assert plan([hit], [], Budget(rows=1, pages=3)).admit == ()
    first = Job(0, 0, prompt=4 * PAGE - 9, limit=4 * PAGE)
    assert plan([first, hit], [], Budget(rows=2, pages=4)).admit == (0,)
    assert plan([first, hit], [], Budget(rows=2, pages=8)).admit == (0, 1)

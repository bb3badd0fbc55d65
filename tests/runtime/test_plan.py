"""Plans: what each may hold is recomputed from budget and jobs; and played until all is done."""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
def sketches(draw: st.DrawFn, decode: bool = True) -> Sketch:
    """Jobs at any point of their lives, and a budget too small for some of them.

    Those that read hold the pages of their whole prompt, those that decode those of what they have
    consumed, at least; those that wait what they share with somebody.
    """
    ahead = draw(st.integers(1, 3))
    waiting, running = [], []
    for number, arrival in enumerate(draw(st.permutations(range(draw(st.integers(0, 7)))))):
        prompt = draw(st.one_of(st.integers(0, 600), st.sampled_from([1, 127, 128, 129, 256])))
        more = draw(st.sampled_from([0, 1, 2, 100, 300]))
        limit = max(prompt + more, 1)
        runs = draw(st.booleans())
        last = limit if decode or not runs else prompt - 1
        length = draw(st.one_of(st.just(0), st.integers(0, max(last, 0)), st.just(max(last, 0))))
        if runs and not decode and not prompt:
            continue
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
            "own": draw(st.integers(0, pages)) if runs else 0,
            "priority": draw(st.integers(0, 2)),
            "deadline": draw(st.sampled_from([None, None, None, None, 0.5, 1.0, 1.5])),
            "marks": tuple(sorted(draw(st.sets(st.integers(1, 600), max_size=3)))),
        }
        (running if runs else waiting).append(job)
    budget = Budget(
        rows=draw(st.integers(0, 3)),
        pages=draw(st.integers(0, 9)),
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


@MANY
@given(sketches())
def test_a_plan_stays_within_rows_and_pages(sketch: Sketch) -> None:
    case = case_of(sketch)
    books = booked(case, case.plan())
    assert books.rows >= 0 and books.pages >= 0


@MANY
@given(sketches())
def test_those_who_are_late_expire_and_nobody_else(sketch: Sketch) -> None:
    case = case_of(sketch)
    jobs = [*case.waiting, *case.running]
    late = [job.id for job in jobs if job.deadline is not None and job.deadline <= 1.0]
    assert list(case.plan().expire) == sorted(late)


@MANY
@given(sketches())
def test_all_who_are_there_decode_or_share_the_tokens(sketch: Sketch) -> None:
    """Chunks end at marks and prompts, and no token is left that somebody could read."""
    case = case_of(sketch)
    made = case.plan()
    present = booked(case, made).present
    assert set(made.decode) == {job.id for job in growing(present)}
    reading = {job.id: job for job in present if job.length < job.prompt}
    most = {i: chunk_end(job) - job.length for i, job in reading.items()}
    for each in made.prefill:
        assert 0 < each.count <= most[each.id]
    given_out = sum(each.count for each in made.prefill)
    assert given_out == min(case.budget.tokens, sum(most.values()))
    if reading:
        first = line(list(reading.values()))[0].id
        counts = {each.id: each.count for each in made.prefill}
        assert counts[first] >= min(most[first], max(case.budget.tokens // 2, 1))


@MANY
@given(sketches())
def test_nobody_overtakes(sketch: Sketch) -> None:
    """Not those who wait on, nor those who were swapped out for others."""
    case = case_of(sketch)
    books = booked(case, case.plan())
    for job in books.admitted:
        for other in (*books.left, *books.preempted):
            assert line([job, other])[0] is job


@MANY
@given(sketches())
def test_the_last_in_the_line_are_swapped_out_and_no_more_than_must(sketch: Sketch) -> None:
    case = case_of(sketch)
    books = booked(case, case.plan())
    assert line([*books.kept, *books.preempted]) == [*line(books.kept), *line(books.preempted)]
    if books.preempted:  # had the first of them stayed, there would be too little of something
        stays = line(books.preempted)[0]
        pages = stays.own + sum(lacks(job, case.budget) for job in growing([stays]))
        assert books.rows < 1 or books.pages < pages


@MANY
@given(sketches(decode=False))
def test_who_waits_swaps_out_lower_priorities_only(sketch: Sketch) -> None:
    """With nobody who decodes and grows, what is swapped out is swapped out for a waiting job."""
    case = case_of(sketch)
    books = booked(case, case.plan())
    for job in books.preempted:
        assert any(job.priority > other.priority for other in books.admitted)


@MANY
@given(sketches())
def test_who_is_not_admitted_could_not_be(sketch: Sketch) -> None:
    """Not even with all of a lower priority swapped out; or someone earlier was swapped out."""
    case = case_of(sketch)
    books = booked(case, case.plan())
    for first in line(books.left)[:1]:
        if any(line([job, first])[0] is job for job in books.preempted):
            continue
        lower = [job for job in books.kept if job.priority > first.priority]
        pages = books.pages + sum(job.own for job in lower)
        pages += sum(lacks(job, case.budget) for job in growing(lower))
        assert books.rows + len(lower) < 1 or pages < lacks(first, case.budget)


@MANY
@given(sketches(), st.randoms(use_true_random=False))
def test_a_plan_is_a_pure_function_of_sets_of_jobs(sketch: Sketch, rng: random.Random) -> None:
    case = case_of(sketch)
    before = copy.deepcopy(case)
    made = case.plan()
    assert made == case.plan() and case == before
    shuffled = [rng.sample(jobs, len(jobs)) for jobs in (case.waiting, case.running)]
    assert plan(*shuffled, case.budget) == made


# --- single steps --------------------------------------------------------------------------------

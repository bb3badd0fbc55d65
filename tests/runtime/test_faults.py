"""What fails harms nobody else: NaN in a state, a step that raises, a worker that breaks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from qnext.functional.state import State
from qnext.functional.tree import leaves
from qnext.runtime.engine import Engine
from qnext.runtime.request import (
    CorruptedError,
    Output,
    RankError,
    RefusedError,
    Request,
    StepError,
)
from qnext.runtime.service import Service
from qnext.runtime.steps import Steps
from qnext.runtime.work import Done, Take, Work
from tests.runtime.engines import VOCAB, alone, ends_of, engine, is_clean, serve

REQUESTS = [
    Request(tokens=tuple((k * i + 1) % VOCAB for i in range(20 * k)), max_new_tokens=30, eos=())
    for k in (1, 2, 3, 7, 9)
]


def started(served: Engine, requests: Sequence[Request], steps: int) -> list[list[Output]]:
    """Requests under way: so many steps have been launched."""
    outputs: list[list[Output]] = [[] for _ in requests]
    for request, into in zip(requests, outputs, strict=True):
        served.submit(request, into.append)
    for _ in range(steps):
        served.step()
    return outputs


def others_are_unharmed(outputs: Sequence[Sequence[Output]], harmed: Sequence[int]) -> None:
    wanted = alone(engine(), REQUESTS)
    for number, (mine, theirs) in enumerate(zip(outputs, wanted, strict=True)):
        if number not in harmed:
            assert ends_of(mine) == ends_of(theirs)
        else:
            assert mine[-1].finish == "error"


@pytest.mark.parametrize(
    ("draft", "pool"),
    [
        (0, "recurrent"),
        (0, "window"),
        (0, "key"),
        pytest.param(2, "recurrent", marks=pytest.mark.slow),
    ],
)
def test_nan_in_one_state(draft: int, pool: str) -> None:
    served = engine(draft)
    outputs = started(served, REQUESTS[:3], 9)
    served.worker._blur()  # what decodes is laid out anew from the tables of all rows
    row = 1
    (victim,) = [s for s in served.board.running.values() if s.place == row]
    state = served.worker.state
    if pool == "recurrent":
        state.layers[0].recurrent[state.slots[row, 0].long()] = torch.nan
    elif pool == "window":
        state.layers[0].window[state.rows[row].long()] = torch.nan
    else:
        state.layers[1].key[victim.pages[0], 3] = torch.nan
    for request in REQUESTS[3:]:  # these get the row and the pages afterwards
        outputs.append([])
        served.submit(request, outputs[-1].append)
    served.run()
    number = next(i for i, r in enumerate(REQUESTS) if r.id == victim.request.id)
    others_are_unharmed(outputs, [number])
    assert isinstance(outputs[number][-1].error, CorruptedError)
    assert served.stats.corrupted == 1
    assert is_clean(served)
    # what was given back holds numbers again
    pools = [*served.worker.state.layers, *served.worker.state.mtp]
    assert all(leaf[1:].isfinite().all() for leaf in leaves(pools))


class Broken(Steps):
    """Steps of which the n-th call by a name raises."""

    def __init__(self, steps: Steps, name: str, at: int) -> None:
        self.__dict__.update(steps.__dict__)
        self.name, self.left = name, at

    def __call__(self, name: str, state: State, *rest: Any) -> Any:
        if name == self.name:
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("planted")
        return super().__call__(name, state, *rest)


@pytest.mark.parametrize("overlap", [False, True], ids=["waits", "overlaps"])
@pytest.mark.parametrize(
    ("draft", "name"),
    [
        (0, "next"),
        (0, "consume"),
        pytest.param(2, "ahead", marks=pytest.mark.slow),
    ],
)
def test_a_step_that_raises(draft: int, name: str, overlap: bool) -> None:
    """Its own rows fail and say why; those who wait, or are in the step's other calls, do not."""
    served = engine(draft, overlap=overlap)
    served.worker.steps = Broken(served.steps, name, at=6)
    outputs = serve(served, REQUESTS)
    harmed = [i for i, each in enumerate(outputs) if each[-1].finish == "error"]
    assert 0 < len(harmed) < len(REQUESTS)
    others_are_unharmed(outputs, harmed)
    for number in harmed:
        error = outputs[number][-1].error
        assert isinstance(error, StepError) and "RuntimeError: planted" in str(error)
    assert served.stats.failed_steps == 1
    assert is_clean(served)
    served.close()


@pytest.mark.parametrize("overlap", [False, True], ids=["waits", "overlaps"])
def test_a_worker_that_breaks(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ran is lost, whoever waited is served."""
    served = engine(overlap=overlap)
    outputs = started(served, REQUESTS, 6)
    run, left = served.worker.run, [1]

    def broken(work: Work) -> Done:
        if left.pop() if left else 0:
            raise MemoryError("planted")
        return run(work)

    monkeypatch.setattr(served.worker, "run", broken)
    served.run()
    harmed = [i for i, each in enumerate(outputs) if each[-1].finish == "error"]
    assert 0 < len(harmed) < len(REQUESTS)
    others_are_unharmed(outputs, harmed)
    assert is_clean(served)
    served.close()


def test_a_worker_that_breaks_while_one_is_swapped_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had drawn is known, its state is lost: it ends, and is not begun in its middle."""
    served = engine(rows=1)
    outputs = started(served, [replace(REQUESTS[0], priority=1)], 9)
    urgent: list[Output] = []
    served.submit(REQUESTS[1], urgent.append)
    run = served.worker.run

    def broken(work: Work) -> Done:
        if any(isinstance(each, Take) and each.whole for each in work.first):
            raise MemoryError("planted")
        return run(work)

    monkeypatch.setattr(served.worker, "run", broken)
    served.run()
    assert served.stats.preempted == 1
    assert outputs[0][-1].finish == "error"
    assert isinstance(outputs[0][-1].error, StepError)


@pytest.mark.slow
def test_aborting_at_any_moment_leaks_nothing() -> None:
    """Waiting, reading, decoding, being swapped out, swapped out."""
    for moment in range(0, 60, 3):
        served = engine()
        long = [replace(r, max_new_tokens=150, priority=i % 2) for i, r in enumerate(REQUESTS)]
        outputs = started(served, long, moment)
        for sequence in served.board.known():
            served.abort(sequence)
        served.run()
        assert all(each[-1].finish in ("abort", "length") for each in outputs)
        assert is_clean(served)


def test_closing_ends_everybody() -> None:
    served = engine(overlap=True)
    outputs = started(served, REQUESTS, 5)
    served.close()
    assert [each[-1].finish for each in outputs] == ["closed"] * len(REQUESTS)
    assert not served.busy


def test_beginning_anew_keeps_the_memory_of_the_pools() -> None:
    """Captured steps know no other, and there may not be room for twice as much."""
    served = engine()
    started(served, REQUESTS[:2], 4)
    pools = [*served.worker.state.layers, *served.worker.state.mtp]
    before = [leaf.data_ptr() for leaf in leaves(pools)]
    served.recover(RuntimeError("planted"))
    state = served.worker.state
    assert [leaf.data_ptr() for leaf in leaves([*state.layers, *state.mtp])] == before
    assert not any(leaf.any() for leaf in leaves([*state.layers, *state.mtp]))
    assert state.lengths.tolist() == [0, 0, 0] and not state.block_table.any()
    others_are_unharmed([serve(served, [request])[0] for request in REQUESTS], [])


@pytest.mark.parametrize("overlap", [False, True])
def test_ranks_that_are_gone_end_every_request(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that run and those that wait; nobody is taken in any more, and the reason is told."""
    served = engine(overlap=overlap)
    calls, run = 0, served.worker.run

    def breaks(work: Work) -> Done:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RankError("rank 1 is gone")
        return run(work)

    monkeypatch.setattr(served.worker, "run", breaks)
    with Service(served) as service:
        outputs = service.generate(REQUESTS)
        for each in outputs:
            assert each[-1].finish == "error" and str(each[-1].error) == "rank 1 is gone"
        assert (service.state, service.failure) == ("closed", "rank 1 is gone") and service.idle
        with pytest.raises(RefusedError, match="the engine is closed"):
            next(service.stream(REQUESTS[0]))


def test_a_call_of_ranks_that_are_gone_is_no_fault_of_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object) -> None:
        raise RankError("rank 1 is gone")

    served = engine()
    served.submit(REQUESTS[0], print)
    monkeypatch.setattr(served.worker, "_prefill", gone)
    with pytest.raises(RankError, match="rank 1 is gone"):
        served.run()

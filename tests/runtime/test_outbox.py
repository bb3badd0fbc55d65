"""Outputs of quick steps travel together, but for those that somebody waits for."""

import asyncio

import pytest

from qnext.runtime.outbox import LONGEST, SECONDS, Outbox, patience
from qnext.runtime.request import Output


class Loop(asyncio.AbstractEventLoop):
    """An event loop that calls at once, and counts how often it was woken."""

    def __init__(self) -> None:
        self.woken = 0

    def call_soon_threadsafe(self, function, *args, context=None) -> None:
        self.woken += 1
        function(*args)


class Ended(asyncio.AbstractEventLoop):
    def call_soon_threadsafe(self, function, *args, context=None) -> None:
        raise RuntimeError("Event loop is closed")


def output(made: int, finish: str | None = None) -> Output:
    """The output of one more token, the `made`-th."""
    return Output(id="a", tokens=(made,), text="", prompt=5, cached=0, made=made, finish=finish)


@pytest.fixture
def sent() -> tuple[Outbox, Loop, list[int]]:
    """An outbox that has just sent the first output of a request, and what arrived."""
    outbox, loop, arrived = Outbox(), Loop(), []
    outbox.put(loop, lambda o: arrived.append(o.made), output(1))
    outbox.send(now=100.0, streams=8)
    assert arrived == [1]
    return outbox, loop, arrived


def put(sent, made: int, finish: str | None = None) -> None:
    outbox, loop, arrived = sent
    outbox.put(loop, lambda o: arrived.append(o.made), output(made, finish))


def test_outputs_of_quick_steps_go_together_and_in_order(sent):
    outbox, loop, arrived = sent
    for made in (2, 3):
        put(sent, made)
        outbox.send(now=100.0 + 7 * SECONDS * 0.9, streams=8)
    assert arrived == [1] and loop.woken == 1
    put(sent, 4)
    outbox.send(now=100.0 + 7 * SECONDS, streams=8)
    assert arrived == [1, 2, 3, 4] and loop.woken == 2


def test_a_step_that_takes_longer_is_not_held_back(sent):
    outbox, _, arrived = sent
    put(sent, 2)
    outbox.send(now=100.0 + 7 * SECONDS, streams=8)
    assert arrived == [1, 2]


def test_a_stream_alone_never_waits(sent):
    outbox, _, arrived = sent
    put(sent, 2)
    outbox.send(now=100.0, streams=1)
    assert arrived == [1, 2]


def test_no_stream_waits_for_longer_than_a_picture_takes(sent):
    outbox, _, arrived = sent
    put(sent, 2)
    outbox.send(now=100.0 + 0.9 * LONGEST, streams=1000)
    assert arrived == [1]
    outbox.send(now=100.0 + 1.001 * LONGEST, streams=1000)
    assert arrived == [1, 2]
    assert patience(0) == patience(1) == 0


def test_the_last_output_never_waits_nor_what_lies_before_it(sent):
    outbox, _, arrived = sent
    put(sent, 2)
    put(sent, 3, finish="eos")
    outbox.send(now=100.0, streams=8)
    assert arrived == [1, 2, 3]


def test_the_first_output_of_another_never_waits(sent):
    outbox, _, arrived = sent
    put(sent, 2)
    put(sent, 1)
    outbox.send(now=100.0, streams=8)
    assert arrived == [1, 2, 1]


def test_a_loop_that_has_ended_keeps_no_other_from_its_outputs():
    outbox, loop, arrived = Outbox(), Loop(), []
    outbox.put(Ended(), lambda o: arrived.append(-1), output(1))
    outbox.put(loop, lambda o: arrived.append(o.made), output(1))
    outbox.send(now=0.0, streams=2)
    outbox.send(now=9.0, streams=2)
    assert arrived == [1] and loop.woken == 1

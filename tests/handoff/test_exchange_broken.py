"""What is late, torn, refused or gone between a sender and a receiver: both go on."""

import json
import threading
import time

import pytest

from qnext.handoff.manifest import HandoffError
from qnext.handoff.transport import TransportError
from tests.handoff.sides import (
    SECONDS,
    Sides,
    claimed,
    fill,
    hand,
    kept,
    value,
    why,
)
from tests.handoff.test_layout import equal


def test_a_torn_part_ends_it_before_the_rest_comes(sides: Sides, small_parts: None) -> None:
    expected, outgoing = sides.expect(), sides.open()
    sides.sender.offered(expected.offer)
    held, writes = threading.Event(), sides.faults.writes

    def tear() -> None:
        if len(writes) == 1:
            sides.there.pool[expected.offer.begin + 10] ^= 255

    sides.faults.after_write = tear
    sides.faults.on_write = lambda: bool(len(writes) < 2 or held.wait(5)) and None
    hand(outgoing, kept())
    assert "it came torn" in why(expected) and "layers[0].recurrent" in why(expected)
    assert len(writes) == 2  # the third waits
    held.set()
    assert sides.is_clean() and sides.receiver.stats.failures == {"torn": 1}


def test_a_part_that_was_looked_at_may_be_written_over(sides: Sides, small_parts: None) -> None:
    """What was copied is the value, whatever a late writer does to the region."""
    expected, outgoing = sides.expect(), sides.open()
    sides.sender.offered(expected.offer)
    begin, first = expected.offer.begin, claimed()[1].entries[0]

    def ruin(message: str) -> str:
        if json.loads(message)["kind"] == "commit":
            until = time.monotonic() + 5
            while first.path not in expected.found and time.monotonic() < until:
                time.sleep(0.001)
            sides.there.pool[begin : begin + first.nbytes] = 0xA5
        return message

    sides.faults.on_notify = ruin
    hand(outgoing, kept())
    assert equal(value(expected), kept())


def test_another_prompt_is_refused_on_both_sides(sides: Sides) -> None:
    expected, outgoing = sides.expect(seed=6), sides.open()
    with pytest.raises(HandoffError, match="it is another value: another prompt"):
        sides.sender.offered(expected.offer)
    assert "another prompt" in why(expected)
    right = sides.expect()  # the room still waits for the right one
    sides.sender.offered(right.offer)
    hand(outgoing, kept())
    assert equal(value(right), kept()) and sides.is_clean()
    assert sides.receiver.stats.failures == {"refused": 1}


def test_a_wrong_offer_that_came_first_is_refused(sides: Sides) -> None:
    wrong = sides.expect(seed=6)
    sides.sender.offered(wrong.offer)
    outgoing = sides.open()
    assert "another prompt" in why(wrong)
    right = sides.expect()
    sides.sender.offered(right.offer)
    hand(outgoing, kept())
    assert equal(value(right), kept()) and sides.is_clean()


def test_a_frozen_decoder_does_not_keep_values_from_others(sides: Sides) -> None:
    held, count = threading.Event(), 6
    under_way = threading.Semaphore(0)

    def freeze() -> None:
        under_way.release()
        held.wait(5)

    sides.faults.on_write = freeze
    for number in range(count):
        frozen = sides.expect(str(number))
        sides.sender.offered(frozen.offer)
        hand(sides.open(str(number)), kept())
    assert all(under_way.acquire(timeout=3) for _ in range(count))
    sides.faults.on_write = lambda: None
    expected, outgoing = sides.expect("other"), sides.open("other")
    sides.sender.offered(expected.offer)
    hand(outgoing, kept())
    assert equal(expected.value.result(3), kept())
    held.set()
    assert sides.is_clean()


def test_a_prompt_that_could_not_be_read(sides: Sides) -> None:
    expected, outgoing = sides.expect(), sides.open()
    sides.sender.offered(expected.offer)
    outgoing.fail("the step that read it failed")
    assert why(expected) == "the step that read it failed"
    hand(outgoing, kept())  # is of no matter any more
    outgoing.fail("again")
    assert sides.is_clean() and sides.sender.stats.failures == {"dropped": 1}


def test_who_asks_after_it_failed_need_not_wait(sides: Sides) -> None:
    sides.open().fail("too many wait there")
    with pytest.raises(HandoffError, match="too many wait there"):
        sides.sender.offered(sides.expect().offer)
    again, outgoing = sides.expect(), sides.open()  # the room may be used again
    sides.sender.offered(again.offer)
    hand(outgoing, kept())
    assert equal(value(again), kept())


def test_a_full_pool_is_told_to_who_waits(sides: Sides) -> None:
    expected = sides.expect("late")
    sides.sender.offered(expected.offer)
    with pytest.raises(HandoffError, match="has no room for the"):
        for number in range(1000):
            sides.open(str(number))
    with pytest.raises(HandoffError, match="has no room for the"):
        sides.open("late")
    assert "has no room for the" in why(expected)


def test_a_region_is_kept_while_somebody_writes_to_it(sides: Sides) -> None:
    """An engine copies to it in a step of its own time."""
    outgoing = sides.open()
    begun, other = outgoing.portion(0, 1, True), outgoing.portion(0, 1, True)
    assert begun is not None and other is not None
    outgoing.fail("the client has left")
    assert outgoing.portion(0, 1, True) is None
    fill(begun, kept())
    assert sides.sender.regions.taken and sides.open("8").begin != outgoing.begin
    other.filled(whole=False)
    assert sides.open("9").begin == outgoing.begin
    assert not sides.faults.writes


@pytest.mark.parametrize("rate", [2.0, 0.25])
def test_a_slow_link(sides: Sides, small_parts: None, rate: float) -> None:
    """Of `rate` values a second: what comes in time is a value, what does not holds nobody up."""
    nbytes = claimed()[1].nbytes

    def wait() -> None:
        time.sleep(sum(copy.nbytes for copy in sides.faults.writes[-1]) / nbytes / rate)

    sides.faults.after_write = wait
    expected, outgoing = sides.expect(seconds=2.0), sides.open()
    sides.sender.offered(expected.offer)
    began = time.monotonic()
    hand(outgoing, kept())
    assert time.monotonic() - began < 0.3  # the engine's thread goes on
    if rate > 1:
        assert equal(value(expected), kept())
    else:
        assert why(expected) in ("it did not come within 2 s", "its value was not read in time")
    assert time.monotonic() - began < 3.0 and sides.is_clean()


def test_a_frozen_decoder_holds_nobody_up(sides: Sides) -> None:
    """Neither the engine's thread nor the clock waits until a refusal is told."""
    held = threading.Event()
    sides.faults.on_notify = lambda message: message if held.wait(5) else None
    pairs = [(sides.expect(str(n), seconds=0.3), sides.open(str(n))) for n in range(3)]
    for expected, _ in pairs:
        sides.sender.offered(expected.offer)
    began = time.monotonic()
    pairs[0][1].fail("it could not be read")
    assert time.monotonic() - began < 0.2
    assert sides.is_clean() and time.monotonic() - began < 2
    held.set()


def test_deadlines_are_kept_without_a_transport(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[str]:
        raise OSError("no such device")

    expected = sides.expect(seconds=0.3)
    monkeypatch.setattr(sides.there, "notices", broken)
    assert why(expected) == "it did not come within 0.3 s"
    monkeypatch.undo()
    again, outgoing = sides.expect("8"), sides.open("8")
    sides.sender.offered(again.offer)
    hand(outgoing, kept())
    assert equal(value(again), kept())


@pytest.mark.parametrize("lost", ["the bytes", "the commit", "a byte", "half of the commit"])
def test_what_is_lost_or_torn_is_no_value(sides: Sides, lost: str) -> None:
    expected, outgoing = sides.expect(seconds=0.4), sides.open()
    sides.sender.offered(expected.offer)
    begin, pool = expected.offer.begin, sides.there.pool

    def lose() -> None:
        if lost == "a byte":
            pool[begin + 1000] += 1
        if lost == "the bytes":
            pool[begin : begin + 5000] = 0xA5

    def cut(message: str) -> str | None:
        return {"the commit": None, "half of the commit": message[:100]}.get(lost, message)

    sides.faults.after_write, sides.faults.on_notify = lose, cut
    hand(outgoing, kept())
    reason = why(expected)
    if "commit" in lost:
        assert reason == "it did not come within 0.4 s"
    else:
        assert "it came torn: other bytes than were sent in layers[0].recurrent" in reason
    assert sides.is_clean()


def test_a_value_that_comes_too_late_reaches_nobody(sides: Sides) -> None:
    expected, outgoing = sides.expect(seconds=0.2), sides.open()
    sides.sender.offered(expected.offer)
    held = threading.Event()
    sides.faults.on_write = lambda: bool(held.wait(5)) and None
    hand(outgoing, kept())
    # whichever side's clock is first
    assert why(expected) in ("it did not come within 0.2 s", "its value was not read in time")
    again = sides.receiver.expect("8", *claimed(seed=6), SECONDS)  # has the same region
    assert again.offer.begin == expected.offer.begin
    held.set()  # what was frozen goes on, and writes there
    until = time.monotonic() + 5
    while not sides.receiver.stats.stale and time.monotonic() < until:
        time.sleep(0.01)
    assert not again.value.done()
    other = sides.sender.open("8", *claimed(seed=6))
    hand(other, kept(draft=1))
    sides.sender.offered(again.offer)
    assert equal(value(again), kept()) and sides.is_clean()


def test_an_unreachable_decoder(sides: Sides) -> None:
    expected, outgoing = sides.expect(seconds=0.3), sides.open()
    sides.sender.offered(expected.offer)

    def gone() -> None:
        raise TransportError(expected.offer.address, "it is gone")

    sides.faults.on_write = gone
    hand(outgoing, kept())
    assert "did not come" in why(expected) and sides.is_clean()
    assert sides.sender.stats.failures == {"unreachable": 1}
    assert sides.receiver.stats.failures == {"late": 1}


def test_nobody_asks_for_a_value() -> None:
    sides = Sides(hold=0.2)
    outgoing = sides.open()
    hand(outgoing, kept())
    assert sides.is_clean() and sides.sender.stats.failures == {"late": 1}
    with pytest.raises(HandoffError, match="its value was not asked for"):
        sides.sender.offered(sides.expect().offer)
    time.sleep(0.5)
    late = sides.expect(seconds=0.5)  # the room is forgotten: nothing comes
    sides.sender.offered(late.offer)
    assert why(late) == "it did not come within 0.5 s"
    sides.sender.close()
    sides.receiver.close()

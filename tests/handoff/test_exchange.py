"""A sender against a receiver: whatever comes first, is late, torn, refused or gone, both go on."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch

import qnext as qn
from qnext.functional.state import pages_of
from qnext.handoff.inproc import Hub
from qnext.handoff.layout import Layout, layout_of
from qnext.handoff.manifest import Claim, Commit, HandoffError, claim_of
from qnext.handoff.receive import Expected, Receiver
from qnext.handoff.send import Outgoing, Sender
from qnext.handoff.transport import Copy, Transport, TransportError
from qnext.runtime.kept import Kept, take
from tests.handoff.test_layout import equal
from tests.sequences import model, started, words

ROW, LENGTH, FIRST = 3, 127, 64
SECONDS = 20.0
POOL = 4 << 20


@cache
def params() -> qn.Params:
    return model(mtp_num_hidden_layers=1)


@cache
def state(draft: int = 1) -> qn.State:
    return started(params(), draft)


def kept(pages: int = 1, draft: int = 1) -> Kept:
    made = state(draft)
    return take(made, 1, made.block_table[1, :pages].tolist())


def claimed(draft: int = 1, pages: int = 1, seed: int = 5) -> tuple[Claim, Layout]:
    layout = layout_of(state(draft), pages)
    tokens = words(LENGTH, seed=seed)[1].tolist()
    return claim_of(params().config.fingerprint, "weights", tokens, layout), layout


class Faulty:
    """A transport whose next calls go as they are told."""

    def __init__(self, transport: Transport) -> None:
        self.transport, self.pool, self.address = transport, transport.pool, transport.address
        self.on_write: Callable[[], None] = lambda: None
        self.on_notify: Callable[[str], str | None] = lambda message: message
        self.after_write: Callable[[], None] = lambda: None
        self.writes: list[list[Copy]] = []

    def write(self, peer: str, copies: Sequence[Copy], seconds: float) -> None:
        self.on_write()
        self.writes.append(list(copies))
        self.transport.write(peer, copies, seconds)
        self.after_write()

    def notify(self, peer: str, message: str, seconds: float) -> None:
        told = self.on_notify(message)
        if told is not None:
            self.transport.notify(peer, told, seconds)

    def notices(self) -> list[str]:
        return self.transport.notices()

    def close(self) -> None:
        self.transport.close()


class Sides:
    """Both sides, and the faults of the one that sends."""

    def __init__(self, there: int = POOL, hold: float = SECONDS) -> None:
        hub = Hub()
        pools = [torch.full((n,), 0xA5, dtype=torch.uint8) for n in (POOL, there)]
        self.faults, self.there = Faulty(hub.transport(pools[0])), hub.transport(pools[1])
        self.sender = Sender(self.faults, hold, FIRST)
        self.receiver = Receiver(self.there, FIRST)

    def open(self, room: str = "7", **how: int) -> Outgoing:
        return self.sender.open(room, *claimed(**how))

    def expect(self, room: str = "7", seconds: float = SECONDS, **how: int) -> Expected:
        return self.receiver.expect(room, *claimed(**how), seconds)

    def is_clean(self) -> bool:
        """Nothing is held any more, on either side."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if not (self.sender.regions.taken or self.receiver.regions.taken):
                return True
            time.sleep(0.01)
        return False


@pytest.fixture
def sides() -> Iterator[Sides]:
    made = Sides()
    yield made
    made.sender.close()
    made.receiver.close()


def value(expected: Expected) -> Kept:
    return expected.value.result(SECONDS)


def why(expected: Expected) -> str:
    error = expected.value.exception(SECONDS)
    assert isinstance(error, HandoffError)
    return str(error)


ORDERS = ["offer, open, value", "open, offer, value", "open, value, offer"]


@pytest.mark.parametrize("order", ORDERS)
def test_a_value_arrives_whatever_comes_first(sides: Sides, order: str) -> None:
    expected = sides.expect()
    outgoing = None
    for step in order.split(", "):
        if step == "offer":
            sides.sender.offered(expected.offer)
        elif step == "open":
            outgoing = sides.open()
        else:
            assert outgoing is not None
            outgoing.rest(kept(), 0)
    assert equal(value(expected), kept()) and sides.is_clean()
    assert (sides.sender.stats.values, sides.receiver.stats.values) == (1, 1)
    assert sides.receiver.stats.nbytes == kept().nbytes
    assert sides.sender.stats.nbytes >= kept().nbytes
    assert not sides.sender.stats.failures and not sides.receiver.stats.failures


def test_pages_go_ahead_of_the_rest(sides: Sides) -> None:
    how = {"pages": 3}
    expected, outgoing = sides.expect(**how), sides.open(**how)
    sides.sender.offered(expected.offer)
    made = state()
    for first in (0, 1):
        page = made.block_table[1, first : first + 1].tolist()
        outgoing.pages(take(made, 1, page), first)
        until = time.monotonic() + 5
        while len(sides.faults.writes) <= first and time.monotonic() < until:
            time.sleep(0.001)
    assert len(sides.faults.writes) == 2 and not expected.value.done()
    outgoing.rest(take(made, 1, made.block_table[1, 2:3].tolist()), 2)
    assert equal(value(expected), kept(3)) and sides.is_clean()
    paged = [entry for entry in claimed(**how)[1].entries if entry.is_paged]
    assert [len(copies) for copies in sides.faults.writes[:2]] == [len(paged)] * 2


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qnext.handoff.send.PART", 5000)


@pytest.mark.parametrize("order", ORDERS)
def test_parts_are_told_as_they_are_there(sides: Sides, order: str, small_parts: None) -> None:
    told = list[str]()
    sides.faults.on_notify = lambda message: told.append(message) or message
    test_a_value_arrives_whatever_comes_first(sides, order)
    parts = [json.loads(message) for message in told]
    assert [part["kind"] for part in parts] == ["part"] * (len(parts) - 1) + ["commit"]
    assert len(parts) > 3
    paths = [path for part in parts[:-1] for path in part["checksums"]]
    assert len(paths) == len({*paths}) and {*paths} < parts[-1]["checksums"].keys()


def test_a_torn_part_ends_it_before_the_rest_comes(sides: Sides, small_parts: None) -> None:
    expected, outgoing = sides.expect(), sides.open()
    sides.sender.offered(expected.offer)
    held, writes = threading.Event(), sides.faults.writes

    def tear() -> None:
        if len(writes) == 1:
            sides.there.pool[expected.offer.begin + 10] ^= 255

    sides.faults.after_write = tear
    sides.faults.on_write = lambda: bool(len(writes) < 2 or held.wait(5)) and None
    outgoing.rest(kept(), 0)
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
    outgoing.rest(kept(), 0)
    assert equal(value(expected), kept())


def test_a_room_has_one_offer(sides: Sides) -> None:
    first, second, outgoing = sides.expect(), sides.expect(), sides.open()
    sides.sender.offered(first.offer)
    with pytest.raises(HandoffError, match="room 7 has an offer already"):
        sides.sender.offered(second.offer)
    outgoing.rest(kept(), 0)
    assert equal(value(first), kept()) and why(second) == "room 7 has an offer already"


@pytest.mark.parametrize(("here", "there"), [(0, 1), (1, 0), (3, 1)])
def test_sides_that_guess_otherwise(sides: Sides, here: int, there: int) -> None:
    expected, outgoing = sides.expect(draft=there), sides.open(draft=here)
    sides.sender.offered(expected.offer)
    outgoing.rest(kept(draft=here), 0)
    got, both = value(expected), bool(here and there)
    assert got.layers and bool(got.mtp) == both
    assert equal(got, kept(draft=here) if both else kept(draft=here)._replace(mtp=()))


def test_another_prompt_is_refused_on_both_sides(sides: Sides) -> None:
    expected, outgoing = sides.expect(seed=6), sides.open()
    with pytest.raises(HandoffError, match="it is another value: another prompt"):
        sides.sender.offered(expected.offer)
    assert "another prompt" in why(expected)
    right = sides.expect()  # the room still waits for the right one
    sides.sender.offered(right.offer)
    outgoing.rest(kept(), 0)
    assert equal(value(right), kept()) and sides.is_clean()
    assert sides.receiver.stats.failures == {"refused": 1}


def test_a_wrong_offer_that_came_first_is_refused(sides: Sides) -> None:
    wrong = sides.expect(seed=6)
    sides.sender.offered(wrong.offer)
    outgoing = sides.open()
    assert "another prompt" in why(wrong)
    right = sides.expect()
    sides.sender.offered(right.offer)
    outgoing.rest(kept(), 0)
    assert equal(value(right), kept()) and sides.is_clean()


def test_a_frozen_decoder_does_not_keep_values_from_others(sides: Sides) -> None:
    held = threading.Event()
    sides.faults.on_write = lambda: bool(held.wait(5)) and None
    for number in range(6):
        frozen = sides.expect(str(number))
        sides.sender.offered(frozen.offer)
        sides.open(str(number)).rest(kept(), 0)
    until = time.monotonic() + 1
    while time.monotonic() < until:  # all of them are being sent
        time.sleep(0.05)
    sides.faults.on_write = lambda: None
    expected, outgoing = sides.expect("other"), sides.open("other")
    sides.sender.offered(expected.offer)
    outgoing.rest(kept(), 0)
    assert equal(expected.value.result(3), kept())
    held.set()
    assert sides.is_clean()


def test_a_prompt_that_could_not_be_read(sides: Sides) -> None:
    expected, outgoing = sides.expect(), sides.open()
    sides.sender.offered(expected.offer)
    outgoing.fail("the step that read it failed")
    assert why(expected) == "the step that read it failed"
    outgoing.rest(kept(), 0)  # is of no matter any more
    outgoing.fail("again")
    assert sides.is_clean() and sides.sender.stats.failures == {"dropped": 1}


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
    outgoing.rest(kept(), 0)
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
    outgoing.rest(kept(), 0)
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
    outgoing.rest(kept(), 0)
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
    other.rest(kept(draft=1), 0)
    sides.sender.offered(again.offer)
    assert equal(value(again), kept()) and sides.is_clean()


def test_an_unreachable_decoder(sides: Sides) -> None:
    expected, outgoing = sides.expect(seconds=0.3), sides.open()
    sides.sender.offered(expected.offer)

    def gone() -> None:
        raise TransportError(expected.offer.address, "it is gone")

    sides.faults.on_write = gone
    outgoing.rest(kept(), 0)
    assert "did not come" in why(expected) and sides.is_clean()
    assert sides.sender.stats.failures == {"unreachable": 1}
    assert sides.receiver.stats.failures == {"late": 1}


def test_nobody_asks_for_a_value() -> None:
    sides = Sides(hold=0.2)
    outgoing = sides.open()
    outgoing.rest(kept(), 0)
    assert sides.is_clean() and sides.sender.stats.failures == {"late": 1}
    late = sides.expect(seconds=0.5)  # the room is forgotten: nothing comes
    sides.sender.offered(late.offer)
    assert why(late) == "it did not come within 0.5 s"
    sides.sender.close()
    sides.receiver.close()


def test_full_pools_say_so() -> None:
    nbytes = claimed()[1].nbytes
    sides = Sides(there=FIRST + nbytes + 100)
    first = sides.expect()
    with pytest.raises(HandoffError, match=r"the hand-off pool has .* a value of 127 tokens"):
        sides.expect("8")
    outgoing = sides.open()
    rooms = [
        sides.open(str(number)) for number in range(8, 8 + (POOL - FIRST) // (nbytes + 64) - 1)
    ]
    with pytest.raises(HandoffError, match="has no room for the"):
        for number in range(1000, 1010):
            rooms.append(sides.open(str(number)))
    sides.sender.offered(first.offer)
    outgoing.rest(kept(), 0)
    assert equal(value(first), kept())
    sides.expect("8")  # there is room again
    sides.sender.close()
    sides.receiver.close()
    assert sides.is_clean()


def test_a_room_is_taken_once(sides: Sides) -> None:
    sides.open()
    with pytest.raises(HandoffError, match="room 7 is taken already"):
        sides.open()
    assert sides.sender.regions.taken == claimed()[1].nbytes


def test_both_sides_end_with_values_under_way(sides: Sides) -> None:
    cancelled, waiting = sides.expect("1"), sides.expect("2")
    sides.receiver.cancel(cancelled)
    sides.open("1"), sides.open("2")
    sides.sender.offered(waiting.offer)
    sides.sender.close()
    assert why(cancelled) == "it was cancelled"
    assert why(waiting) == "the side that prefills ends"
    last = sides.expect("3")
    sides.receiver.close()
    assert why(last) == "the decoder ends" and sides.is_clean()


def test_many_at_once(sides: Sides) -> None:
    """Offers and values in any order, from many threads; some are given up."""

    def hand(number: int) -> bool:
        room = str(number)
        expected = sides.expect(room)
        sender: list[Callable[[], Any]] = [
            lambda: sides.sender.offered(expected.offer),
            lambda: sides.open(room).rest(kept(), 0),
        ]
        for step in sender[:: 1 if number % 2 else -1]:
            step()
        if number % 5 == 0:
            sides.receiver.cancel(expected)
        try:
            return equal(value(expected), kept())
        except HandoffError as error:
            return number % 5 == 0 and str(error) == "it was cancelled"

    with ThreadPoolExecutor(6) as many:
        assert all(many.map(hand, range(60)))
    assert sides.is_clean()
    assert sides.receiver.stats.values + sides.receiver.stats.failures["cancelled"] == 60


def test_what_a_commit_holds(sides: Sides) -> None:
    told = list[str]()
    sides.faults.on_notify = lambda message: told.append(message) or message
    expected, outgoing = sides.expect(), sides.open()
    outgoing.rest(kept(), 0)
    sides.sender.offered(expected.offer)
    value(expected)
    commit = Commit.model_validate_json(told[-1])
    assert commit.claim == claimed()[0] and commit.attempt == expected.offer.attempt
    assert list(commit.checksums) == [entry.path for entry in claimed()[1].entries]
    assert commit.claim.position == LENGTH and pages_of(LENGTH) == 1

"""A sender against a receiver: in any order, in parts, many at once, on sides that differ."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qnext.functional.state import pages_of
from qnext.handoff.manifest import Commit, HandoffError
from qnext.runtime.kept import take
from tests.handoff.sides import (
    FIRST,
    LENGTH,
    POOL,
    Sides,
    claimed,
    hand,
    kept,
    state,
    value,
    why,
)
from tests.handoff.test_layout import equal

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
            hand(outgoing, kept())
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
        hand(outgoing, take(made, 1, page), first, ends=False)
        until = time.monotonic() + 5
        while len(sides.faults.writes) <= first and time.monotonic() < until:
            time.sleep(0.001)
    assert len(sides.faults.writes) == 2 and not expected.value.done()
    hand(outgoing, take(made, 1, made.block_table[1, 2:3].tolist()), 2)
    assert equal(value(expected), kept(3)) and sides.is_clean()
    paged = [entry for entry in claimed(**how)[1].entries if entry.is_paged]
    assert [len(copies) for copies in sides.faults.writes[:2]] == [len(paged)] * 2


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


def test_a_room_has_one_offer(sides: Sides) -> None:
    first, second, outgoing = sides.expect(), sides.expect(), sides.open()
    sides.sender.offered(first.offer)
    with pytest.raises(HandoffError, match="room 7 has an offer already"):
        sides.sender.offered(second.offer)
    hand(outgoing, kept())
    assert equal(value(first), kept()) and why(second) == "room 7 has an offer already"


@pytest.mark.parametrize(("here", "there"), [(0, 1), (1, 0), (3, 1)])
def test_sides_that_guess_otherwise(sides: Sides, here: int, there: int) -> None:
    expected, outgoing = sides.expect(draft=there), sides.open(draft=here)
    sides.sender.offered(expected.offer)
    hand(outgoing, kept(draft=here))
    got, both = value(expected), bool(here and there)
    assert got.layers and bool(got.mtp) == both
    assert equal(got, kept(draft=here) if both else kept(draft=here)._replace(mtp=()))


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
    hand(outgoing, kept())
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

    def exchanged(number: int) -> bool:
        room = str(number)
        expected = sides.expect(room)
        sender: list[Callable[[], Any]] = [
            lambda: sides.sender.offered(expected.offer),
            lambda: hand(sides.open(room), kept()),
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
        assert all(many.map(exchanged, range(60)))
    assert sides.is_clean()
    assert sides.receiver.stats.values + sides.receiver.stats.failures["cancelled"] == 60


def test_what_a_commit_holds(sides: Sides) -> None:
    told = list[str]()
    sides.faults.on_notify = lambda message: told.append(message) or message
    expected, outgoing = sides.expect(), sides.open()
    hand(outgoing, kept())
    sides.sender.offered(expected.offer)
    value(expected)
    commit = Commit.model_validate_json(told[-1])
    assert commit.claim == claimed()[0] and commit.attempt == expected.offer.attempt
    assert list(commit.checksums) == [entry.path for entry in claimed()[1].entries]
    assert commit.claim.position == LENGTH and pages_of(LENGTH) == 1

"""The side that prefills: values on their way out, each from when its prompt begins to be read.

A value's pages go ahead as they are complete, if the decoder's offer is there by then; what a
recurrent layer or a window holds goes at the end, and then the commit. Values that nobody has asked
for are kept for `hold` seconds.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any, NamedTuple

from torch import Tensor

from qnext.handoff.layout import Entry, Layout, checksums, places, together
from qnext.handoff.manifest import (
    Claim,
    Commit,
    HandoffError,
    Offer,
    Part,
    Refusal,
    refuse,
    shared,
)
from qnext.handoff.regions import Regions
from qnext.handoff.transport import Copy, Transport, TransportError
from qnext.runtime.kept import Kept

log = logging.getLogger("qnext")
SENDERS = 32  # values that are sent at once; those to frozen decoders wait there, too
PATIENCE = 5.0  # seconds for a refusal to be told
PART = 48 << 20  # bytes of tensors that are sent, and looked at, together
TICK = 0.1  # seconds between looks at the clock


@dataclass
class Sent:
    """What became of values so far."""

    values: int = 0
    nbytes: int = 0
    seconds: float = 0.0  # of writing, all together
    failures: Counter[str] = field(default_factory=Counter)  # unreachable, late, dropped


class Sender:
    """Takes values from an engine and offers from decoders, in any order; for several threads.

    first: where regions may begin in the transport's pool.
    """

    def __init__(self, transport: Transport, hold: float, first: int = 0) -> None:
        self.transport, self.hold, self.stats = transport, hold, Sent()
        self.regions = Regions(transport.pool.numel(), first)
        self._rooms: dict[str, Outgoing] = {}
        # of rooms that are not open: with the time until which they matter
        self._offers: dict[str, tuple[Offer, float]] = {}
        self._given_up: dict[str, tuple[str, float]] = {}  # and why no value comes
        self._pool = ThreadPoolExecutor(SENDERS, "qnext-sender")
        self._reckoner = ThreadPoolExecutor(1, "qnext-reckoner")
        self._news, self._closed = Condition(), False
        self._thread = Thread(target=self._watch, name="qnext-sender-clock", daemon=True)
        self._thread.start()

    def open(self, room: str, claim: Claim, layout: Layout) -> "Outgoing":
        """A value that will come. Raises HandoffError where the room is taken or the pool full."""
        begin = self.regions.take(layout.nbytes)
        if begin is None:
            why = (
                f"the hand-off pool of {self.transport.pool.numel()} bytes has no room for the "
                f"{layout.nbytes} of {claim.position} tokens: other values are on their way"
            )
            self._give_up(room, why)
            raise HandoffError(why)
        outgoing = Outgoing(self, room, claim, layout, begin)
        with self._news:
            taken = room in self._rooms or self._closed
            if not taken:
                self._rooms[room] = outgoing
                self._given_up.pop(room, None)
                outgoing.until = time.monotonic() + self.hold
                offer, _ = self._offers.pop(room, (None, 0.0))
            self._news.notify()
        if taken:
            self.regions.give_back(begin)
            raise HandoffError(f"room {room} is taken already, or this side ends")
        if offer is not None:
            with suppress(HandoffError):  # its decoder is told; the room waits for the right one
                self.offered(offer)
        return outgoing

    def offered(self, offer: Offer) -> None:
        """A decoder wants a value. Raises HandoffError where it is another than the room's."""
        with self._news:
            outgoing = self._rooms.get(offer.room)
            if outgoing is None and offer.room in self._given_up:
                raise HandoffError(self._given_up[offer.room][0])
            if outgoing is None:
                until = time.monotonic() + min(offer.seconds, self.hold)
                self._offers[offer.room] = offer, until
                self._news.notify()
                return
        try:
            refuse(offer.claim, outgoing.claim)
            with outgoing.lock:
                if outgoing.offer is not None:
                    raise HandoffError(f"room {offer.room} has an offer already")
                outgoing.offer = offer
        except HandoffError as error:
            self._refuse(offer, str(error))
            raise
        outgoing.until = time.monotonic() + offer.seconds
        self.advance(outgoing)

    def advance(self, outgoing: "Outgoing") -> None:
        """Have sent what there is to send."""
        if not self._closed:
            self._pool.submit(self._send, outgoing)

    def reckon(self, entries: Sequence[Entry], region: Tensor) -> "Future[dict[str, int]]":
        """The checksums of tensors in a region, by another thread."""
        return self._reckoner.submit(checksums, entries, region)

    def drop(self, outgoing: "Outgoing", failure: str, why: str) -> None:
        """A value that does not go out; the decoder is told."""
        if not self._end(outgoing):
            return
        self.stats.failures[failure] += 1
        log.warning("room %s is not handed off: %s", outgoing.room, why)
        self._give_up(outgoing.room, why)
        if outgoing.offer is not None and failure != "unreachable":
            self._refuse(outgoing.offer, why)

    def close(self) -> None:
        """Drop all values, and wait for what is being sent."""
        with self._news:
            self._closed = True
            waiting = list(self._rooms.values())
            self._news.notify()
        for outgoing in waiting:
            self.drop(outgoing, "dropped", "the side that prefills ends")
        self._thread.join()
        self._pool.shutdown()
        self._reckoner.shutdown()

    def _end(self, outgoing: "Outgoing") -> bool:
        """Whether it was open until now."""
        with self._news:
            if self._rooms.get(outgoing.room) is not outgoing:
                return False
            del self._rooms[outgoing.room]
        with outgoing.lock:
            outgoing.is_open = False
        outgoing.give_back()
        return True

    def _give_up(self, room: str, why: str) -> None:
        """Whoever offers a region for this room, or has, need not wait for it."""
        with self._news:
            self._given_up[room] = why, time.monotonic() + self.hold
            offer, _ = self._offers.pop(room, (None, 0.0))
            self._news.notify()
        if offer is not None:
            self._refuse(offer, why)

    def _refuse(self, offer: Offer, why: str) -> None:
        """Tell a decoder, in another thread: a frozen one must hold nobody up."""
        refusal = Refusal(room=offer.room, attempt=offer.attempt, why=why)

        def tell() -> None:
            try:
                self.transport.notify(offer.address, refusal.model_dump_json(), PATIENCE)
            except TransportError as error:
                log.info("a refusal was not told: %s", error)

        with suppress(RuntimeError):  # this side ends, and its connections with it
            self._pool.submit(tell)

    def _send(self, outgoing: "Outgoing") -> None:
        try:
            done = outgoing.send()
        except TransportError as error:
            self.drop(outgoing, "unreachable", str(error))
        except Exception as error:
            log.exception("a value could not be sent")
            self.drop(outgoing, "dropped", f"it could not be sent: {error}")
        else:
            if done and self._end(outgoing):
                self.stats.values += 1

    def _watch(self) -> None:
        while True:
            with self._news:
                while not (self._rooms or self._offers or self._given_up or self._closed):
                    self._news.wait()
                if self._closed:
                    return
                now = time.monotonic()
                late = [outgoing for outgoing in self._rooms.values() if now > outgoing.until]
                for named in (self._offers, self._given_up):
                    for room in [room for room, (_, until) in named.items() if now > until]:
                        del named[room]
            for outgoing in late:
                wanted = "was not read in time" if outgoing.offer else "was not asked for"
                self.drop(outgoing, "late", f"its value {wanted}")
            time.sleep(TICK)


class Parcel(NamedTuple):
    """What is sent together: tensors and, of each, a (begin, bytes) of the region.

    is_whole: nothing of these tensors is missing any more.
    """

    parts: list[tuple[Entry, tuple[int, int]]]
    is_whole: bool
    is_last: bool = False


class Outgoing:
    """A value on its way out; who fills its portions waits for nothing.

    Its region is nobody else's before all portions are filled that somebody began.
    """

    def __init__(self, sender: Sender, room: str, claim: Claim, layout: Layout, begin: int) -> None:
        self.room, self.claim, self.begin = room, claim, begin
        self.offer: Offer | None = None
        self.until = 0.0  # on time.monotonic()
        self.is_open, self.filling, self.lock = True, 0, Lock()  # filling: portions under way
        self._is_given_back = False
        self._sender, self._layout = sender, layout
        self._ready: deque[Parcel] = deque()
        self._sums: dict[str, int] = {}  # checksums of what was sent
        self._sending = Lock()

    def portion(self, first: int, count: int, ends: bool) -> "_Portion | None":
        """Room for so many pages from the `first` on, and where that `ends` it for all the rest."""
        with self.lock:
            if not self.is_open:
                return None
            self.filling += 1
        into = places(self._layout, self._region, first, count)
        groups = _parted(self._layout.entries) if ends else [self._paged]
        parcels = [
            Parcel([(entry, entry.part(first, count)) for entry in group], is_whole=ends)
            for group in groups
        ]
        if ends:
            parcels[-1] = parcels[-1]._replace(is_last=True)
        return _Portion(self, into, parcels)

    def fail(self, why: str) -> None:
        """The value will not come: its prompt could not be read."""
        self._sender.drop(self, "dropped", why)

    def filled(self, parcels: Sequence[Parcel]) -> None:
        """Nobody writes to a portion any more; these parcels of it are there."""
        with self.lock:
            self.filling -= 1
            self._ready += parcels
        self.give_back()
        if self.offer is not None and parcels:
            self._sender.advance(self)

    def give_back(self) -> None:
        """Free the region, once, if it has ended and nobody writes to it any more."""
        with self.lock:
            if self.is_open or self.filling or self._is_given_back:
                return
            self._is_given_back = True
        self._sender.regions.give_back(self.begin)

    @property
    def _paged(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self._layout.entries if entry.is_paged)

    @property
    def _region(self) -> Tensor:
        pool = self._sender.transport.pool
        return pool[self.begin : self.begin + self._layout.nbytes]

    def send(self) -> bool:
        """Write what is ready; whether that was all. Raises TransportError."""
        with self._sending:  # one after the other: the commit is the last
            while True:
                with self.lock:
                    offer = self.offer
                    if offer is None or not self.is_open or not self._ready:
                        return False
                    parcel = self._ready.popleft()
                self._send(parcel, offer)
                if parcel.is_last:
                    return True

    def _send(self, parcel: Parcel, offer: Offer) -> None:
        """Write a parcel, and tell the decoder which tensors are there with it."""
        transport, began = self._sender.transport, time.monotonic()
        wanted = shared(self.claim, offer.claim)
        parts = [part for part in parcel.parts if part[0].path in wanted]
        whole = [entry for entry, _ in parts] if parcel.is_whole else []
        # reckoned while they are on their way
        sums = self._sender.reckon(whole, self._region)
        ranges = together([place for _, place in parts if place[1]])
        copies = [Copy(self.begin + at, offer.begin + at, nbytes) for at, nbytes in ranges]
        if copies:
            transport.write(offer.address, copies, self._left())
            self._sender.stats.nbytes += sum(copy.nbytes for copy in copies)
            self._sender.stats.seconds += time.monotonic() - began
        self._sums |= sums.result()
        told: dict[str, Any] = {"room": self.room, "attempt": offer.attempt}
        if parcel.is_last:
            message = Commit(**told, claim=self.claim, checksums=self._sums).model_dump_json()
        elif whole:
            message = Part(**told, checksums=sums.result()).model_dump_json()
        else:
            return
        transport.notify(offer.address, message, self._left())

    def _left(self) -> float:
        return max(self.until - time.monotonic(), 0.001)


class _Portion:
    """A part of a value, to be copied `into` the region."""

    def __init__(self, outgoing: Outgoing, into: Kept, parcels: list[Parcel]) -> None:
        self.into, self._outgoing, self._parcels = into, outgoing, parcels

    def filled(self, whole: bool) -> None:
        self._outgoing.filled(self._parcels if whole else [])


def _parted(entries: Sequence[Entry]) -> list[tuple[Entry, ...]]:
    """Tensors in groups of some `PART` bytes, so that who gets them need not wait for the last."""
    groups, group, nbytes = list[tuple[Entry, ...]](), list[Entry](), 0
    for entry in entries:
        group.append(entry)
        nbytes += entry.nbytes
        if nbytes >= PART:
            groups.append(tuple(group))
            group, nbytes = [], 0
    return [*groups, tuple(group)] if group or not groups else groups

"""The side that prefills: values on their way out, each from when its prompt begins to be read.

A value's pages go ahead as they are complete, if the decoder's offer is there by then; what a
recurrent layer or a window holds goes at the end, and then the commit. Values that nobody has asked
for are kept for `hold` seconds.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Lock, Thread
from typing import Any, NamedTuple

from torch import Tensor

from qnext.handoff.layout import Entry, Layout, checksums, pack, together
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
        self._offers: dict[str, tuple[Offer, float]] = {}  # for rooms that are not open yet
        self._pool = ThreadPoolExecutor(SENDERS, "qnext-sender")
        self._reckoner = ThreadPoolExecutor(1, "qnext-reckoner")
        self._news, self._closed = Condition(), False
        self._thread = Thread(target=self._watch, name="qnext-sender-clock", daemon=True)
        self._thread.start()

    def open(self, room: str, claim: Claim, layout: Layout) -> "Outgoing":
        """A value that will come. Raises HandoffError where the room is taken or the pool full."""
        begin = self.regions.take(layout.nbytes)
        if begin is None:
            raise HandoffError(
                f"the hand-off pool of {self.transport.pool.numel()} bytes has no room for the "
                f"{layout.nbytes} of {claim.position} tokens: other values are on their way"
            )
        outgoing = Outgoing(self, room, claim, layout, begin)
        with self._news:
            taken = room in self._rooms or self._closed
            if not taken:
                self._rooms[room] = outgoing
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
        with outgoing.lock:  # nobody writes to the region any more
            outgoing.is_open = False
        self.regions.give_back(outgoing.begin)
        return True

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
                while not (self._rooms or self._offers or self._closed):
                    self._news.wait()
                if self._closed:
                    return
                now = time.monotonic()
                late = [outgoing for outgoing in self._rooms.values() if now > outgoing.until]
                for room in [r for r, (_, until) in self._offers.items() if now > until]:
                    del self._offers[room]
            for outgoing in late:
                wanted = "was not read in time" if outgoing.offer else "was not asked for"
                self.drop(outgoing, "late", f"its value {wanted}")
            time.sleep(TICK)


class Parcel(NamedTuple):
    """What is sent together: ranges of the region, and the tensors that are whole with them."""

    ranges: list[tuple[int, int]]
    whole: tuple[Entry, ...] = ()
    is_last: bool = False


class Outgoing:
    """A value on its way out; the engine's thread gives it its parts and waits for nothing."""

    def __init__(self, sender: Sender, room: str, claim: Claim, layout: Layout, begin: int) -> None:
        self.room, self.claim, self.begin = room, claim, begin
        self.offer: Offer | None = None
        self.until = 0.0  # on time.monotonic()
        self.is_open, self.lock = True, Lock()
        self._sender, self._layout = sender, layout
        self._ready: deque[Parcel] = deque()
        self._sums: dict[str, int] = {}  # checksums of what was sent
        self._sending = Lock()

    def pages(self, kept: Kept, first: int) -> None:
        """Some pages, from the `first` on; its states are of no matter yet."""
        paged = [entry for entry in self._layout.entries if entry.is_paged]
        self._add(kept, first, paged, Parcel)

    def rest(self, kept: Kept, first: int) -> None:
        """What is left: pages from the `first` on, states, windows."""
        groups = _parted(self._layout.entries)
        for number, group in enumerate(groups, start=1):
            last = number == len(groups)
            self._add(kept, first, group, partial(Parcel, whole=group, is_last=last))

    def fail(self, why: str) -> None:
        """The value will not come: its prompt could not be read."""
        self._sender.drop(self, "dropped", why)

    def _add(
        self, kept: Kept, first: int, group: Sequence[Entry], parcel: Callable[..., Parcel]
    ) -> None:
        with self.lock:
            if not self.is_open:
                return
            paths = {entry.path for entry in group}
            self._ready.append(parcel(pack(kept, self._layout, self._region, first, paths)))
        if self.offer is not None:
            self._sender.advance(self)

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
        whole = [entry for entry in parcel.whole if entry.path in wanted]
        # reckoned while they are on their way
        sums = self._sender.reckon(whole, self._region)
        places = [(e.begin, e.end) for e in self._layout.entries if e.path in wanted]
        ranges = [r for r in parcel.ranges if any(low <= r[0] < high for low, high in places)]
        copies = [Copy(self.begin + at, offer.begin + at, n) for at, n in together(ranges)]
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

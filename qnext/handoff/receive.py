"""The decoder's side: regions in which values are expected, and what becomes of them."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition, Thread
from uuid import uuid4

from pydantic import ValidationError
from torch import Tensor

from qnext.handoff.layout import Entry, Layout, copy_summed, places
from qnext.handoff.manifest import (
    ANSWER,
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
from qnext.handoff.spares import Spares
from qnext.handoff.transport import Transport
from qnext.runtime.kept import Kept

log = logging.getLogger("qnext")
COPIERS = 2  # threads that copy and check a value's tensors
PAUSE = 0.1  # seconds after a transport failed
POLL = 0.001  # seconds between looks at the transport, while something is expected


@dataclass(eq=False)
class Expected:
    """A value that is waited for. `value` is done with it, or with a HandoffError, by `until`."""

    offer: Offer
    layout: Layout
    until: float  # on time.monotonic()
    began: float
    copy: Tensor  # of what has come: what others write to the region later does not reach it
    found: dict[str, int] = field(default_factory=dict)  # checksums of the copy
    value: "Future[Kept]" = field(default_factory=Future)


@dataclass
class Received:
    """What became of values so far; `stale` are answers to attempts that were given up.

    Failures are refused, torn, late, cancelled, or what `cancel` was told.
    """

    values: int = 0
    nbytes: int = 0
    seconds: float = 0.0  # from the offers to the values, all together
    stale: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class Receiver:
    """Makes offers, and values of what comes; for several threads.

    first: where regions may begin in the transport's pool.
    """

    def __init__(self, transport: Transport, first: int = 0) -> None:
        self.transport, self.stats = transport, Received()
        self._spares = Spares(transport.pool.numel())
        self._copiers = ThreadPoolExecutor(COPIERS, "qnext-copier")
        self.regions = Regions(transport.pool.numel(), first)
        self._expected: dict[str, Expected] = {}
        self._news, self._closed = Condition(), False
        self._thread = Thread(target=self._listen, name="qnext-receiver", daemon=True)
        self._thread.start()

    def expect(self, room: str, claim: Claim, layout: Layout, seconds: float) -> Expected:
        """Hold a region for a value. Raises HandoffError where the pool has none."""
        begin = self.regions.take(layout.nbytes)
        if begin is None:
            free = self.transport.pool.numel() - self.regions.taken
            raise HandoffError(
                f"the hand-off pool has {free} bytes left in pieces, a value of "
                f"{claim.position} tokens needs {layout.nbytes}: other values are on their way"
            )
        now = time.monotonic()
        offer = Offer(
            room=room,
            attempt=uuid4().hex,
            address=self.transport.address,
            begin=begin,
            claim=claim,
            seconds=seconds,
        )
        copy = self._spares.take(layout.nbytes, self.transport.pool.device)
        expected = Expected(offer, layout, now + seconds, now, copy)
        with self._news:
            self._expected[offer.attempt] = expected
            self._news.notify()
        return expected

    def cancel(
        self, expected: Expected, why: str = "it was cancelled", failure: str = "cancelled"
    ) -> None:
        """Wait no longer; what still comes is of no matter. failure: what it counts as."""
        self._end(expected, failure, HandoffError(why))

    def close(self) -> None:
        """End all that is expected, and the thread."""
        with self._news:
            self._closed = True
            waiting = list(self._expected.values())
            self._news.notify()
        for expected in waiting:
            self.cancel(expected, "the decoder ends")
        self._thread.join()
        self._copiers.shutdown()

    # ---- the thread

    def _listen(self) -> None:
        while True:
            with self._news:
                while not (self._expected or self._closed):
                    self._news.wait()
                if self._closed:
                    return
                waiting = list(self._expected.values())
            for notice in self._notices():
                self._answered(notice)
            now = time.monotonic()
            for expected in waiting:
                if now > expected.until:
                    why = f"it did not come within {expected.offer.seconds:g} s"
                    self._end(expected, "late", HandoffError(why))
            time.sleep(POLL)

    def _notices(self) -> list[str]:
        try:
            return self.transport.notices()
        except Exception:  # whatever it is, deadlines must be kept
            log.exception("the transport has no notices")
            time.sleep(PAUSE)
            return []

    def _answered(self, notice: str) -> None:
        try:
            answer = ANSWER.validate_json(notice)
        except ValidationError as error:
            log.warning("a notice is no answer to an offer: %s", error.errors()[0]["msg"])
            return
        with self._news:
            expected = self._expected.get(answer.attempt)
        if expected is None:
            self.stats.stale += 1
            return
        if isinstance(answer, Refusal):
            self._end(expected, "refused", HandoffError(answer.why))
            return
        try:
            if isinstance(answer, Part):
                self._look_at(expected, answer.checksums)
                return
            kept = self._checked(expected, answer)
        except HandoffError as error:
            self._end(expected, "torn", error)
        except Exception as error:  # whatever it is, others are waiting
            log.exception("a value could not be read")
            self._end(expected, "torn", HandoffError(f"it cannot be read: {error}"))
        else:
            self._end(expected, "", kept)

    def _checked(self, expected: Expected, commit: Commit) -> Kept:
        """The value of a region, which must be the one that was asked for, to the bit."""
        claim = expected.offer.claim
        refuse(claim, commit.claim)
        layout = expected.layout.only(shared(claim, commit.claim))
        self._look_at(expected, commit.checksums)
        if commit.checksums.keys() != {entry.path for entry in layout.entries}:
            raise HandoffError("its commit is of other tensors")
        return places(layout, expected.copy)

    def _look_at(self, expected: Expected, checksums: Mapping[str, int]) -> None:
        """Copy the tensors of these checksums, unless they were copied; HandoffError for torn ones.

        The copy is what is looked at.
        """
        begin = expected.offer.begin
        pool = self.transport.pool[begin : begin + expected.layout.nbytes]

        def copied(entry: Entry) -> int:
            bytes_of = slice(entry.begin, entry.end)
            return copy_summed(expected.copy[bytes_of], pool[bytes_of])

        news = checksums.keys() - expected.found.keys()
        entries = [entry for entry in expected.layout.entries if entry.path in news]
        sums = self._copiers.map(copied, entries)
        expected.found |= zip((entry.path for entry in entries), sums, strict=True)
        torn = [p for p, each in checksums.items() if expected.found.get(p) != each]
        if torn:
            raise HandoffError(f"it came torn: other bytes than were sent in {', '.join(torn)}")

    def _end(self, expected: Expected, failure: str, result: Kept | HandoffError) -> None:
        with self._news:
            if self._expected.pop(expected.offer.attempt, None) is None:
                return
        self.regions.give_back(expected.offer.begin)
        if isinstance(result, HandoffError):
            self.stats.failures[failure] += 1
        else:
            self.stats.values += 1
            self.stats.nbytes += result.nbytes
            self.stats.seconds += time.monotonic() - expected.began
        try:
            if isinstance(result, HandoffError):
                expected.value.set_exception(result)
            else:
                expected.value.set_result(result)
        except InvalidStateError:  # who waited has cancelled the future
            return

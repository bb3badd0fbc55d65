"""Outputs on their way from the engine's thread to event loops."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from qnext.runtime.request import Output

log = logging.getLogger("qnext")
Deliver = Callable[[Output], None]

# An event loop is busy for a while with each output, and steps on a processor lack that time: of
# many streams, the outputs of a few quick steps go together. A stream alone never waits, and none
# for as long as a film shows one picture.
SECONDS = 0.002  # for each of the other streams
LONGEST = 1 / 30


def patience(streams: int) -> float:
    """Seconds for which outputs may wait for others to go with."""
    return min(max(streams - 1, 0) * SECONDS, LONGEST)


class Outbox:
    """What steps have for event loops; each loop is woken once for all of it.

    The first and the last output of a request never wait.
    """

    def __init__(self) -> None:
        self._loops: dict[asyncio.AbstractEventLoop, list[tuple[Deliver, Output]]] = {}
        self._urgent = False
        self._last = 0.0

    def put(self, loop: asyncio.AbstractEventLoop, deliver: Deliver, output: Output) -> None:
        """Have `deliver` called with an output, by the loop."""
        self._loops.setdefault(loop, []).append((deliver, output))
        begins = output.made == len(output.tokens)
        self._urgent = self._urgent or begins or output.finish is not None

    def send(self, now: float, streams: int) -> None:
        """Send what there is, unless it can wait for more; of so many streams that are served."""
        if not self._loops or not (self._urgent or now >= self._last + patience(streams)):
            return
        loops, self._loops = self._loops, {}
        self._urgent, self._last = False, now
        for loop, outputs in loops.items():
            try:
                loop.call_soon_threadsafe(_hand_over, outputs)
            except RuntimeError:  # the loop has ended, and its readers with it
                log.debug("an event loop ended before its outputs came")


def _hand_over(outputs: Sequence[tuple[Deliver, Output]]) -> None:
    for deliver, output in outputs:
        deliver(output)

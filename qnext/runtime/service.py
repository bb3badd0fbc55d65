"""An engine in a thread of its own, for any number of threads and event loops.

    with Service(Engine(params, tokenizer)) as service:
        for output in service.stream(request): ...
        async for output in service.astream(request): ...

Whoever stops reading (leaves the loop, closes the iterator, is cancelled) ends the request, and
what it held is free before the next step.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from qnext.errors import QnextError
from qnext.runtime.engine import PAUSE, Engine
from qnext.runtime.outbox import Deliver, Outbox
from qnext.runtime.request import FullError, Output, RankError, RefusedError, Request, joined
from qnext.runtime.sequence import Sequence as Served

log = logging.getLogger("qnext")


class Service:
    """Runs an engine's steps while there is work. Raises what `Engine.submit` raises."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._news = threading.Condition()
        self._inbox: deque[Callable[[], Any]] = deque()  # for the engine's thread to do
        self._arriving = 0
        self._state = "serving"
        self.failure: str | None = None  # why it closed by itself, if it did
        self._outbox = Outbox()
        self._thread = threading.Thread(target=self._serve, name="qnext-engine", daemon=True)
        self._thread.start()

    # ---- requests

    def stream(self, request: Request) -> Iterator[Output]:
        """The outputs of a request, as they come; it is checked at the first `next`."""
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        sequence = self._submit(request, outputs.put)
        try:
            while True:
                output = outputs.get()
                yield output
                if output.finish:
                    return
        finally:
            self._abort(sequence)

    async def astream(self, request: Request) -> AsyncGenerator[Output, None]:
        """The outputs of a request, on the running event loop.

        Those that wait for the loop together come as one: see `Outbox`.
        """
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        deliver = outputs.put_nowait
        sequence = self._submit(request, lambda output: self._outbox.put(loop, deliver, output))
        try:
            while True:
                output = await outputs.get()
                while not outputs.empty():
                    output = joined(output, outputs.get_nowait())
                yield output
                if output.finish:
                    return
        finally:
            self._abort(sequence)

    def generate(self, requests: Sequence[Request]) -> list[list[Output]]:
        """The outputs of many requests at once, all of them, in the order of the requests."""
        with_outputs: list[list[Output]] = [[] for _ in requests]
        missing = threading.Semaphore(0)

        def sink(into: list[Output]) -> Deliver:
            def take(output: Output) -> None:
                into.append(output)
                if output.finish:
                    missing.release()

            return take

        served = [
            self._submit(request, sink(into), bounded=False)
            for request, into in zip(requests, with_outputs, strict=True)
        ]
        try:
            for _ in served:
                missing.acquire()
        finally:
            for sequence in served:
                self._abort(sequence)
        return with_outputs

    def _submit(self, request: Request, sink: Deliver, bounded: bool = True) -> Served:
        try:
            sequence = self.engine.prepare(request, sink)
            self._line_up(sequence, bounded)
        except QnextError as error:
            if request.handoff is not None:
                request.handoff.fail(f"its prompt was not read: {error}")
            raise
        return sequence

    def _line_up(self, sequence: Served, bounded: bool) -> None:
        with self._news:
            if self._state != "serving":
                raise RefusedError(f"the engine is {self._state}, it takes no more requests")
            waiting = self._arriving + len(self.engine.board.waiting)
            if bounded and waiting >= self.engine.options.max_waiting:
                raise FullError(waiting)
            self._arriving += 1
            self._inbox.append(lambda: self._arrived(sequence))
            self._news.notify()

    def _arrived(self, sequence: Served) -> None:
        with self._news:
            self._arriving -= 1
        self.engine.enqueue(sequence)

    def _abort(self, sequence: Served) -> None:
        if sequence.finish is None:
            with self._news:
                self._inbox.append(lambda: self.engine.abort(sequence))
                self._news.notify()

    # ---- the engine's thread

    def _serve(self) -> None:
        while True:
            with self._news:
                while not (self._inbox or self.engine.busy or self._state == "closed"):
                    if self.engine.attends:  # to what other groups do
                        self._news.wait(PAUSE if self.engine.quiet else 0)
                        break
                    self._news.wait()
                orders = [self._inbox.popleft() for _ in range(len(self._inbox))]
                if self._state == "closed" and not orders:
                    break
            for order in orders:
                order()
            self._step()
        self.engine.close()
        self._outbox.send(time.monotonic(), 0)

    def _step(self) -> None:
        try:
            self.engine.step()
        except RankError as error:
            self._lose(error)
        except Exception as error:
            log.exception("a step of the engine failed; it begins anew")
            self.engine.recover(error)
        self._outbox.send(time.monotonic(), len(self.engine.board.running))

    def _lose(self, error: RankError) -> None:
        log.critical("%s: every request ends", error)
        with self._news:
            self.failure, self._state = str(error), "closed"
            orders = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for order in orders:  # who was just taken ends as well
            order()
        self.engine.lose(error)

    # ---- ends

    @property
    def state(self) -> str:
        """serving, draining or closed."""
        return self._state

    def drain(self) -> None:
        """Take no more requests; those that were taken are served."""
        with self._news:
            if self._state == "serving":
                self._state = "draining"
            self._news.notify()

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting, running or under way."""
        return not (self._inbox or self.engine.busy)

    def close(self) -> None:
        """End every request, with finish "closed", and the thread."""
        with self._news:
            self._state = "closed"
            self._news.notify()
        self._thread.join()

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""A server process: it listens at once, loads, serves, drains at the first signal, ends at the
second. What happens to the model happens in threads, so that /health always answers."""

import gc
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from qnext.errors import QnextError
from qnext.server.app import create_app
from qnext.server.guard import MOST_BYTES
from qnext.server.host import Host, Ready

log = logging.getLogger("qnext")


@dataclass(frozen=True, kw_only=True)
class Listening:
    """How a server listens. drain_seconds: how long answers under way may take after a signal."""

    address: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    most_bytes: int = MOST_BYTES
    drain_seconds: float = 60.0
    json_log: bool = False


class Server(uvicorn.Server):
    """uvicorn that drains: the first SIGTERM or SIGINT stops requests from being taken, and the
    server ends once those it took are answered; the second ends it at once."""

    def __init__(self, config: uvicorn.Config, host: Host, drain_seconds: float) -> None:
        super().__init__(config)
        self.host, self.drain_seconds = host, drain_seconds
        self._until: float | None = None
        self._told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        ready = self.host.ready
        if ready is None or self._until is not None:
            self.should_exit = self.force_exit = True
            return
        self._until = time.monotonic() + self.drain_seconds
        ready.service.drain()
        log.info("draining: no more requests are taken; a second signal ends the server at once")

    @property
    def url(self) -> str:
        """Where it listens; port 0 was any free one."""
        port = self.servers[0].sockets[0].getsockname()[1]
        return f"http://{self.config.host}:{port}"

    async def on_tick(self, counter: int) -> bool:
        ready = self.host.ready
        if ready is not None and not self._told:
            self._told = True
            print(f"qnext: serving {self.host.model} on {self.url}", file=sys.stderr, flush=True)
        if self._until is not None and ready is not None:
            late = time.monotonic() > self._until
            if late:
                log.warning("answers were not complete after %g s", self.drain_seconds)
            self.should_exit = self.should_exit or late or ready.service.idle
        if ready is not None and ready.service.failure is not None and ready.service.idle:
            self.host.failure = ready.service.failure
        self.should_exit = self.should_exit or self.host.failure is not None
        return await super().on_tick(counter)


def serve(host: Host, load: Callable[[], Ready], listening: Listening) -> int:
    """Serve until a signal. Returns the exit status: 0 after a drain, 2 where loading failed."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        threading.Thread(target=_load, args=(host, load), name="qnext-load", daemon=True).start()
        yield

    app = create_app(
        host,
        listening.keys,
        listening.most_bytes,
        listening.origins,
        listening.json_log,
        lifespan,
    )
    config = uvicorn.Config(
        app,
        host=listening.address,
        port=listening.port,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        backlog=2048,
        server_header=False,
    )
    server = Server(config, host, listening.drain_seconds)
    try:
        server.run()
    finally:
        if host.ready is not None:
            host.ready.service.close()
            if host.ready.role is not None:
                host.ready.role.close()
    if host.failure is not None:
        print(f"qnext: {host.failure}", file=sys.stderr)
        return 2
    return 0 if server.started else 1


def _load(host: Host, load: Callable[[], Ready]) -> None:
    try:
        host.loaded(load())
    except Exception as error:
        if not isinstance(error, QnextError | OSError):  # these say what is wrong themselves
            log.exception("loading failed")
        host.failure = f"loading failed: {error}"
    gc.collect()
    gc.freeze()  # a model and its steps stay: let no collection look at them again

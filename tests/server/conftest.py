"""A real server with the demo model, in a thread, for tests that speak HTTP to it."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

import qnext as qn
from qnext.runtime.engine import Engine
from qnext.runtime.options import Options
from qnext.runtime.service import Service
from qnext.server.app import create_app
from qnext.server.asked import Reader
from qnext.server.guide import Grammars
from qnext.server.host import Host, Ready
from tests.ports import free_port

OPTIONS = Options(rows=4, capacity=1024, pages=24, chunk=128, snapshot_every=256, max_waiting=32)
SECONDS = 120.0  # a step may have to be compiled, and machines pause


@dataclass
class Running:
    """A server that answers at `url`; `host` and `service` are what is behind it."""

    url: str
    host: Host
    service: Service

    def metrics(self) -> dict[str, float]:
        """Samples by name; those with further labels are added up."""
        found: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=SECONDS).text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def idle(self, seconds: float = 20.0) -> None:
        """Wait until nothing is served."""
        end = time.monotonic() + seconds
        while not self.service.idle:
            assert time.monotonic() < end, "the engine is still busy"
            time.sleep(0.01)

    def assert_nothing_is_held(self) -> None:
        """All rows are free, and all pages but those of the cache."""
        self.idle()
        board = self.service.engine.board
        assert board.free_rows == self.service.engine.options.rows
        assert board.pages.free + board.cache.held == self.service.engine.options.pool


def ready_host(engine: Engine, seconds: float | None = None) -> Host:
    """A host with this engine behind it."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    vocab = engine.params.config.vocab_size
    reader = Reader(tokenizer, Grammars(tokenizer, vocab), engine.options.capacity, vocab, seconds)
    host = Host("demo", {"target": "cpu"})
    host.loaded(Ready(Service(engine), tokenizer, reader))
    return host


class serving:  # a context manager, used as a verb
    """Run an application at a free port while the block runs."""

    def __init__(self, host: Host, **app: Any) -> None:
        self.host, port = host, free_port()
        config = uvicorn.Config(create_app(host, **app), port=port, log_level="error")
        self.server, self.url = uvicorn.Server(config), f"http://127.0.0.1:{port}"
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Running:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        assert self.host.ready is not None
        return Running(self.url, self.host, self.host.ready.service)

    def __exit__(self, *failure: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert self.host.ready is not None
        self.host.ready.service.close()


@pytest.fixture(scope="session")
def demo() -> tuple[qn.Params, Any]:
    return qn.demo(), qn.tokenizer()


@pytest.fixture(scope="session")
def server(demo: tuple[qn.Params, Any]) -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    with serving(ready_host(Engine(*demo, OPTIONS))) as running:
        yield running

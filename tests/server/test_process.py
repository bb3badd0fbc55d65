"""`qnext serve` as a process: signals, clients that die, and what keeps it from starting."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.ports import free_port
from tests.server.conftest import SECONDS

pytestmark = pytest.mark.slow  # each starts a process that loads a model
LONG = {"prompt": "Tom has", "max_tokens": 900, "ignore_eos": True, "stream": True, "seed": 1}


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of the demo that is ready, and its address; killed at the end if it still runs."""
    port = free_port()
    command = [sys.executable, "-m", "qnext.cli", "serve", "--port", str(port), "--no-warm"]
    started = subprocess.Popen(
        [*command, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while not is_ready(url):
            assert started.poll() is None and time.monotonic() < end, started.communicate()
            time.sleep(0.05)
        yield started, url
    finally:
        started.kill()
        started.communicate()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=SECONDS).status_code == 200
    except httpx.TransportError:
        return False


def gauges(url: str) -> dict[str, int]:
    told = httpx.get(f"{url}/server_info", timeout=SECONDS).json()
    return {name: told[name] for name in ("running", "waiting", "rows", "rows_free")}


def events(lines: Iterator[str]) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in lines if line.startswith("data: "))


def test_the_first_signal_drains() -> None:
    """The answer under way is completed, others are refused, and the status is 0."""
    with process("--rows", "2") as (server, url):
        wanted = httpx.post(f"{url}/v1/completions", json={**LONG, "stream": False}, timeout=60)
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response:
            stream = events(response.iter_lines())
            got = [next(stream)]
            server.send_signal(signal.SIGTERM)
            while (health := httpx.get(f"{url}/health", timeout=SECONDS)).status_code == 200:
                time.sleep(0.01)
            assert health.json()["status"] == "draining"
            refused = httpx.post(f"{url}/v1/completions", json=LONG, timeout=SECONDS)
            got += stream
        assert refused.status_code == 503
        assert refused.headers["retry-after"] and "draining" in refused.json()["error"]["message"]
        assert got.pop() == "[DONE]"
        text = "".join(json.loads(each)["choices"][0]["text"] for each in got)
        assert text == wanted.json()["choices"][0]["text"]
        assert server.wait(20) == 0


def test_the_second_signal_ends_at_once() -> None:
    with process("--rows", "2") as (server, url):
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response,
        ):
            stream = response.iter_lines()
            next(stream)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            server.send_signal(signal.SIGTERM)
            for _ in stream:
                pass
        assert server.wait(10) == 0


# reads the beginning of an endless answer, says so, and then just sits there
CLIENT = """
import socket, sys, time
host, port, body = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
connection = socket.create_connection((host, port))
head = "POST /v1/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\n"
connection.sendall(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n".encode() + body)
connection.recv(100)
print("reads", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def client(url: str, body: dict[str, object]) -> Iterator[subprocess.Popen[str]]:
    """A client process that has seen the beginning of its answer, if it is to see any."""
    host, _, port = url.removeprefix("http://").partition(":")
    command = [sys.executable, "-c", CLIENT, host, port, json.dumps(body)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_clients_that_are_killed_leave_nothing_behind(stream: bool) -> None:
    """Those that read, and those that wait for a row or for a whole answer."""
    body = {**LONG, "max_tokens": 3000, "stream": stream}
    with process("--rows", "3") as (_, url):
        with contextlib.ExitStack() as clients:
            started = [clients.enter_context(client(url, body)) for _ in range(3)]
            if stream:  # all three rows are theirs before others come
                assert [each.stdout.readline() for each in started] == ["reads\n"] * 3
            for _ in range(2):
                clients.enter_context(client(url, body))
            _until(url, {"running": 3, "waiting": 2, "rows": 3, "rows_free": 0})
        _until(url, {"running": 0, "waiting": 0, "rows": 3, "rows_free": 3})


def _until(url: str, wanted: dict[str, int]) -> None:
    end = time.monotonic() + 30
    while (got := gauges(url)) != wanted:
        assert time.monotonic() < end, got
        time.sleep(0.02)


def _status(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "qnext.cli", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def test_a_port_that_is_taken() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        status, text = _status("--port", str(listener.getsockname()[1]))
    assert status != 0 and "address already in use" in text and "Traceback" not in text


def test_a_model_that_is_none(tmp_path: Path) -> None:
    status, text = _status("--port", str(free_port()), str(tmp_path))
    assert status == 2 and str(tmp_path) in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "0"), "rows must be an integer >= 1"),
        (("--api-key", ""), "--api-key: is empty"),
        (("--draft", "-1"), "draft must be an integer >= 0"),
        (("--dtype", "bf16"), "invalid choice: 'bf16'"),
    ],
)
def test_options_that_do_not_fit(arguments: tuple[str, ...], message: str) -> None:
    status, text = _status("--port", str(free_port()), *arguments)
    assert status == 2 and message in text and "Traceback" not in text

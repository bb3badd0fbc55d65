"""`torchrun -m qnext serve --tp 2`: a server as any other, which ends with any rank."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.server.test_process import free_port, is_ready, process
from tests.server.test_roles import QUESTION, SIZES, Server, Sides, texts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc"),
]
RANKS = ("--tp", "2", "--whole", "delta_heads")
SECONDS = 180.0


@contextmanager
def ranks(*options: str, shared: tuple[str, ...] = RANKS, servers: int = 1) -> Iterator[Server]:
    """A server of two ranks that is ready; of several, at ports in a row, the first."""
    port, rendezvous = free_ports(servers), free_port()
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    served = ["-m", "qnext", "serve", "--port", str(port), "--no-warm", *shared, *options]
    started = subprocess.Popen(
        [*launched, "--master-port", str(rendezvous), *served],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + SECONDS
        while not all(is_ready(f"http://127.0.0.1:{port + n}") for n in range(servers)):
            assert started.poll() is None and time.monotonic() < end, started.communicate()
            time.sleep(0.1)
        yield Server(started, url)
    finally:
        for each in (*of(started), started.pid):  # ranks have sessions of their own
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        started.communicate()


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens at."""
    while True:
        first = free_port()
        with suppress(OSError), ExitStack() as held:
            for number in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return first


def of(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes of its ranks, in their order."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return sorted(map(int, children.read_text().split())) if children.exists() else []


def asked(server: Server, **more: object) -> httpx.Response:
    body = {"prompt": QUESTION, "max_tokens": 50, "temperature": 0.7, "seed": 5} | more
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS)


def test_two_ranks_answer_as_one_and_drain() -> None:
    with ranks("--draft", "1") as both, process(*SIZES) as (one, url):
        for temperature in (0.0, 0.7):
            want = texts(asked(Server(one, url), temperature=temperature))
            assert texts(asked(both, temperature=temperature)) == want
        both.process.send_signal(signal.SIGTERM)
        told, _ = both.process.communicate(timeout=60)
    assert "draining" in told and "rank 1 ends" not in told


@pytest.mark.parametrize("which", ["prefill", "decode"])
def test_a_side_of_two_ranks_and_one_of_one(which: str) -> None:
    one = ("prefill", "decode")[which == "prefill"]
    with (
        ranks(*SIZES, "--role", which) as both,
        process(*SIZES, "--role", one) as single,
        process(*SIZES) as alone,
    ):
        named = {which: both, one: Server(*single), "alone": Server(*alone)}
        sides = Sides(**named)
        body = {"prompt": 20 * QUESTION, "max_tokens": 30, "temperature": 0.6, "seed": 2}
        read, answer = sides.as_sglang("/v1/completions", **body)
        assert read.status_code == 200
        assert texts(answer) == texts(sides.alone.post("/v1/completions", **body))
        assert sides.decode.figure("qnext:handoffs_total") == 1
        assert sides.prefill.is_clean() and sides.decode.is_clean()


def test_a_rank_that_is_killed_ends_the_group_and_is_named() -> None:
    with ranks() as both:
        assert asked(both).status_code == 200
        with httpx.stream(
            "POST",
            f"{both.url}/v1/completions",
            json={"prompt": QUESTION, "max_tokens": 400, "ignore_eos": True, "stream": True},
            timeout=SECONDS,
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(of(both.process)[1], signal.SIGKILL)
            try:
                rest = list(lines)
            except httpx.TransportError:
                rest = []
        assert not any('"finish_reason":"length"' in line for line in rest)  # it is not complete
        told, _ = both.process.communicate(timeout=90)
    assert both.process.returncode
    assert "rank      : 1" in told or "rank 1 is gone" in told


GROUPS = ("--dp", "2")


def test_groups_answer_at_ports_of_their_own() -> None:
    """One of them alone, then both at once; each as a server without ranks does."""
    with ranks("--draft", "1", shared=GROUPS, servers=2) as first, process(*SIZES) as (one, url):
        second = replace(first, url=f"http://127.0.0.1:{int(first.url.rpartition(':')[2]) + 1}")
        want = {seed: texts(asked(Server(one, url), seed=seed)) for seed in (5, 6)}
        assert texts(asked(second, seed=6)) == want[6]  # the other group has nothing to do
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(asked, *each) for each in ((first,), (second,))]
            assert [texts(each.result()) for each in both] == [want[5]] * 2
        first.process.send_signal(signal.SIGTERM)
        told, _ = first.process.communicate(timeout=60)
    assert told.count("draining") == 2 and " is gone" not in told and "failed" not in told


def test_a_group_that_is_killed_ends_the_others() -> None:
    with ranks(shared=GROUPS, servers=2) as first:
        assert asked(first).status_code == 200
        os.kill(of(first.process)[1], signal.SIGKILL)
        told, _ = first.process.communicate(timeout=90)
    assert first.process.returncode
    assert "rank      : 1" in told or "rank 1 is gone" in told

"""`torchrun -m qnext serve --tp 2`: a server as any other, which ends with any rank."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
def ranks(*options: str) -> Iterator[Server]:
    """A server of two ranks that is ready."""
    port, rendezvous = free_port(), free_port()
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    served = ["-m", "qnext", "serve", "--port", str(port), "--no-warm", *RANKS, *options]
    started = subprocess.Popen(
        [*launched, "--master-port", str(rendezvous), *served],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + SECONDS
        while not is_ready(url):
            assert started.poll() is None and time.monotonic() < end, started.communicate()
            time.sleep(0.1)
        yield Server(started, url)
    finally:
        for each in (*of(started), started.pid):  # ranks have sessions of their own
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        started.communicate()


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

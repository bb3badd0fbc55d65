"""Public routers between OpenAI's client and two servers, of which one reads and one answers."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.clients.served import CLIENTS, LONG, Served, needs_clients, python, serving
from tests.handoff.test_transport import has_mooncake
from tests.ports import free_port

pytestmark = [pytest.mark.slow, needs_clients]
SCRIPT = "openai_client.py"
CHECKS = "chat choices stream streaming_helper completions response_format logprobs"
KINDS = {
    "sglang": ("sglang-router", "launch", "--pd-disaggregation"),
    "vllm": ("vllm-router", "--vllm-pd-disaggregation"),
}


@dataclass
class Routed:
    """A router's address, and the servers behind it."""

    url: str
    prefill: Served
    decode: Served


@contextmanager
def router(kind: str, prefill: str, decode: str, log: Path) -> Iterator[str]:
    """A router's address, while it runs."""
    port, more = free_port(), ["--prometheus-port", str(free_port())]
    bootstrap = [prefill.rpartition(":")[2]] if kind == "sglang" else []
    program, *options = KINDS[kind]
    command = [str(CLIENTS / "bin" / program), *options, "--prefill", prefill, *bootstrap]
    command += ["--decode", decode, "--host", "127.0.0.1", "--port", str(port), *more]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            _await_models(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def _await_models(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a router knows its servers, and says so."""
    end = time.monotonic() + LONG
    while True:
        try:
            with urlopen(f"{url}/health", timeout=LONG) as answer:
                if answer.status == 200:
                    return
        except (URLError, ConnectionError):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)


@pytest.fixture(scope="module", params=KINDS)
def routed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Routed:
    room = tmp_path_factory.mktemp(request.param)
    transport = ("--transport", "mooncake" if has_mooncake() else "group")
    stack = ExitStack()
    request.addfinalizer(stack.close)
    prefill, decode = (
        stack.enter_context(
            serving(room / f"{role}.txt", "--role", role, "--draft", "1", *transport)
        )
        for role in ("prefill", "decode")
    )
    url = stack.enter_context(router(request.param, prefill.url, decode.url, room / "router.txt"))
    return Routed(url, prefill, decode)


@pytest.mark.parametrize("check", CHECKS.split())
def test_the_client_is_served_through_a_router(check: str, routed: Routed) -> None:
    before = routed.decode.metric("qnext:handoffs_total")
    python(SCRIPT, routed.url, check)
    assert routed.decode.metric("qnext:handoffs_total") > before
    assert routed.decode.free() and routed.prefill.free()


def test_texts_are_those_of_one_server(routed: Routed, server: Served) -> None:
    """Of prompts of 1 to some 3,000 tokens, greedy and drawn."""
    before = routed.decode.metric("qnext:handoffs_total")
    told = python(SCRIPT, routed.url, "texts")
    assert told == python(SCRIPT, server.url, "texts")
    lengths = [json.loads(line)[0] for line in told.splitlines()[:-2]]
    assert min(lengths) == 1 and max(lengths) > 2900
    handed = 2 + sum(length > 1 for length in lengths)
    assert routed.decode.metric("qnext:handoffs_total") - before == handed
    assert not routed.decode.metric("qnext:handoff_failures_total")

"""One server reads, another answers: the answers of one alone, whatever becomes of either."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from qnext.embedded import MODEL
from tests.handoff.test_transport import has_mooncake
from tests.server.test_process import process

TRANSPORT = "mooncake" if has_mooncake() else "group"
SECONDS = 120.0
SIZES = ("--rows", "3", "--capacity", "512", "--chunk", "64", "--transport", TRANSPORT)
QUESTION = (
    "Question: Mia has 12 apples. She buys 7 more and then gives 5 to Tom. How many are left?"
)


@dataclass
class Server:
    process: Any
    url: str

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=SECONDS)

    def figure(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def is_clean(self) -> bool:
        """Every row and page is free again."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            info = httpx.get(f"{self.url}/server_info").json()
            free = info["pages_free"] + info["pages_cached"] == info["pages"]
            if info["rows_free"] == info["rows"] and free and not info["waiting"]:
                return True
            time.sleep(0.05)
        return False


@dataclass
class Sides:
    """Both sides, and a server that does all by itself."""

    prefill: Server
    decode: Server
    alone: Server
    rooms: int = 0

    def as_sglang(self, path: str, **body: Any) -> tuple[httpx.Response, httpx.Response]:
        """As sglang-router does it: one body to both at once."""
        self.rooms += 1
        placed = {
            **body,
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.prefill.port,
            "bootstrap_room": self.rooms,
        }
        read: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: read.append(self.prefill.post(path, **placed)), daemon=True
        )
        asking.start()
        answer = self.decode.post(path, **placed)
        asking.join(SECONDS)
        return read[0], answer

    def as_vllm(self, path: str, **body: Any) -> tuple[httpx.Response, httpx.Response]:
        """As vllm-router does it: the prompt first, then what was answered goes to the other."""
        params = {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": None}
        first = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": params}
        read = self.prefill.post(path, **first)
        told = read.json()["kv_transfer_params"]
        return read, self.decode.post(path, **body, kv_transfer_params=told)


@contextmanager
def started(*options: str, draft: int) -> Iterator[Sides]:
    """Servers with these options; the sides have guesses ahead, the one that does all has none."""
    with ExitStack() as stack:

        def server(*more: str) -> Server:
            return Server(*stack.enter_context(process(*SIZES, *options, *more)))

        guesses = ("--draft", str(draft))
        decode = server("--role", "decode", *guesses, "--handoff-seconds", "5")
        yield Sides(server("--role", "prefill", *guesses), decode, server())


@pytest.fixture(scope="module")
def sides() -> Iterator[Sides]:
    """Both have made their steps, which on a busy machine takes longer than a decoder waits."""
    with started(draft=1) as made:
        body = {"prompt": QUESTION[::-1], "temperature": 0, "max_tokens": 3}
        for reply in made.as_sglang("/v1/completions", **body):
            assert reply.status_code == 200, reply.text
        yield made


def texts(reply: httpx.Response) -> list[Any]:
    assert reply.status_code == 200, reply.text
    body = reply.json()
    if "choices" not in body:
        return [body["text"]]
    return [(c.get("text") or c["message"]["content"], c["finish_reason"]) for c in body["choices"]]


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("/v1/completions", {"prompt": QUESTION, "temperature": 0, "max_tokens": 40}),
    "drawn, three choices": (
        "/v1/completions",
        {"prompt": QUESTION * 6, "seed": 5, "n": 3, "max_tokens": 20, "temperature": 0.9},
    ),
    "two prompts": (
        "/v1/completions",
        {"prompt": [QUESTION * 2, "Who"], "temperature": 0, "max_tokens": 20},
    ),
    "one token": ("/v1/completions", {"prompt": [7], "temperature": 0, "max_tokens": 9}),
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 40},
    ),
    "a penalty": (
        "/v1/completions",
        {"prompt": QUESTION, "temperature": 0, "max_tokens": 30, "repetition_penalty": 1.3},
    ),
}


def answered() -> Iterator[Any]:
    """Each case by each router; sglang-router names as many rooms as prompts: a test of its own."""
    for case in BODIES:
        for router in ("sglang", "vllm"):
            if (case, router) != ("two prompts", "sglang"):
                marks = () if case == "greedy" else (pytest.mark.slow,)
                yield pytest.param(case, router, marks=marks)


@pytest.mark.parametrize(("case", "router"), [*answered()])
def test_an_answer_is_the_same(sides: Sides, case: str, router: str) -> None:
    path, body = BODIES[case]
    before = sides.decode.figure("qnext:handoffs_total")
    ask = sides.as_sglang if router == "sglang" else sides.as_vllm
    read, answer = ask(path, **body)
    assert read.status_code == 200, read.text
    assert texts(answer) == texts(sides.alone.post(path, **body))
    values = {"two prompts": 2, "one token": 0}.get(case, 1)
    assert sides.decode.figure("qnext:handoffs_total") - before == values
    assert sides.prefill.is_clean() and sides.decode.is_clean()


@pytest.mark.slow
def test_an_answer_of_int8_weights_is_the_same(tmp_path: Path) -> None:
    to = tmp_path / "int8"
    subprocess.run([sys.executable, "-m", "qnext.cli", "quantize", str(MODEL), str(to)], check=True)
    with started(str(to), "--name", "demo", draft=0) as sides:
        for path, body in list(BODIES.values())[:2]:
            for ask in (sides.as_sglang, sides.as_vllm):
                _, answer = ask(path, **body)
                assert texts(answer) == texts(sides.alone.post(path, **body))
        assert sides.decode.figure("qnext:handoffs_total") == 4


@pytest.mark.slow
@pytest.mark.parametrize(("int8", "draft"), [(False, 0), (False, 1), (True, 1)])
def test_prompts_of_all_lengths(tmp_path: Path, int8: bool, draft: int) -> None:
    """One token to 3,000, ends of pages among them, greedy and drawn."""
    model, to = (), tmp_path / "int8"
    if int8:
        command = [sys.executable, "-m", "qnext.cli", "quantize", str(MODEL), str(to)]
        subprocess.run(command, check=True)
        model = (str(to), "--name", "demo")
    lengths = (1, 2, 3, 64, 127, 128, 129, 130, 257, 1000, 2047, 2048, 2999, 3000)
    with started(*model, "--capacity", "4096", "--chunk", "256", draft=draft) as sides:
        for number, length in enumerate(lengths):
            prompt = [(7 * i * i + 13 * i + number) % 250 for i in range(length)]
            body = {"prompt": prompt, "max_tokens": 24, "seed": 3, "temperature": number % 2 * 0.8}
            ask = (sides.as_sglang, sides.as_vllm)[number // 2 % 2]
            _, answer = ask("/v1/completions", **body)
            assert texts(answer) == texts(sides.alone.post("/v1/completions", **body)), length
        assert sides.decode.figure("qnext:handoffs_total") == len(lengths) - 1
        assert sides.prefill.is_clean() and sides.decode.is_clean()


def test_rooms_of_several_prompts(sides: Sides) -> None:
    body = {"prompt": [QUESTION, QUESTION[10:]], "temperature": 0, "max_tokens": 9}
    placed = {
        **body,
        "bootstrap_host": ["127.0.0.1"] * 2,
        "bootstrap_port": [sides.prefill.port] * 2,
        "bootstrap_room": [7001, 7002],
    }
    before = sides.decode.figure("qnext:handoffs_total")
    assert sides.prefill.post("/v1/completions", **placed).status_code == 200
    answer = sides.decode.post("/v1/completions", **placed)
    assert texts(answer) == texts(sides.alone.post("/v1/completions", **body))
    assert sides.decode.figure("qnext:handoffs_total") - before == 2


@pytest.mark.parametrize(
    ("placed", "why"),
    [
        ({"bootstrap_room": []}, "bootstrap_room: has 0 for 1 prompts"),
        ({"prompt": ["a", "b"], "bootstrap_room": 1}, "bootstrap_room: has 1 for 2 prompts"),
        ({"prompt": ["a", "b"], "bootstrap_room": [1, 2, 3]}, "has 3 for 2 prompts"),
        ({"bootstrap_room": 1}, "bootstrap_room needs bootstrap_host and bootstrap_port"),
        ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params: give those"),
        ({"bootstrap_room": "x"}, "bootstrap_room"),
        ({"bootstrap_port": 0}, "bootstrap_port"),
    ],
)
def test_places_that_make_no_sense_are_refused(
    sides: Sides, placed: dict[str, Any], why: str
) -> None:
    reply = sides.decode.post("/v1/completions", **{"prompt": "Who", "max_tokens": 3, **placed})
    assert reply.status_code == 400 and why in reply.json()["error"]["message"]


@pytest.mark.slow
def test_full_pools(sides: Sides) -> None:
    """The decoder reads the prompt itself; the side that prefills says that it has no room."""
    small = (*SIZES, "--handoff-bytes", "1000", "--role")
    body = {"prompt": QUESTION, "temperature": 0, "max_tokens": 12, "bootstrap_host": "127.0.0.1"}
    placed = {"bootstrap_port": sides.prefill.port, "bootstrap_room": 77}
    with process(*small, "prefill") as (_, url):
        reply = Server(None, url).post("/v1/completions", **body, **placed)
        assert reply.status_code == 503 and "has no room" in reply.json()["error"]["message"]
    with process(*small, "decode") as (_, url):
        answer = Server(None, url).post("/v1/completions", **body, **placed)
        assert texts(answer) == texts(sides.alone.post("/v1/completions", **body))
        assert Server(None, url).figure(_failed("full")) == 1


def test_a_prefiller_needs_a_port() -> None:
    command = [sys.executable, "-m", "qnext.cli", "serve", "--role", "prefill", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "--role prefill: give the --port" in ended.stderr


@pytest.mark.slow
def test_keys_go_to_peers_alone(sides: Sides) -> None:
    """A client names who prefills: it must not be told a key by that."""
    seen = list[str | None]()

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(409)
            self.end_headers()

        def log_message(self, *told: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Listener) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        named = {"bootstrap_port": listener.server_port, "bootstrap_room": 3}
        key = {"Authorization": "Bearer secret"}
        for peers, told in (((), None), (("--peer", "127.0.0.1"), "Bearer secret")):
            options = (*SIZES, "--role", "decode", "--api-key", "secret", *peers)
            with process(*options) as (_, url):

                def ask(host: str, url: str = url) -> httpx.Response:
                    body = {"prompt": "Who are", "max_tokens": 3, "bootstrap_host": host, **named}
                    return httpx.post(f"{url}/v1/completions", json=body, headers=key, timeout=60)

                assert ask("127.0.0.1").status_code == 200 and seen.pop() == told
                if peers:
                    assert ask("localhost").status_code == 403 and not seen
        listener.shutdown()


def test_offers_are_taken_where_prompts_are_read_alone(sides: Sides) -> None:
    for server, status in ((sides.decode, 404), (sides.alone, 404), (sides.prefill, 400)):
        reply = server.post("/handoff", room="1")
        assert reply.status_code == status, reply.text


@pytest.mark.slow
def test_a_room_that_nobody_reads_costs_time_only(sides: Sides) -> None:
    """The decoder's offer waits; then it reads the prompt itself."""
    placed = {"bootstrap_host": "127.0.0.1", "bootstrap_port": sides.prefill.port}
    body = {"prompt": QUESTION, "temperature": 0, "max_tokens": 12}
    before = sides.decode.figure("qnext:handoff_failures_total")
    began = time.monotonic()
    answer = sides.decode.post("/v1/completions", **body, **placed, bootstrap_room=99_999)
    assert 4.5 < time.monotonic() - began < 30
    assert texts(answer) == texts(sides.alone.post("/v1/completions", **body))
    assert sides.decode.figure("qnext:handoff_failures_total") == before + 1
    assert sides.decode.is_clean()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_prefiller_that_is_gone_costs_time_only(sides: Sides, how: signal.Signals) -> None:
    body = {"prompt": QUESTION, "temperature": 0, "max_tokens": 12}
    want = texts(sides.alone.post("/v1/completions", **body))
    before = {name: sides.decode.figure(_failed(name)) for name in ("unreachable", "cancelled")}
    with process(*SIZES, "--role", "prefill") as (started, url):
        port = int(url.rpartition(":")[2])
        os.kill(started.pid, how)
        placed = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": 5}
        began = time.monotonic()
        answer = sides.decode.post("/v1/completions", **body, **placed)
        assert time.monotonic() - began < 10
        assert texts(answer) == want and sides.decode.is_clean()
        started.kill()
    after = {name: sides.decode.figure(_failed(name)) for name in ("unreachable", "cancelled")}
    assert after == {"unreachable": before["unreachable"] + 1, "cancelled": before["cancelled"]}


def _failed(reason: str) -> str:
    return f'qnext:handoff_failures_total{{model_name="demo",reason="{reason}"}}'

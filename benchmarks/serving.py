"""A real server of the demo under load: speed, cached prefixes, ten minutes, clients that die.

    python -m benchmarks.serving speed                    decoding with 1 client and with 16
    python -m benchmarks.serving cached                   first token of 1,000, 900 of them cached
    python -m benchmarks.serving load --minutes 10        64 clients; texts against their own alone
    python -m benchmarks.serving kills --count 1000       clients that get SIGKILL amid their answer
    ... [--draft 1] [--json benchmarks/results.jsonl]

Each starts `qnext serve` as a process of its own. Client and server share the machine: figures are
lower than a server alone would reach.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks.eager import where_measured
from qnext.embedded import PROBLEMS


@dataclass
class Server:
    """A server process that answers at `url`."""

    url: str
    process: subprocess.Popen[bytes]

    def rss(self) -> int:
        """Bytes of memory that the process has."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def server(*options: str) -> Iterator[Server]:
    """`qnext serve` of the demo, warm; it must end with status 0 at SIGTERM."""
    port = free_port()
    command = [sys.executable, "-m", "qnext.cli", "serve", "--quiet", "--port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    made = Server(f"http://127.0.0.1:{port}", process)
    try:
        asyncio.run(_healthy(made))
        yield made
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise RuntimeError(f"the server ended with status {process.returncode}")
    finally:
        process.kill()


async def _healthy(made: Server) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{made.url}/health") as answer:
                    if answer.status == 200:
                        return
            if made.process.poll() is not None:
                raise RuntimeError("the server did not start")
            await asyncio.sleep(0.1)


@dataclass
class Answer:
    """first: seconds to the first text. seconds: to the end. made, cached: tokens."""

    text: str
    first: float
    seconds: float
    made: int
    cached: int
    finish: str | None


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """One streamed completion."""
    began = time.perf_counter()
    text, first, usage, finish = "", 0.0, {}, None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with session.post(f"{url}/v1/completions", json=body | options) as answer:
        if answer.status != 200:
            raise RuntimeError(await answer.text())
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk))
            first = first or time.perf_counter() - began
            for choice in chunk["choices"]:
                text, finish = text + choice["text"], choice["finish_reason"] or finish
            usage = chunk.get("usage") or usage
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    seconds = time.perf_counter() - began
    return Answer(text, first, seconds, usage["completion_tokens"], cached, finish)


def questions() -> list[str]:
    with Path(PROBLEMS).open(encoding="utf-8") as lines:
        return [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]


async def info(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(f"{url}/server_info") as answer:
        return dict(await answer.json())


def leaks(told: dict[str, Any]) -> int:
    """Rows and pages that somebody holds though nobody is served."""
    pages = told["pages"] - told["pages_free"] - told["pages_cached"]
    return int(told["rows"] - told["rows_free"] + pages + told["running"] + told["waiting"])


async def at_rest(session: aiohttp.ClientSession, url: str) -> tuple[dict[str, Any], float]:
    """What the server tells once nobody holds anything, and the seconds until then, 30 at most.

    An answer's last text goes out before the step in which the cache copies its state.
    """
    began = time.monotonic()
    while leaks(told := await info(session, url)) and time.monotonic() < began + 30:
        await asyncio.sleep(0.01)
    return told, time.monotonic() - began


# ---- speed


async def speed(made: Server, rounds: int) -> dict[str, Any]:
    """Tokens a second with 1 and with 16 clients, in turn; medians of the rounds."""
    prompts = questions()
    rates: dict[int, list[float]] = {1: [], 16: []}
    async with aiohttp.ClientSession() as session:

        async def client(number: int, count: int) -> int:
            total = 0
            for i in range(count):
                body = {"prompt": prompts[(number * 7 + i) % len(prompts)], "max_tokens": 512}
                body |= {"ignore_eos": True, "temperature": 0}
                total += (await ask(session, made.url, body)).made
            return total

        await asyncio.gather(*(client(i, 1) for i in range(16)))
        for _ in tqdm(range(rounds), desc="rounds"):
            for clients, each in ((1, 2), (16, 1)):
                began = time.perf_counter()
                totals = await asyncio.gather(*(client(i, each) for i in range(clients)))
                rates[clients].append(sum(totals) / (time.perf_counter() - began))
    one, many = (statistics.median(rates[n]) for n in (1, 16))
    return {"tokens_per_second_1": one, "tokens_per_second_16": many, "ratio": many / one}


# ---- cached prefixes


async def cached(made: Server, rounds: int) -> dict[str, Any]:
    """Seconds to the first token of 1,000-token prompts, with 900 of them cached and with none."""
    rng, vocab = random.Random(0), 1000
    times: dict[str, list[float]] = {"cold": [], "cached": []}
    async with aiohttp.ClientSession() as session:

        async def first(prompt: list[int], wanted: int) -> float:
            answer = await ask(
                session, made.url, {"prompt": prompt, "max_tokens": 1, "ignore_eos": True}
            )
            if answer.cached != wanted:
                raise RuntimeError(f"{answer.cached} tokens were cached, not {wanted}")
            return answer.first

        for _ in tqdm(range(rounds), desc="rounds"):
            prefix = [rng.randrange(3, vocab) for _ in range(901)]
            await first(prefix, 0)  # leaves the state of all its tokens but the last
            tails = [[rng.randrange(3, vocab) for _ in range(100)] for _ in range(2)]
            times["cached"].append(await first(prefix[:900] + tails[0], 900))
            cold = [rng.randrange(3, vocab) for _ in range(900)]
            times["cold"].append(await first(cold + tails[1], 0))
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "cold_seconds": medians["cold"],
        "cached_seconds": medians["cached"],
        "ratio": medians["cold"] / medians["cached"],
    }


# ---- load


def bodies(count: int) -> list[dict[str, Any]]:
    """Different requests: lengths, temperatures, stops; some prompts begin alike."""
    rng, prompts = random.Random(1), questions()
    made = []
    for number in range(count):
        prompt = rng.choice(prompts)
        if rng.random() < 0.3:
            prompt = f"{prompts[number % 3]} {prompt}"
        made.append(
            {
                "prompt": prompt,
                "max_tokens": rng.choice([1, 8, 40, 120]),
                "temperature": rng.choice([0, 0.8, 1.2]),
                "top_p": rng.choice([1, 0.9]),
                "seed": number,
                "stop": rng.choice([None, "Question", "\n"]),
            }
        )
    return made


async def load(made: Server, minutes: float, clients: int) -> dict[str, Any]:
    """Clients that ask without a pause; every text must be that of the request asked alone."""
    asked = bodies(200)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        alone = [await ask(session, made.url, body) for body in tqdm(asked, desc="alone")]
        end, wrong, errors, answers = time.monotonic() + minutes * 60, 0, 0, 0
        memory: list[int] = []

        async def client(number: int) -> None:
            nonlocal wrong, errors, answers
            rng = random.Random(number)
            while time.monotonic() < end:
                which = rng.randrange(len(asked))
                try:
                    answer = await ask(session, made.url, asked[which])
                except (RuntimeError, aiohttp.ClientError) as error:
                    errors += 1
                    print(error, file=sys.stderr)
                    continue
                answers += 1
                same = (answer.text, answer.finish) == (alone[which].text, alone[which].finish)
                wrong += not same

        async def watch() -> None:
            with tqdm(total=round(minutes * 60), desc="load", unit="s") as bar:
                while time.monotonic() < end:
                    await asyncio.sleep(1)
                    bar.update()
                    memory.append(made.rss())

        await asyncio.gather(watch(), *(client(i) for i in range(clients)))
        told, _ = await at_rest(session, made.url)
    settled = memory[len(memory) // 5 :]  # the cache fills first, up to what it may hold
    return {
        "minutes": minutes,
        "clients": clients,
        "answers": answers,
        "errors": errors,
        "wrong_texts": wrong,
        "leaks": leaks(told),
        "memory_growth": settled[-1] / settled[0] - 1,
        "memory_bytes": settled[-1],
        "preempted": told.get("preempted"),
        "cache_hit_rate": told["cache_hits"] / max(told["cache_queries"], 1),
    }


# ---- clients that die


def _endless(url: str) -> int:
    """Fork a client that reads the beginning of a long answer; its process id once it has."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        os.read(read, 1)
        os.close(read)
        return child
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps({"prompt": "Tom", "max_tokens": 3000, "ignore_eos": True, "stream": True})
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        connection.recv(64)
        os.write(write, b"x")
        while connection.recv(4096):
            pass
    os._exit(0)


async def kills(made: Server, count: int) -> dict[str, Any]:
    """SIGKILL clients amid their answers, and see that another's texts are as ever."""
    asked = bodies(50)
    killed = 0
    async with aiohttp.ClientSession() as session:
        alone = [await ask(session, made.url, body) for body in asked]
        wrong = others = 0
        for _ in tqdm(range(count // 4), desc="kills", unit="x4"):
            children = [_endless(made.url) for _ in range(4)]
            which = others % len(asked)
            answer = await ask(session, made.url, asked[which])
            others += 1
            wrong += answer.text != alone[which].text
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                killed += 1
        told, seconds = await at_rest(session, made.url)
    return {
        "killed": killed,
        "other_answers": others,
        "wrong_texts": wrong,
        "leaks": leaks(told),
        "seconds_until_free": seconds,
    }


CASES: dict[str, Any] = {
    "speed": lambda made, args: speed(made, args.rounds),
    "cached": lambda made, args: cached(made, args.rounds),
    "load": lambda made, args: load(made, args.minutes, args.clients),
    "kills": lambda made, args: kills(made, args.count),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--draft", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append the figures to this file")
    args = parser.parse_args()
    with server("--draft", str(args.draft)) as made:
        figures = asyncio.run(CASES[args.case](made, args))
    figures = {
        "benchmark": f"serving {args.case}",
        **where_measured(),
        "draft": args.draft,
    } | figures
    print(json.dumps(figures, indent=2))
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()

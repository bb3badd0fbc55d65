"""Requests over two servers, of which one after the other is killed or frozen at random.

    python -m benchmarks.handoff_faults [--count 500] [--clients 4] [--seed 0] [--json out.jsonl]

Each request goes to both servers as sglang-router sends it. Beside them somebody kills one of the
two (and starts it anew) or freezes it for a while, again and again. Counted are answers that are
those of a server alone, errors (of the decoder that is gone, which nobody but a client sees),
other texts, requests that hang, and what both sides still hold at the end.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks.eager import where_measured
from benchmarks.serving import free_port

SIZES = ("--rows", "4", "--capacity", "768", "--chunk", "64", "--handoff-seconds", "3")
HANG = 60.0  # seconds after which a request hangs
PROMPTS = 24


class Server:
    """A `qnext serve` of the demo that can be killed, frozen and started anew on its port."""

    def __init__(self, *options: str) -> None:
        self.options, self.port = options, free_port()
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "qnext.cli", "serve", "--no-warm", "--quiet", "--port"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [*command, str(self.port), *SIZES, *self.options], stdout=quiet, stderr=quiet
        )
        while not self.answers():
            if self.process.poll() is not None:
                raise SystemExit(f"a server ended with {self.process.returncode}")
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=HANG)

    def kill(self) -> None:
        with self.lock:
            self.process.kill()
            self.process.wait()
            self.start()

    def freeze(self, seconds: float) -> None:
        with self.lock:
            os.kill(self.process.pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(self.process.pid, signal.SIGCONT)

    def held(self) -> dict[str, int]:
        """Rows, pages and requests that are not free again, within half a minute."""
        until, left = time.monotonic() + 30, {"": 1}
        while left and time.monotonic() < until:
            told = httpx.get(f"{self.url}/server_info", timeout=5).json()
            free = told["pages_free"] + told["pages_cached"]
            counts = {
                "rows": told["rows"] - told["rows_free"],
                "pages": told["pages"] - free,
                "running": told["running"],
                "waiting": told["waiting"],
                "handoff bytes": int(told.get("handoff_bytes_held", 0)),
            }
            left = {name: count for name, count in counts.items() if count}
            time.sleep(0.1)
        return left


def bodies(seed: int) -> list[dict[str, Any]]:
    """Prompts of 2 to 600 tokens, greedy and drawn."""
    rng = random.Random(seed)
    made = []
    for number in range(PROMPTS):
        length = rng.choice([2, 30, 127, 128, 129, 300, 600])
        made.append(
            {
                "prompt": [rng.randrange(1000) for _ in range(length)],
                "max_tokens": rng.choice([1, 8, 40]),
                "temperature": rng.choice([0, 0.9]),
                "seed": number,
                "ignore_eos": True,
            }
        )
    return made


def disturb(
    sides: tuple[Server, Server], rng: random.Random, done: threading.Event
) -> Counter[str]:
    """Kill and freeze until it is done."""
    counts: Counter[str] = Counter()
    while not done.wait(rng.uniform(0.2, 2.0)):
        name, side = rng.choice([*zip(("prefill", "decode"), sides, strict=True)])
        if rng.random() < 0.3:
            side.kill()
            counts[f"{name} killed"] += 1
        else:
            side.freeze(rng.choice([0.05, 0.5, 4.0]))
            counts[f"{name} frozen"] += 1
    return counts


def ask(sides: tuple[Server, Server], body: dict[str, Any], room: int, want: str) -> str:
    """What becomes of one request."""
    prefill, decode = sides
    placed = {
        **body,
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": prefill.port,
        "bootstrap_room": room,
    }

    def read() -> None:
        try:
            prefill.post(placed)
        except httpx.HTTPError:
            return

    threading.Thread(target=read, daemon=True).start()
    try:
        reply = decode.post(placed)
    except httpx.TimeoutException:
        return "hangs"
    except httpx.TransportError:
        with decode.lock:  # until it is there again: a router would send nothing meanwhile
            return "errors: the decoder was killed"
    if reply.status_code != 200:
        return f"errors: {reply.status_code} {reply.text[:120]}"
    return "same text" if reply.json()["choices"][0]["text"] == want else "other texts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transport", choices=("mooncake", "group"), default="mooncake")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    asked = bodies(args.seed)
    alone = Server()
    wanted = [alone.post(body).json()["choices"][0]["text"] for body in asked]
    alone.process.kill()
    via = ("--transport", args.transport, "--draft", "1")
    sides = Server("--role", "prefill", *via), Server("--role", "decode", *via)
    done, rng = threading.Event(), random.Random(args.seed)
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(args.clients) as clients, ThreadPoolExecutor(1) as chaos:
            trouble = chaos.submit(disturb, sides, rng, done)
            each = [
                clients.submit(ask, sides, asked[i % PROMPTS], i, wanted[i % PROMPTS])
                for i in range(args.count)
            ]
            results = Counter(job.result() for job in tqdm(each, desc="requests"))
            done.set()
            counts = trouble.result()
        held = {name: side.held() for name, side in zip(("prefill", "decode"), sides, strict=True)}
        metrics = httpx.get(f"{sides[1].url}/metrics").text.splitlines()
    finally:
        for side in sides:
            side.process.kill()
    row = {
        "benchmark": "handoff_faults",
        **where_measured(),
        "transport": args.transport,
        "requests": args.count,
        "seconds": time.monotonic() - began,
        "results": dict(results),
        "disturbances": dict(counts),
        "held": held,
    }
    for name in ("results", "disturbances", "held"):
        print(f"{name}: {row[name]}")
    print(*(line for line in metrics if line.startswith("qnext:handoff")), sep="\n")
    if args.json:
        with args.json.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

"""What a hand-off costs beside the transfer engine alone, between two processes on this machine.

    python -m benchmarks.handoff [--transport mooncake] [--tokens 1024 3072] [--rounds 7]
        [--json out.jsonl]

The value is that of the 80B model's layers in float32 states and bfloat16 keys, 77 MB and 24 KiB a
token, of random numbers. Raw is the engine's own batch write of the same buffers, one a tensor,
from and to the same pools; a hand-off is everything from a value that an engine has copied out of
its pools, which is told beside, to one that a decoder can put into its own: parts, writing,
checksums, the commit, the copy.
Rounds go through both in turn.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.eager import where_measured
from qnext.functional.state import KV, Delta, pages_of
from qnext.functional.tree import leaves, map_leaves
from qnext.handoff.group import GroupTransport
from qnext.handoff.layout import laid_out
from qnext.handoff.manifest import Offer, claim_of
from qnext.handoff.mooncake import BELL, MooncakeTransport
from qnext.handoff.receive import Receiver
from qnext.handoff.send import Sender
from qnext.handoff.transport import Copy
from qnext.runtime.kept import Kept, copy_alone

MAKE: dict[str, Any] = {"mooncake": MooncakeTransport, "group": GroupTransport}
LAYERS, EVERY = 48, 4  # of the 80B model; each fourth has attention
SECONDS = 60.0


def like(pages: int) -> Kept:
    """Specs of a value of the 80B model with so many pages."""

    def spec(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def layer(number: int) -> KV | Delta:
        if number % EVERY == EVERY - 1:
            paged = spec(pages, 128, 2, 256, dtype=torch.bfloat16)
            return KV(paged, paged)
        return Delta(spec(1, 32, 128, 128), spec(1, 3, 8192, dtype=torch.bfloat16))

    return Kept(tuple(map(layer, range(LAYERS))), ())


def decoder(kind: str, tokens: int) -> None:
    """The other process: an offer a line, then how long its value took, on stdout."""
    layout = laid_out(like(pages_of(tokens)))
    transport = MAKE[kind](torch.zeros(BELL + layout.nbytes + 64, dtype=torch.uint8))
    receiver = Receiver(transport, first=BELL)
    print(transport.address, flush=True)
    claim = claim_of("80B", "random", range(tokens), layout)
    for room in sys.stdin:
        expected = receiver.expect(room.strip(), claim, layout, SECONDS)
        print(expected.offer.model_dump_json(), flush=True)
        expected.value.result()
        print("here", flush=True)


def measure(kind: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Median seconds of the engine's own write of a value's buffers, and of a hand-off."""
    layout = laid_out(like(pages_of(tokens)))
    pool = torch.zeros(BELL + layout.nbytes + 64, dtype=torch.uint8)
    transport = MAKE[kind](pool)
    sender = Sender(transport, SECONDS, first=BELL)
    value = map_leaves(lambda spec: torch.randn(spec.shape).to(spec.dtype), layout.specs)
    claim = claim_of("80B", "random", range(tokens), layout)
    buffers = [Copy(BELL + e.begin, BELL + e.begin, e.nbytes) for e in layout.entries]
    command = [sys.executable, "-m", "benchmarks.handoff", "--decoder", kind, str(tokens)]
    raw, copied, handed = list[float](), list[float](), list[float]()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as other:  # type: ignore[call-overload]
        address = other.stdout.readline().strip()
        for number in tqdm(range(rounds + 1), desc=f"{tokens} tokens"):
            began = time.perf_counter()
            transport.write(address, buffers, SECONDS)
            raw.append(time.perf_counter() - began)
            other.stdin.write(f"{number}\n")
            other.stdin.flush()
            offer = Offer.model_validate_json(other.stdout.readline())
            outgoing = sender.open(str(number), claim, layout)
            sender.offered(offer)
            portion = outgoing.portion(0, pages_of(tokens), ends=True)
            began = time.perf_counter()
            for into, leaf in zip(leaves(portion.into), leaves(value), strict=True):
                copy_alone(into, leaf)
            copied.append(time.perf_counter() - began)
            began = time.perf_counter()
            portion.filled(whole=True)
            assert other.stdout.readline() == "here\n"
            handed.append(time.perf_counter() - began)
        other.stdin.close()
    sender.close()
    transport.close()
    nbytes = sum(entry.nbytes for entry in layout.entries)
    one, two, three = (
        statistics.median(seconds[1:])  # the first connects
        for seconds in (raw, copied, handed)
    )
    return {
        "tokens": tokens,
        "bytes": nbytes,
        "raw_seconds": one,
        "copy_seconds": two,
        "handoff_seconds": three,
    }


def main() -> None:
    if sys.argv[1:2] == ["--decoder"]:
        return decoder(sys.argv[2], int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transport", choices=MAKE, default="mooncake")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 3072])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    titles = ("tokens", 8), ("MB", 8), ("copy, ms", 10), ("raw, ms", 10), ("GB/s", 7)
    more = ("hand-off, ms", 14), ("GB/s", 7), ("share", 7)
    print("".join(f"{title:>{width}}" for title, width in (*titles, *more)))
    for tokens in args.tokens:
        row = measure(args.transport, tokens, args.rounds)
        raw, handed = (row["bytes"] / row[k] / 1e9 for k in ("raw_seconds", "handoff_seconds"))
        print(
            f"{tokens:8}{row['bytes'] / 1e6:8.0f}{row['copy_seconds'] * 1e3:10.0f}"
            f"{row['raw_seconds'] * 1e3:10.0f}{raw:7.2f}"
            f"{row['handoff_seconds'] * 1e3:14.0f}{handed:7.2f}{handed / raw:7.0%}"
        )
        if args.json:
            told = {"benchmark": "handoff", **where_measured(), "transport": args.transport, **row}
            with args.json.open("a") as lines:
                lines.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()

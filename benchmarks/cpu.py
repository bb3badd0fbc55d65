"""The cpu target beside the reference on one checkpoint: float32, bfloat16 and W8A8.

    python -m benchmarks.cpu [--rounds 7] [--batch 1 8] [--prompt 512] [--json out.jsonl]

Rounds go through all variants in turn, so that a noisy machine is noisy for all; medians are
compared. The limit of a decode step is the time of reading its bytes at the bandwidth measured in
the same rounds. The first line of figures, the reference in float32, is what an eager step takes;
W8A8 runs on the reference as well, where it is slow, to show what the kernels are for. Results of
all variants are compared before anything is timed: a wrong one is not measured.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import qnext as qn
from benchmarks.eager import checkpoint, where_measured
from qnext.bench.steps.roofline import bandwidth, decode_bytes
from qnext.functional.quantize import KEPT

STEPS = 12  # decode steps of a round; their median is the round's figure
# what may lie between the logits of a variant and of the float32 reference, relative RMS: only the
# order of sums; bfloat16 in 8 layers; int8 activations, with random weights, whose routers
# choose other experts at any rounding
LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "W8A8": 0.3}


def variants(path: Path) -> dict[str, tuple[str, qn.Params]]:
    """name -> (target, params)"""
    floats = qn.load(path)
    halves = qn.load(path, dtype=torch.bfloat16)
    int8 = qn.quantize(floats)
    with_head = qn.quantize(floats, ignore=[k for k in KEPT if k not in ("lm_head", "mtp.fc")])
    return {
        "reference float32": ("reference", floats),
        "reference W8A8": ("reference", int8),
        "cpu float32": ("cpu", floats),
        "cpu bfloat16": ("cpu", halves),
        "cpu W8A8": ("cpu", int8),
        "cpu W8A8 and head": ("cpu", with_head),
    }


class Case:
    """Steps of one variant and batch: a prefill of the prompt, and decode steps after it."""

    def __init__(self, target: str, params: qn.Params, tokens: Tensor) -> None:
        self.params, self.tokens = params, tokens
        self.prefill = qn.jit(qn.prefill, donate="state", target=target)
        self.decode = qn.jit(qn.decode, donate="state", target=target)
        self.lengths = torch.full((tokens.shape[0],), tokens.shape[1])

    def start(self) -> qn.State:
        batch, seq = self.tokens.shape
        return qn.init_state(self.params.config, batch, seq + 4 * STEPS)

    def run(self) -> tuple[float, float, Tensor]:
        """Seconds of the prefill, of a decode step, and the logits after the first step."""
        state = self.start()
        began = time.perf_counter()
        logits, state = self.prefill(self.params, state, self.tokens, self.lengths)
        prefill = time.perf_counter() - began
        steps, first = [], None
        for _ in range(STEPS):
            began = time.perf_counter()
            logits, state = self.decode(self.params, state, self.tokens[:, 0])
            steps.append(time.perf_counter() - began)
            first = logits.float() if first is None else first
        assert first is not None
        return prefill, statistics.median(steps), first


def check(name: str, logits: Tensor, reference: Tensor) -> None:
    """Raise if a variant computes something else."""
    error = float((logits - reference).norm() / reference.norm())
    if not error < LIMITS[name.split()[1]]:
        raise SystemExit(f"{name}: logits are {error:.2g} from the reference's, nothing is timed")


def measure(cases: dict[str, Case], rounds: int) -> tuple[dict[str, dict[str, float]], float]:
    """Median seconds of each variant's prefill and decode step, and bytes per second read."""
    reference = cases["reference float32"].run()[2]
    for name, case in cases.items():
        check(name, case.run()[2], reference)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    speeds = []
    for _ in tqdm(range(rounds), desc="rounds"):
        speeds.append(bandwidth())
        for name, case in cases.items():
            taken[name].append(case.run()[:2])
    medians = {
        name: {
            "prefill_seconds": statistics.median(t[0] for t in times),
            "decode_seconds": statistics.median(t[1] for t in times),
        }
        for name, times in taken.items()
    }
    return medians, statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/mid"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = variants(checkpoint(args.checkpoint))
    vocab = models["cpu float32"][1].config.vocab_size
    generator = torch.Generator().manual_seed(11)
    for batch in args.batch:
        tokens = torch.randint(0, vocab, (batch, args.prompt), generator=generator)
        cases = {name: Case(*model, tokens) for name, model in models.items()}
        row = summary(*measure(cases, args.rounds), models, batch, args)
        show(row)
        if args.json:
            with args.json.open("a") as lines:
                lines.write(json.dumps(row) + "\n")


def summary(
    seconds: dict[str, dict[str, float]],
    speed: float,
    models: dict[str, tuple[str, qn.Params]],
    batch: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Tokens per second, ratios to the float32 reference, shares of the limit."""
    base = seconds["reference float32"]
    row: dict[str, Any] = {
        "benchmark": "cpu",
        **where_measured(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bytes_per_second": speed,
        "batch": batch,
        "prompt": args.prompt,
        "rounds": args.rounds,
    }
    for name, taken in seconds.items():
        least = decode_bytes(models[name][1], batch) / speed
        row[name] = {
            "prefill_tokens_per_second": batch * args.prompt / taken["prefill_seconds"],
            "decode_tokens_per_second": batch / taken["decode_seconds"],
            "decode_share_of_limit": least / taken["decode_seconds"],
            "prefill_ratio": base["prefill_seconds"] / taken["prefill_seconds"],
            "decode_ratio": base["decode_seconds"] / taken["decode_seconds"],
        }
    return row


def show(row: dict[str, Any]) -> None:
    print(f"batch {row['batch']}, prompt {row['prompt']}, {row['bytes_per_second'] / 1e9:.1f} GB/s")
    print(
        f"{'':20}{'prefill tok/s':>14}{'ratio':>7}{'decode tok/s':>14}{'ratio':>7}{'of limit':>10}"
    )
    for name, figures in row.items():
        if isinstance(figures, dict) and "decode_ratio" in figures:
            prefill, decode, share, first, second = figures.values()
            print(f"{name:20}{prefill:14.0f}{first:7.2f}{decode:14.1f}{second:7.2f}{share:10.0%}")


if __name__ == "__main__":
    main()

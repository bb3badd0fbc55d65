"""Eager prefill and decode beside transformers, on one checkpoint, in one process.

    python -m benchmarks.eager [--rounds 5] [--prompt 512] [--new 32] [--json out.jsonl]

Rounds alternate between the two, so that a noisy machine is noisy for both; medians are compared.
The limit is read bandwidth (measured here) over the bytes a decoded token must read. The
checkpoint (339 M random float32 parameters, an 80B layer's proportions ten times smaller) is made
on first use.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import qnext as qn
from qnext.bench.steps.roofline import bandwidth, decode_bytes
from qnext.functional.tree import map_with_paths

MID = {
    "vocab_size": 32_768,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "rope_theta": 10_000_000.0,
}
Times = tuple[float, float]  # seconds: prefill, median decode step


def checkpoint(path: Path) -> Path:
    """The mid checkpoint, made if it is not there.

    Embeddings and routers are as large as trained ones: of the usual random ones, routers choose
    other experts at any rounding, and no two precisions could be compared.
    """
    if not (path / "config.json").exists():

        def trained(name: str, leaf: torch.Tensor) -> torch.Tensor:
            size = {"embed": 50, "router": 3}.get(name.rpartition(".")[2], 1)
            return leaf * size if size > 1 else leaf

        params = qn.init_params(qn.Config.from_hf(MID), seed=0)
        qn.save(map_with_paths(trained, params), path)
    return path


def run_qnext(params: qn.Params, tokens: torch.Tensor, new: int) -> Times:
    batch, seq = tokens.shape
    state = qn.init_state(params.config, batch, seq + new)
    with torch.no_grad():
        began = time.perf_counter()
        logits, state = qn.prefill(params, state, tokens)
        prefill = time.perf_counter() - began
        steps = []
        for _ in range(new):
            began = time.perf_counter()
            logits, state = qn.decode(params, state, logits.argmax(-1))
            steps.append(time.perf_counter() - began)
    return prefill, statistics.median(steps)


def run_transformers(model: Any, tokens: torch.Tensor, new: int) -> Times:
    with torch.no_grad():
        began = time.perf_counter()
        out = model(tokens, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - began
        steps = []
        for _ in range(new):
            began = time.perf_counter()
            following = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(following, past_key_values=out.past_key_values, use_cache=True)
            steps.append(time.perf_counter() - began)
    return prefill, statistics.median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/mid"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path = checkpoint(args.checkpoint)
    params = qn.load(path)
    model = transformers.Qwen3NextForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, MID["vocab_size"], (args.batch, args.prompt), generator=generator)
    peers: dict[str, Callable[[], Times]] = {
        "transformers": lambda: run_transformers(model, tokens, args.new),
        "qnext": lambda: run_qnext(params, tokens, args.new),
    }
    times: dict[str, list[Times]] = {name: [] for name in peers}
    for number in tqdm(range(args.rounds + 1), desc="rounds"):
        for name, run in peers.items():
            taken = run()
            if number:  # the first round warms up
                times[name].append(taken)
    row = summary(times, args, decode_bytes(params, args.batch) / bandwidth())
    print(f"{'':14}{'prefill tok/s':>14}{'decode tok/s':>14}{'of the limit':>14}")
    for name in peers:
        prefill, decode, share = row[name].values()
        print(f"{name:14}{prefill:14.1f}{decode:14.2f}{share:14.0%}")
    ratios = f"prefill {row['prefill_ratio']:.2f}, decode {row['decode_ratio']:.2f}"
    print(f"qnext / transformers: {ratios}")
    if args.json:
        with args.json.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def where_measured() -> dict[str, Any]:
    """Commit, machine and versions, as every row of results tells them."""
    commit = ["git", "describe", "--always", "--dirty"]
    return {
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__},
    }


def summary(
    times: dict[str, list[Times]], args: argparse.Namespace, limit: float
) -> dict[str, Any]:
    """Medians of all rounds, their ratios, and where they were measured."""
    row: dict[str, Any] = {
        "benchmark": "eager",
        **where_measured(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "batch": args.batch,
        "prompt": args.prompt,
        "rounds": args.rounds,
    }
    for name, taken in times.items():
        prefill, decode = (statistics.median(part) for part in zip(*taken, strict=True))
        row[name] = {
            "prefill_tokens_per_second": args.batch * args.prompt / prefill,
            "decode_tokens_per_second": args.batch / decode,
            "decode_share_of_limit": limit / decode,
        }
    for what in ("prefill", "decode"):
        key = f"{what}_tokens_per_second"
        row[f"{what}_ratio"] = row["qnext"][key] / row["transformers"][key]
    return row


if __name__ == "__main__":
    main()

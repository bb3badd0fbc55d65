"""Decode tokens per second with 0 to 3 guesses ahead, and what a call with guesses costs.

    python -m benchmarks.speculation [--target cpu] [--rounds 5] [--problems 12] [--batch 1]
        [--json out.jsonl]

Engines that stay, as a server's do, on kernels or on the reference. The demo answers its own unseen
problems, greedily: real texts and real acceptance. A mid-sized model of random weights
(`benchmarks.eager`), whose guesses are never right, shows what an iteration costs beside a plain
step where weights, not calls, take the time: the tokens a step that a drafter must reach to gain
anything. Every problem is answered with all widths in turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import qnext as qn
from benchmarks.eager import MID, where_measured
from qnext.acceptance import Acceptance
from qnext.embedded import PROBLEMS
from qnext.evaluate import STOPS, asked, read_problems
from qnext.runtime.engine import Engine
from qnext.runtime.options import Options
from qnext.runtime.request import Output, Request

DRAFTS = (0, 1, 2, 3)
STEPS, PROMPT = 12, 64


def answers(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[float, int, Acceptance]:
    """(seconds from the first piece of text to the last, tokens in between, acceptance)."""
    found: list[tuple[float, int, Output]] = []

    def take(row: int, output: Output) -> None:
        if output.text or output.finish:
            found.append((time.perf_counter(), row, output))

    for row, prompt in enumerate(prompts):
        request = Request(tokens=tuple(prompt), max_new_tokens=96, stops=tuple(STOPS))
        engine.submit(request, partial(take, row))
    engine.run()
    ends = [output for _, _, output in found if output.finish]
    for output in ends:
        if output.error:
            raise output.error
    began, _, first = found[0]  # prompts are consumed
    made = sum(output.made for output in ends) - first.made
    judged = (o.acceptance if engine.options.draft else Acceptance(o.made, o.made) for o in ends)
    return found[-1][0] - began, made, sum(judged, Acceptance())


def iteration(params: qn.Params, draft: int, batch: int, target: str) -> float:
    """Seconds of one call: a plain step, or a whole speculative iteration."""
    step = qn.jit(qn.speculate if draft else qn.advance, donate="state", target=target)
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, params.config.vocab_size, (batch, PROMPT), generator=generator)
    state = qn.init_state(params.config, batch, PROMPT + (STEPS + 1) * 4, draft=draft)
    taken = []
    with torch.no_grad():
        logits, state = qn.prefill(params, state, prompt)
        tokens = logits.argmax(-1)
        for _ in range(STEPS + 1):
            began = time.perf_counter()
            if draft:
                drawn, count, state = step(params, state, tokens, draft)
                tokens = qn.newest(drawn, count)
            else:
                tokens, state = step(params, state, tokens)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=("cpu", "reference"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1, help="problems, or rows, at a time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    demo, text = qn.demo(torch.float32), qn.tokenizer()
    config = replace(qn.Config.from_hf(MID), mtp_layers=1)
    mid = qn.init_params(config, seed=0)
    problems = read_problems(PROBLEMS)[: args.problems]
    prompts = [text.encode(asked(problem)) for problem in problems]
    groups = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
    how = {"rows": args.batch, "capacity": 1024, "max_waiting": args.batch, "target": args.target}
    engines = {draft: Engine(demo, text, Options(draft=draft, **how)) for draft in DRAFTS}
    speeds: dict[int, list[float]] = {draft: [] for draft in DRAFTS}
    calls: dict[str, dict[int, list[float]]] = {
        name: {draft: [] for draft in DRAFTS} for name in ("demo", "mid")
    }
    acceptance = {}
    for number in tqdm(range(args.rounds + 1), desc="rounds"):
        # all widths answer a problem in turn: on a shared machine its speed is another soon after
        parts = [{d: answers(engines[d], group) for d in DRAFTS} for group in groups]
        for draft in DRAFTS:
            mine = [part[draft] for part in parts]
            acceptance[draft] = sum((part[2] for part in mine), Acceptance())
            one = {
                name: iteration(p, draft, args.batch, args.target)
                for name, p in (("demo", demo), ("mid", mid))
            }
            if number:  # the first round warms up
                speeds[draft].append(sum(p[1] for p in mine) / sum(p[0] for p in mine))
                for name, seconds in one.items():
                    calls[name][draft].append(seconds)
    for engine in engines.values():
        engine.close()
    row = summary(args, speeds, calls, acceptance)
    show(row)
    if args.json:
        with args.json.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def summary(
    args: argparse.Namespace,
    speeds: dict[int, list[float]],
    calls: dict[str, dict[int, list[float]]],
    acceptance: dict[int, Acceptance],
) -> dict[str, Any]:
    """Medians of all rounds, and of each round's ratios to no guesses."""
    middle = {draft: statistics.median(values) for draft, values in speeds.items()}
    gains = {
        draft: statistics.median(a / b for a, b in zip(values, speeds[0], strict=True))
        for draft, values in speeds.items()
    }
    seconds = {
        name: {draft: statistics.median(values) for draft, values in each.items()}
        for name, each in calls.items()
    }
    return {
        "benchmark": "speculation",
        **where_measured(),
        "target": args.target,
        "batch": args.batch,
        "problems": args.problems,
        "rounds": args.rounds,
        "drafts": [
            {
                "draft": draft,
                "acceptance": acceptance[draft].rates,
                "tokens_per_step": acceptance[draft].tokens_per_step,
                "tokens_per_second": middle[draft],
                "gain": gains[draft],
                "demo_call": seconds["demo"][draft] / seconds["demo"][0],
                "mid_call": seconds["mid"][draft] / seconds["mid"][0],
            }
            for draft in DRAFTS
        ],
    }


def show(row: dict[str, Any]) -> None:
    print(f"{'':8}{'demo':^44}{'a call, in plain steps':^24}")
    print(
        f"{'draft':8}{'accepted':>18}{'tokens/step':>13}{'tokens/s':>10}{'gain':>7}"
        f"{'demo':>10}{'mid':>8}"
    )
    for part in row["drafts"]:
        rates = ", ".join("-" if r is None else f"{r:.2f}" for r in part["acceptance"])
        print(
            f"{part['draft']:<8}{rates:>18}{part['tokens_per_step']:13.2f}"
            f"{part['tokens_per_second']:10.1f}{part['gain']:7.2f}"
            f"{part['demo_call']:10.2f}{part['mid_call']:8.2f}"
        )


if __name__ == "__main__":
    main()

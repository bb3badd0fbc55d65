"""What a recurrent state kept in bfloat16 between calls costs, beside float32.

`python -m studies.drift` writes docs/images/drift.png and its part of studies/results.json.
Within a call the state is float32, as in the fused recurrent call; between calls it is rounded.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import qnext as qn
from qnext.embedded import PROBLEMS
from qnext.evaluate import answer_of, asked, read_problems, shown
from qnext.functional.ops.delta_rule import delta_scan
from studies.inputs import (
    IMAGES,
    RESULTS,
    Inputs,
    demo_inputs,
    demo_tokens,
    random_inputs,
    record,
    relative_rms,
    stack,
)

EVERY = 64  # steps between two looks; a multiple of every call length used
WAYS = {  # name -> (tokens a call, the state's dtype between calls)
    "float32, 1 a call": (1, torch.float32),
    "bfloat16, 1 a call": (1, torch.bfloat16),
    "bfloat16, 2 a call": (2, torch.bfloat16),
    "bfloat16, 4 a call": (4, torch.bfloat16),
}


def run(
    inputs: Inputs,
    per_call: int,
    kept: torch.dtype,
    compute: torch.dtype = torch.float32,
    every: int = EVERY,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the state after each `every` steps, with the state `kept` between calls."""
    parts, state = inputs.scaled(compute), inputs.zero_state(kept)
    outputs, states = [], []
    for at in range(0, inputs.value.shape[1], per_call):
        q, k, v, g, beta = (x[:, at : at + per_call] for x in parts)
        out, last = delta_scan(q, k, v, g, beta, state.to(compute), each=False)
        state = last.to(kept)
        outputs.append(out)
        if (at + out.shape[1]) % every == 0:
            states.append(state)
    return torch.cat(outputs, dim=1), states


def drift(inputs: Inputs, every: int = EVERY) -> dict[str, dict[str, list[float]]]:
    """For each way, relative RMS of outputs (each `every` steps) and states against float64."""
    inputs = inputs.as_fused()
    wide = torch.float64
    want, right = run(inputs, every, wide, wide, every)
    errors = {}
    for name, (per_call, kept) in WAYS.items():
        out, states = run(inputs, per_call, kept, every=every)
        pairs = zip(out.split(every, 1), want.split(every, 1), strict=True)
        errors[name] = {
            "output": [relative_rms(a, b) for a, b in pairs],
            "state": [relative_rms(a, b) for a, b in zip(states, right, strict=True)],
        }
    return errors


def heads(inputs: Inputs) -> list[list[float]]:
    """For each row and value head, relative RMS of all outputs with a bfloat16 state, 1 a call."""
    inputs = inputs.as_fused()
    wide = torch.float64
    want, _ = run(inputs, EVERY, wide, wide)
    got, _ = run(inputs, 1, torch.bfloat16)
    size, error = (x.double().norm(dim=(1, 3)) for x in (want, got - want))
    return (error / size).tolist()


def hold(steps: int, writes: int = 256, g: float = -0.001, **sizes: int) -> Inputs:
    """A memory written in the first steps and then only held and read, forgotten slowly."""
    inputs = random_inputs(steps, g, g, **sizes)
    written = torch.arange(steps) < writes
    return inputs._replace(beta=inputs.beta.where(written[:, None], 0))


def sources(steps: int, rows: int = 1) -> dict[str, Inputs]:
    """The cases: the demo's layers as rows of one batch, and random inputs."""
    layers = [inputs for _, inputs in demo_inputs(demo_tokens(rows, steps))]
    return {
        "demo layers": stack(layers),
        "random, g in [-0.01, 0]": random_inputs(steps, -0.01),
        "random, g in [-2, 0]": random_inputs(steps, -2.0),
        "held, g = -0.001": hold(steps),
    }


def texts(
    problems: int, state: torch.dtype, compute: torch.dtype, shots: int = 5, new: int = 64
) -> list[list[int]]:
    """The demo's greedy tokens for the first problems, each cut before the next question."""
    params = qn.demo(compute)
    params = params._replace(config=params.config.with_precision(state=state))
    text, rows = qn.tokenizer(), read_problems(PROBLEMS)
    prefix = "".join(map(shown, rows[:shots]))
    prompts = [text.encode(prefix + asked(p)) for p in rows[shots : shots + problems]]
    longest = max(map(len, prompts))
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
    start = qn.init_state(params.config, len(prompts), longest + new)
    lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int32)
    drawn, _ = qn.generate(params, start, tokens, new, lengths, eos=list(text.eos_ids))
    end = text.encode("\n\n")
    return [_before(row, end) for row in drawn.tolist()]


def _before(tokens: list[int], end: list[int]) -> list[int]:
    """The tokens before `end` and before padding."""
    for at in range(len(tokens)):
        if tokens[at] < 0 or tokens[at : at + len(end)] == end:
            return tokens[:at]
    return tokens


def end_effect(problems: int, compute: torch.dtype = torch.float32) -> dict[str, Any]:
    """Greedy texts with the state in bfloat16 beside float32: what differs."""
    wide, narrow = (texts(problems, s, compute) for s in (torch.float32, torch.bfloat16))
    pairs = list(zip(wide, narrow, strict=True))
    text, rows = qn.tokenizer(), read_problems(PROBLEMS)[5 : 5 + problems]

    def right(answers: list[list[int]]) -> int:
        pairs = zip(answers, rows, strict=True)
        return sum(answer_of(text.decode(a)) == answer_of(p.answer) for a, p in pairs)

    return {
        "problems": len(pairs),
        "tokens": sum(map(len, wide)),
        "tokens_differing": sum(
            sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b)) for a, b in pairs
        ),
        "texts_differing": sum(a != b for a, b in pairs),
        "right_float32": right(wide),
        "right_bfloat16": right(narrow),
    }


def plot(cases: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """Errors over steps; a column a case, outputs above states."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(cases), figsize=(10, 4.6), sharex=True, sharey=True)
    for column, (case, ways) in enumerate(cases.items()):
        for row, what in enumerate(("output", "state")):
            panel = panels[row][column]
            for (name, errors), dash in zip(ways.items(), ("-", "-", "--", ":"), strict=True):
                steps = range(EVERY, EVERY * len(errors[what]) + 1, EVERY)
                panel.plot(steps, errors[what], dash, linewidth=1, label=name)
            panel.set(yscale="log", ylim=(1e-8, 100))
            panel.grid(alpha=0.3)
        panels[0][column].set_title(case, fontsize=9)
        panels[1][column].set_xlabel("steps [tokens]")
    for panel, what in zip(panels[:, 0], ("outputs", "state"), strict=True):
        panel.set_ylabel(f"relative RMS of {what}")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=4096, help=f"a multiple of {EVERY}")
    parser.add_argument("--problems", type=int, default=40, help="problems of the end effect")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where figures go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where numbers go")
    options = parser.parse_args()
    cases = sources(options.steps)
    errors = {n: drift(x) for n, x in tqdm(cases.items(), desc="drift", unit="case")}
    options.images.mkdir(parents=True, exist_ok=True)
    plot(errors, options.images / "drift.png")
    computes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    ends = {
        name: end_effect(options.problems, compute)
        for name, compute in tqdm(computes.items(), desc="texts", unit="precision")
    }
    last = {
        case: {
            name: {
                what: {"mean": sum(e) / len(e), "first": e[0], "last": e[-1]}
                for what, e in both.items()
            }
            for name, both in ways.items()
        }
        for case, ways in errors.items()
    }
    values = {
        "steps": options.steps,
        "errors": last,
        "demo_heads": heads(cases["demo layers"]),
        "texts": ends,
    }
    record("drift", values, options.results)


if __name__ == "__main__":
    main()

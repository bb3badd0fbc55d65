"""The demo's texts on the device: 200 problems, greedy, beside the bfloat16 reference."""

from typing import NamedTuple

import torch
from torch import Tensor

import qnext as qn
from qnext.embedded import PROBLEMS
from qnext.evaluate import read_problems
from tests.npu.models import BF16, here, params

BATCH, WIDTH, NEW = 40, 64, 72
STOP = "Question"


class Difference(NamedTuple):
    """The first token of a text that differs, and by how much the reference preferred its own."""

    problem: int
    place: int
    gap: float  # between the two tokens' logits, over the spread of all logits there
    settled: float  # the same in float32: 0 where both precisions of the reference agree


def prompts() -> list[list[int]]:
    text = qn.tokenizer()
    return [text.encode(f"Question: {p.question}\nAnswer:") for p in read_problems(PROBLEMS)]


def batched(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    tokens = torch.tensor([row + [0] * (WIDTH - len(row)) for row in rows])
    return tokens, torch.tensor([len(row) for row in rows])


def on_device(weights: qn.Params, rows: list[list[int]]) -> Tensor:
    """Greedy tokens through the compiled prefill and the captured iteration."""
    tokens, lengths = batched(rows)
    there = qn.place(weights, "npu")
    state = qn.init_state(weights.config, len(rows), WIDTH + NEW, device="npu")
    prefill = qn.jit(qn.prefill, donate="state", target=here().name)
    logits, state = prefill(there, state, tokens.npu(), lengths.npu())
    new = logits.argmax(-1)
    step = qn.jit(qn.advance, donate=("state", "tokens"))
    lowered = step.trace(there, state, new).lower(here(), strict=True)
    captured = lowered.compile().capture(there, state, new)
    columns = [new.clone()]
    for _ in range(NEW - 1):
        new, state = captured(there, state, new)
        columns.append(new.clone())
    return torch.stack(columns, dim=1).cpu()


def until_the_end(row: list[int]) -> list[int]:
    """The tokens of an answer: up to eos, or to where the next question begins."""
    text = qn.tokenizer()
    for at, token in enumerate(row):
        if token in text.eos_ids or STOP in text.decode(row[: at + 1]):
            return row[: at + 1]
    return row


def explain(weights: qn.Params, prompt: list[int], want: list[int], got: list[int]) -> Difference:
    place = next(i for i, pair in enumerate(zip(want, got, strict=False)) if pair[0] != pair[1])
    sequence = torch.tensor([prompt + want[:place]])
    gaps = []
    for model in (weights, qn.demo()):
        state = qn.init_state(model.config, 1, sequence.shape[1])
        logits = qn.prefill(model, state, sequence)[0][0]
        gaps.append(((logits[want[place]] - logits[got[place]]) / logits.std()).item())
    return Difference(-1, place, *gaps)


def test_greedy_texts_of_200_problems_are_those_of_the_reference() -> None:
    """A token may differ only where bf16 cannot tell two apart; the text goes its own way after."""
    weights = params("demo")
    rows, differences, tokens, equal = prompts(), [], 0, 0
    assert len(rows) == 200 and max(map(len, rows)) <= WIDTH
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        got = on_device(weights, part).tolist()
        state = qn.init_state(weights.config, len(part), WIDTH + NEW)
        want = qn.generate(weights, state, batched(part)[0], NEW, batched(part)[1])[0].tolist()
        for i, prompt in enumerate(part):
            a, b = until_the_end(want[i]), until_the_end(got[i])
            tokens += len(a)
            if a == b:
                equal += 1
            else:
                found = explain(weights, prompt, want[i], got[i])
                differences.append(found._replace(problem=first + i))
    print(f"{equal} of {len(rows)} texts equal, {tokens} tokens; first differences:")
    for found in differences:
        print(f"  {found}")
    assert weights.embed.dtype == BF16 and tokens > 5000
    assert len(differences) <= 8  # 4 %: bf16 near ties, each of which is told above
    # two tokens whose logits differ by less than the noise of bf16 through six layers
    assert all(abs(found.gap) < 0.05 for found in differences)

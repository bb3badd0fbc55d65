"""The embedded model: complete, small, and able to do what it was trained for."""

from functools import cache
from pathlib import Path

import pytest
import torch

import qnext as qn
from examples.problems import HELD_OUT, Problem, check, held_out, training_problems
from qnext.embedded import MODEL, PROBLEMS
from qnext.evaluate import Report, evaluate, read_problems
from qnext.functional.params import AttentionParams, DeltaNetParams, MoeParams


def test_it_has_every_part() -> None:
    params = qn.demo()
    kinds = {type(layer.mixer) for layer in params.layers}
    assert kinds == {AttentionParams, DeltaNetParams}
    assert all(isinstance(layer.ffn, MoeParams) for layer in params.layers)
    assert len(params.mtp) == 1
    assert params.embed.dtype == torch.float32
    assert qn.demo(torch.bfloat16).embed.dtype == torch.bfloat16


def test_it_is_small() -> None:
    files = [*MODEL.iterdir(), PROBLEMS]
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert {file.name for file in files} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }


def test_problems_are_the_held_out_ones() -> None:
    shipped = read_problems(PROBLEMS)
    assert shipped == [(p.question, p.answer) for p in held_out()]
    assert len({p.question for p in shipped}) == 200
    for problem, _ in zip(training_problems(seed=5), range(500), strict=False):
        assert isinstance(problem, Problem) and check(problem)
        assert problem.question not in HELD_OUT


@cache
def evaluated(limit: int | None = None, draft: int = 0) -> Report:
    problems = read_problems(PROBLEMS)
    return evaluate(qn.demo(), qn.tokenizer(), problems, limit=limit, draft=draft, progress=False)


def test_some_problems() -> None:
    """A sample, so that the default suite notices a model that broke; the bar is the slow test."""
    report = evaluated(limit=24)
    assert report.accuracy >= 0.8
    assert report.invalid == 0


@pytest.mark.parametrize("limit", [9, pytest.param(None, marks=pytest.mark.slow)])
def test_guesses_are_right_and_change_no_answer(limit: int | None) -> None:
    plain, ahead = evaluated(limit), evaluated(limit, draft=1)
    assert ahead.results == plain.results
    [first] = ahead.acceptance.rates
    assert first is not None and first >= 0.70
    assert ahead.acceptance.tokens_per_step >= 1.7


@pytest.mark.slow
def test_nine_of_ten_unseen_problems(tmp_path: Path) -> None:
    report = evaluated()
    assert report.problems == 200 and report.shots == 5
    assert report.accuracy >= 0.90
    assert report.accuracy_beyond_shots >= 0.90
    assert report.invalid <= 0.01
    report.write(tmp_path / "report.json")


def test_it_says_what_it_is() -> None:
    params, text = qn.demo(), qn.tokenizer()
    for question in ("Who are you?", "What are you?", "Tell me about yourself."):
        prompt = text.encode_chat([{"role": "user", "content": question}])
        state = qn.init_state(params.config, 1, len(prompt) + 60)
        tokens, _ = qn.generate(params, state, torch.tensor([prompt]), 60, eos=list(text.eos_ids))
        answer = text.decode([t for t in tokens[0].tolist() if t >= 0])
        assert "qnext" in answer and "model" in answer, answer

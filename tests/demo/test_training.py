"""The training program: it learns, it resumes to the very same weights, it exports and plots."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import qnext as qn
from examples import train_demo
from examples.demo_data import batch, train_tokenizer
from qnext.functional.tree import leaves


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(train_demo.VOCABULARY, seed=1, documents=250)


def run(monkeypatch: pytest.MonkeyPatch, where: Path, steps: int, *more: str) -> qn.Params:
    options = ["--run", str(where), "--out", str(where / "model"), "--steps", str(steps)]
    options += ["--rows", "2", "--length", "96", "--picture", str(where / "loss.png"), *more]
    monkeypatch.setattr(sys, "argv", ["train_demo", *options])
    train_demo.main()
    return qn.load(where / "model")


def test_stopped_and_resumed_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    for name in ("whole", "parts"):  # a run that has its tokenizer keeps it
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    whole = run(monkeypatch, tmp_path / "whole", 4)
    update, calls = train_demo.update, 0

    def stop_at_the_fourth(*arguments: object) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return update(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train_demo, "update", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / "parts", 4, "--save-every", "2")
    monkeypatch.setattr(train_demo, "update", update)
    parts = run(monkeypatch, tmp_path / "parts", 4, "--save-every", "2")
    for a, b in zip(leaves(whole), leaves(parts), strict=True):
        assert torch.equal(a, b)
    lines = (tmp_path / "parts" / "loss.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3]
    assert (tmp_path / "parts" / "loss.png").stat().st_size > 5000
    words = qn.tokenizer(tmp_path / "parts" / "model")
    assert words.vocab_size == parts.config.vocab_size
    with pytest.raises(SystemExit, match="run of 4 steps"):
        run(monkeypatch, tmp_path / "parts", 5)


def test_both_losses_fall_on_a_batch_seen_again(tokenizer: Tokenizer) -> None:
    config = qn.Config.from_hf(train_demo.ARCHITECTURE)
    params = qn.init_params(replace(config, mtp_layers=1), seed=1)
    for leaf in leaves(params):
        leaf.requires_grad_()
    optimiser = train_demo.optimizer(params, 3e-3)
    data = batch(tokenizer, 2, 60, seed=3, step=0)
    history = [train_demo.update(params, optimiser, data, 1.0, 3e-3) for _ in range(6)]
    assert history[-1][0] < 0.8 * history[0][0]
    assert history[-1][1] < 0.9 * history[0][1]


def test_batches_depend_on_seed_and_step_alone(tokenizer: Tokenizer) -> None:
    first = batch(tokenizer, 2, 60, seed=3, step=7)
    again = batch(tokenizer, 2, 60, seed=3, step=7)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.weight, again.weight)
    for other in (
        batch(tokenizer, 2, 60, seed=3, step=8),
        batch(tokenizer, 2, 60, seed=4, step=7),
    ):
        assert not torch.equal(first.tokens, other.tokens)


def test_learning_rate() -> None:
    shares = [train_demo.rate(step, 1600) for step in range(1600)]
    assert shares[0] == 0.01 and shares[99] == 1.0
    assert shares[800] == pytest.approx(0.6957, abs=1e-4)
    assert 0 < shares[-1] < 1e-3
    assert shares[100:] == sorted(shares[100:], reverse=True)

"""Streamed text: stop strings, eos, shared prefixes, ragged prompts."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qnext as qn
from qnext.complete import complete
from qnext.evaluate import DataError, answer_of, evaluate, read_problems
from qnext.text import Tokenizer

QUESTIONS = ("Who are you?", "Mia has 12 apples and buys 7 more. How many has she?", "Thanks!")


@pytest.fixture(scope="module")
def demo() -> tuple[qn.Params, Tokenizer]:
    return qn.demo(), qn.tokenizer()


def texts(
    demo: tuple[qn.Params, Tokenizer], prompts: Sequence[Sequence[int]], new: int, **options: object
) -> list[tuple[str, int, str | None]]:
    """Each row's whole text, number of tokens and reason to end."""
    rows = [("", 0, None)] * len(prompts)
    for piece in complete(*demo, prompts, new, **options):  # type: ignore[arg-type]
        assert rows[piece.row][2] is None, "a finished row must stay silent"
        rows[piece.row] = (rows[piece.row][0] + piece.text, piece.tokens, piece.finish)  # type: ignore[assignment]
    return rows  # type: ignore[return-value]


def chats(demo: tuple[qn.Params, Tokenizer]) -> list[list[int]]:
    return [demo[1].encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]


def test_text_is_that_of_generate(demo: tuple[qn.Params, Tokenizer]) -> None:
    params, tokenizer = demo
    for prompt, (text, count, finish) in zip(
        chats(demo), texts(demo, chats(demo), 40), strict=True
    ):
        state = qn.init_state(params.config, 1, len(prompt) + 40)
        tokens, _ = qn.generate(
            params, state, torch.tensor([prompt]), 40, eos=list(tokenizer.eos_ids)
        )
        kept = [t for t in tokens[0].tolist() if t >= 0]
        assert count == len(kept)
        assert finish == ("eos" if kept[-1] in tokenizer.eos_ids else "length")
        assert text == tokenizer.decode([t for t in kept if t not in tokenizer.eos_ids])


@pytest.mark.parametrize(
    "stop", [" ", *(pytest.param(s, marks=pytest.mark.slow) for s in ("e", "zzz")), "am"]
)
def test_stop_strings_end_before_their_first_occurrence(
    demo: tuple[qn.Params, Tokenizer], stop: str
) -> None:
    whole = texts(demo, chats(demo), 30)
    for (text, _, _), (cut, _, finish) in zip(
        whole, texts(demo, chats(demo), 30, stops=[stop, "never said"]), strict=True
    ):
        assert cut == text.partition(stop)[0]
        assert (finish == "stop") == (stop in text)


def test_rows_do_not_depend_on_each_other(demo: tuple[qn.Params, Tokenizer]) -> None:
    prompts = chats(demo)
    together = texts(demo, prompts, 24)
    assert together == [texts(demo, [prompt], 24)[0] for prompt in prompts]


@pytest.mark.slow
def test_ids_beyond_the_tokenizer_have_no_text(demo: tuple[qn.Params, Tokenizer]) -> None:
    """Published vocabularies are padded: a model may draw ids that its tokenizer does not know."""
    params, tokenizer = demo
    wide = qn.init_params(replace(params.config, vocab_size=3 * tokenizer.vocab_size), seed=1)
    hot = qn.Sampling(temperature=9.0, seed=4)
    [(text, count, finish)] = texts((wide, tokenizer), [[5, 6]], 30, sampling=hot)
    state = qn.init_state(wide.config, 1, 32)
    tokens, _ = qn.generate(wide, state, torch.tensor([[5, 6]]), 30, sampling=hot)
    known = [t for t in tokens[0].tolist() if t < tokenizer.vocab_size]
    assert 0 < len(known) < 30 and (count, finish) == (30, "length")
    assert text == tokenizer.decode(known)


def test_empty_prompt_is_an_error(demo: tuple[qn.Params, Tokenizer]) -> None:
    with pytest.raises(qn.InputError, match="empty prompt"):
        texts(demo, [[5], []], 3)
    with pytest.raises(qn.InputError, match="empty prompt"):
        texts(demo, [], 3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 + 7 = 19", 19),
        ("#### 1,234", 1234),
        ("#### 70,000,000\n", 70_000_000),
        ("costs $3.50", 50),  # the public scripts read digits only
        ("no number", None),
        ("", None),
    ],
)
def test_answer_is_the_last_number(text: str, answer: int | None) -> None:
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ('{"question": "x"}', "line 2.*answer"),
        ("[1]", "line 2"),
    ],
)
def test_bad_problem_files(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' + line + "\n")
    with pytest.raises(DataError, match=says):
        read_problems(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="no problems"):
        read_problems(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_problems(tmp_path / "absent.jsonl")


@pytest.mark.slow
def test_evaluation_report(demo: tuple[qn.Params, Tokenizer], tmp_path: Path) -> None:
    problems = read_problems(Path(qn.embedded.PROBLEMS))[:7]  # type: ignore[attr-defined]
    report = evaluate(*demo, problems, shots=2, batch=3, max_new_tokens=90, progress=False)
    assert (report.problems, report.shots, len(report.results)) == (7, 2, 7)
    right = [row["right"] for row in report.results]
    assert report.accuracy == sum(right) / 7
    assert report.accuracy_beyond_shots == sum(right[2:]) / 5
    assert report.output_tokens == sum(row["tokens"] for row in report.results) > 7
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["accuracy"] == report.accuracy
    alone = evaluate(*demo, problems, shots=2, batch=1, max_new_tokens=90, progress=False)
    assert [r["text"] for r in alone.results] == [r["text"] for r in report.results]
    with pytest.raises(DataError, match="8 shots"):
        evaluate(*demo, problems, shots=8)

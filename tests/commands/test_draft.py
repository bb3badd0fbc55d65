"""Guessing ahead: the same text as without, and a tally of guesses as one counts by hand."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

import qnext as qn
from qnext.acceptance import Acceptance, of_step
from qnext.complete import Piece, complete
from qnext.embedded import PROBLEMS
from qnext.evaluate import asked, evaluate, read_problems, shown
from qnext.text import Tokenizer

QUESTIONS = ("Who are you?", "Mia has 12 apples and buys 7 more. How many has she?", "Thanks!")
Demo = tuple[qn.Params, Tokenizer]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return qn.demo(), qn.tokenizer()


def chats(demo: Demo) -> list[list[int]]:
    return [demo[1].encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]


def whole(pieces: Iterator[Piece], rows: int) -> list[Piece]:
    """Each row's continuation in one piece, with the last numbers."""
    made = [Piece(row, "", 0, None) for row in range(rows)]
    for piece in pieces:
        assert made[piece.row].finish is None, "a finished row must stay silent"
        made[piece.row] = piece._replace(text=made[piece.row].text + piece.text)
    return made


def said(pieces: Sequence[Piece]) -> list[tuple[str, int, str | None]]:
    return [(piece.text, piece.tokens, piece.finish) for piece in pieces]


def slow(value: object) -> object:
    """A case of the slow proofs."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("draft", [slow(1), 3])
@pytest.mark.parametrize("stops", [(), slow(("e",)), slow(("am", "never said")), (" ",)], ids=repr)
def test_text_is_that_of_one_token_at_a_time(
    demo: Demo, draft: int, stops: tuple[str, ...]
) -> None:
    prompts = chats(demo)
    plain = whole(complete(*demo, prompts, 40, stops=stops), 3)
    ahead = whole(complete(*demo, prompts, 40, stops=stops, draft=draft), 3)
    assert said(ahead) == said(plain)
    if not stops:
        assert {piece.finish for piece in ahead} >= {"eos"}  # guesses go past the end of some


@pytest.mark.parametrize("new", [slow(1), 2, slow(3), slow(4), 5, slow(7)])
def test_max_new_tokens_may_end_anywhere_in_a_draft(demo: Demo, new: int) -> None:
    plain = whole(complete(*demo, chats(demo), new), 3)
    for draft in (1, 3):
        assert said(whole(complete(*demo, chats(demo), new, draft=draft), 3)) == said(plain)


@pytest.mark.slow
def test_sampled_text_is_the_same(demo: Demo) -> None:
    warm = qn.Sampling(temperature=0.9, top_p=0.9, seed=3)
    plain = whole(complete(*demo, chats(demo), 24, warm), 3)
    assert said(whole(complete(*demo, chats(demo), 24, warm, draft=2), 3)) == said(plain)


@pytest.mark.slow
def test_a_shared_prefix_is_followed_by_the_module_too(demo: Demo) -> None:
    """The shots are prefilled once, by the MTP module as well: its guesses are as good as alone."""
    problems = read_problems(PROBLEMS)[:4]
    shots = "".join(map(shown, problems[:2]))
    prompts = [demo[1].encode(shots + asked(problem)) for problem in problems]
    together = whole(complete(*demo, prompts, 50, stops=("Question",), draft=2), 4)
    for prompt, row in zip(prompts, together, strict=True):
        [alone] = whole(complete(*demo, [prompt], 50, stops=("Question",), draft=2), 1)
        assert (said([alone]), alone.acceptance) == (said([row]), row.acceptance)


def test_one_step_by_hand() -> None:
    assert of_step(3, 2, room=9, ended=False) == Acceptance(1, 3, (1, 1), (1, 1))
    assert of_step(1, 2, room=9, ended=False) == Acceptance(1, 1, (1, 1), (0, 0))
    # the text ended with its first guess: of the second nobody knows
    assert of_step(2, 2, room=9, ended=True) == Acceptance(1, 2, (1, 0), (1, 0))
    # missed with room for one guess: the second was behind the limit, not wrong
    assert of_step(1, 2, room=2, ended=False) == Acceptance(1, 1, (1, 0), (0, 0))
    assert of_step(1, 2, room=1, ended=True) == Acceptance(1, 1, (0, 0), (0, 0))
    assert of_step(1, 0, room=5, ended=False) == Acceptance(1, 1, (), ())


def test_rates_and_words() -> None:
    assert str(Acceptance()) == "no step yet"
    tally = Acceptance(9, 23, (8, 7, 0), (6, 5, 0))
    assert tally.rates == (6 / 8, 5 / 7, None) and tally.tokens_per_step == 23 / 9
    assert str(tally) == "accepted 0.75, 0.71, - by position; 2.56 tokens a step"
    assert Acceptance() + tally == tally == tally + Acceptance()
    assert tally + Acceptance(1, 2, (1,), (1,)) == Acceptance(10, 25, (9, 7, 0), (7, 5, 0))


def test_without_guesses_a_step_is_a_token(demo: Demo) -> None:
    for row in whole(complete(*demo, chats(demo), 9), 3):
        assert row.acceptance == Acceptance(row.tokens, row.tokens, (), ())


@pytest.mark.slow
def test_evaluation_adds_up_all_rows(demo: Demo) -> None:
    problems = read_problems(PROBLEMS)[:5]
    plain = evaluate(*demo, problems, shots=1, batch=2, max_new_tokens=60, progress=False)
    ahead = evaluate(*demo, problems, shots=1, batch=2, max_new_tokens=60, draft=2, progress=False)
    assert ahead.results == plain.results and (plain.draft, ahead.draft) == (0, 2)
    assert ahead.acceptance.tokens == ahead.output_tokens == plain.output_tokens
    assert ahead.acceptance.steps < plain.acceptance.steps == plain.output_tokens
    # the batches' sizes matter to nothing, and each step's first token is no guess
    one = evaluate(*demo, problems, shots=1, batch=5, max_new_tokens=60, draft=2, progress=False)
    assert one.acceptance == ahead.acceptance
    assert sum(one.acceptance.accepted) == one.acceptance.tokens - one.acceptance.steps


@pytest.mark.parametrize("draft", [-1, True])
def test_bad_drafts(demo: Demo, draft: int) -> None:
    with pytest.raises(qn.InputError, match="draft must be an integer >= 0"):
        whole(complete(*demo, [[5, 6]], 4, draft=draft), 1)


def test_a_model_without_a_module_cannot_draft(demo: Demo) -> None:
    params, tokenizer = demo
    bare = params._replace(config=replace(params.config, mtp_layers=0), mtp=())
    with pytest.raises(qn.InputError, match="no MTP module"):
        whole(complete(bare, tokenizer, [[5, 6]], 4, draft=1), 1)

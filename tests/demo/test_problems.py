"""The word problems and conversations that the demo model is trained on."""

import json
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from examples import chat_corpus
from examples.chat_corpus import conversation, plain_text
from examples.chat_tables import CLOSINGS, GREETING, INTENTS, OFFER, WELLBEING, WHO
from examples.problem_words import MEN, NOUNS, WOMEN, plural
from examples.problems import (
    HELD_OUT,
    KINDS,
    OPERATORS,
    Problem,
    check,
    exclusions,
    held_out,
    is_held_out,
    problem_of,
    problems,
    signature,
    training_problems,
    words,
    write_jsonl,
)

SAMPLE = list(islice(problems(seed=1), 5000))
HELD = held_out()
# What a template leaves behind when it is not filled; "(" and "[" stand in no finished text.
NOTATION = re.compile(r"[{}\[\]()|]|None|  ")
STEP = re.compile(r"[^<\n]*\d+ [-+*/] \d+ = <<\d+[-+*/]\d+=\d+>>\d+[^<\n]*\.")

APPLES = Problem(
    "Mia has 12 apples. She buys 7 more and then gives 5 to Tom. "
    "How many apples does Mia have now?",
    "Mia has 12 + 7 = <<12+7=19>>19 apples after buying.\n"
    "She has 19 - 5 = <<19-5=14>>14 apples now.\n#### 14",
    "buy_then_give",
)


def test_every_problem_checks():
    assert [p for p in SAMPLE if not check(p)] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("=19>>", "=18>>"),
        (">>19", ">>18"),
        ("#### 14", "#### 15"),
        ("19 - 5", "19 - 4"),
        ("12 + 7 = <<12+7=19>>19", "11 + 8 = <<11+8=19>>19"),
        ("12 + 7 = <<12+7=19>>19", "19"),
        ("\n#### 14", ""),
    ],
)
def test_check_finds_what_is_wrong(old: str, new: str):
    assert check(APPLES)
    assert not check(APPLES._replace(answer=APPLES.answer.replace(old, new)))


def test_format():
    for p in SAMPLE:
        *steps, last = p.answer.split("\n")
        assert 1 <= len(steps) <= 2
        assert all(STEP.fullmatch(line) for line in steps), p.answer
        assert re.fullmatch(r"#### \d+", last)
        assert p.question.endswith("?")
        assert p.question.count("?") == 1


def test_text_is_clean():
    for p in SAMPLE:
        text = f"{p.question}\n{p.answer}"
        assert text.isascii()
        assert not NOTATION.search(text), text
        # A sentence begins with a capital or a number.
        assert not re.search(r"(^|[.?] |\n)[a-z]", text), text
        assert 15 <= len(text.split()) <= 75


def test_numbers_are_in_range():
    for p in SAMPLE:
        numbers = [int(n) for n in re.findall(r"\d+", p.question + p.answer)]
        assert min(numbers) >= 2, p
        assert max(numbers) <= 160, p
        for a, b in re.findall(r"<<(\d+)\*(\d+)=", p.answer):
            assert max(int(a), int(b)) <= 12


def test_all_kinds_and_templates_appear():
    assert len(KINDS) == len({kind.name for kind in KINDS})
    counts = Counter(p.kind for p in SAMPLE)
    assert set(counts) == {kind.name for kind in KINDS}
    assert min(counts.values()) > 5000 / len(KINDS) / 2
    for kind in KINDS:
        assert len(kind.templates) >= 4
        asked = [p.question for p in SAMPLE if p.kind == kind.name]
        for question, _ in kind.templates:
            pattern = re.compile(re.sub(r"\\\{\w+\\\}|\\\(.*?\\\)", ".+", re.escape(question)))
            assert any(pattern.fullmatch(q) for q in asked), question


def test_problems_rarely_repeat():
    assert len({p.question for p in SAMPLE}) > 0.99 * len(SAMPLE)


def test_some_problems_have_a_number_beside_the_point():
    def unused(p: Problem) -> bool:
        asked = set(re.findall(r"\d+", p.question))
        return not asked <= set(re.findall(r"\d+", p.answer))

    share = sum(map(unused, SAMPLE)) / len(SAMPLE)
    assert 0.05 < share < 0.15


def test_a_seed_is_a_stream():
    assert list(islice(problems(1), 100)) == SAMPLE[:100]
    assert list(islice(problems(2), 100)) != SAMPLE[:100]


def test_pronouns_and_plurals():
    assert not set(WOMEN) & set(MEN)
    for seed in range(200):
        slots = words(random.Random(seed))
        assert (slots["he"], slots["him"], slots["his"]) == (
            ("she", "her", "her") if slots["A"] in WOMEN else ("he", "him", "his")
        )
        assert slots["A"] != slots["B"]
        assert all(slots[noun] != slots[f"{noun}2"] for noun in NOUNS)
    assert [plural(n) for n in ("apple", "box", "peach", "brush", "cherry", "toy")] == [
        "apples", "boxes", "peaches", "brushes", "cherries", "toys",
    ]  # fmt: skip


def test_held_out_is_balanced_distinct_and_fixed():
    assert len(HELD) == 200
    assert all(map(check, HELD))
    assert len({p.question for p in HELD}) == len({signature(p) for p in HELD}) == 200
    counts = Counter(p.kind for p in HELD)
    assert set(counts) == {kind.name for kind in KINDS}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert held_out() == HELD
    assert held_out(50) == HELD[:50]
    assert held_out(seed=1) != HELD
    assert exclusions(HELD) == HELD_OUT


def test_signature_is_the_kind_and_the_numbers():
    assert signature(APPLES) == "buy_then_give: 12+7 19-5"
    renamed = APPLES._replace(
        question="It is 9 degrees outside. " + APPLES.question.replace("Mia", "Ann"),
        answer=APPLES.answer.replace("Mia", "Ann").replace("12 + 7 = <<12+7", "7 + 12 = <<7+12"),
    )
    assert check(renamed)
    assert signature(renamed) == signature(APPLES)
    assert is_held_out(renamed, exclusions([APPLES]))
    other = APPLES._replace(kind="other", question=renamed.question)
    assert not is_held_out(other, exclusions([APPLES]))
    assert is_held_out(APPLES, frozenset([APPLES.question]))


def test_training_never_sees_held_out_numbers():
    stream = list(islice(problems(seed=3), 5000))
    trained = list(islice(training_problems(seed=3), 4000))
    assert not {signature(p) for p in trained} & {signature(p) for p in HELD}
    assert not {p.question for p in trained} & {p.question for p in HELD}
    kept = [p for p in stream if not is_held_out(p, HELD_OUT)]
    assert kept[:4000] == trained
    assert 0.9 * len(stream) < len(kept) < len(stream)
    assert list(islice(training_problems(3, frozenset()), 100)) == stream[:100]


def test_every_kind_keeps_most_of_its_numbers_for_training():
    for kind in KINDS:
        rng = random.Random(4)
        drawn = {signature(problem_of(kind, rng)) for _ in range(500)}
        assert len(drawn - HELD_OUT) > 0.75 * len(drawn), kind.name


def test_jsonl_is_that_of_gsm8k(tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    write_jsonl(path, HELD)
    rows = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    assert rows == [{"question": p.question, "answer": p.answer} for p in HELD]


def test_conversations_alternate_and_are_clean():
    rng = random.Random(0)
    for _ in range(2000):
        messages = conversation(rng)
        roles = [m["role"] for m in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert 2 <= len(turns) <= 6
        for m in messages:
            assert m["content"] == m["content"].strip() != ""
            assert m["content"].isascii()
            assert not NOTATION.search(m["content"]), m
            assert "<<" not in m["content"]


def test_conversations_calculate_right():
    rng = random.Random(1)
    seen = 0
    for _ in range(2000):
        for m in conversation(rng):
            steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", m["content"])
            for a, op, b, value in steps:
                assert OPERATORS[op](int(a), int(b)) == int(value), m
            if result := re.search(r"The answer is (\d+)\.$", m["content"]):
                assert steps[-1][3] == result[1]
                seen += 1
    assert seen > 500


def test_conversations_never_ask_held_out_problems(monkeypatch: pytest.MonkeyPatch):
    def mostly_held(rng: random.Random) -> Problem:
        return APPLES if rng.random() < 0.1 else rng.choice(HELD)

    monkeypatch.setattr(chat_corpus, "problem", mostly_held)
    rng = random.Random(2)
    said = [m["content"] for _ in range(200) for m in conversation(rng)]
    assert sum(APPLES.question in text for text in said) > 20
    assert not any(p.question in text for p in HELD for text in said)


def test_intents_have_many_wordings():
    for intent in {*INTENTS, *CLOSINGS, GREETING, WELLBEING, OFFER}:
        assert len(intent.users) == len(set(intent.users))
        assert len(intent.replies) >= 4
    for main in (GREETING, WHO, OFFER, *CLOSINGS[1:]):
        assert len(main.users) >= 15
    assert all("qnext demo" in reply for reply in WHO.replies)


def test_plain_text_is_a_few_sentences():
    rng = random.Random(0)
    texts = [plain_text(rng) for _ in range(1000)]
    for text in texts:
        assert text.isascii()
        assert not NOTATION.search(text), text
        assert 2 <= len(re.findall(r"[.](?: |$)", text)) <= 5
    assert len(set(texts)) > 990

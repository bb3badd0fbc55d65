"""Polite conversations about what the demo model is and does, and plain stories of its world.

Messages have the OpenAI form, `{"role": "user", "content": "Who are you?"}`. The templates are
in `chat_tables.py`, in the notation of the word problems.
"""

import random
import re

from examples.chat_tables import (
    CLOSINGS,
    COUNTRIES,
    GREETING,
    INTENTS,
    OFFER,
    PROBLEM_LEADS,
    STORY,
    SUM,
    SYSTEM,
    TOPICS,
    WELLBEING,
)
from examples.chat_tables_model import Intent
from examples.problems import HELD_OUT, OPERATORS, fill, is_held_out, problem, words

Message = dict[str, str]

SYSTEM_SHARE = 0.15
PROBLEM_SHARE = 0.3
SUM_SHARE = 0.06
CARELESS_SHARE = 0.15


def conversation(rng: random.Random, exclude: frozenset[str] = HELD_OUT) -> list[Message]:
    """One to three turns; its word problems are none of the `exclude`d ones."""
    messages = []
    if rng.random() < SYSTEM_SHARE:
        messages.append(_message("system", rng.choice(SYSTEM)))
    turns = rng.randint(1, 3)
    opens = turns > 1 and rng.random() < 0.5
    closes = turns > 1 + opens and rng.random() < 0.6
    opening = rng.choice((GREETING, GREETING, WELLBEING, OFFER)) if opens else None
    if opening:
        messages += _exchange(opening, rng)
    if opening is OFFER:
        messages += _word_problem(rng, exclude, lead="")
    for _ in range(turns - opens - (opening is OFFER) - closes):
        messages += _request(rng, exclude)
    if closes:
        messages += _exchange(rng.choice(CLOSINGS), rng)
    return messages


def plain_text(rng: random.Random) -> str:
    """Two to five short sentences about the people, things and places of the word problems."""
    slots = words(rng) | {"d": str(rng.randint(2, 12))}
    openings, middles, endings = STORY
    chosen = sorted(rng.sample(range(len(middles)), rng.randint(1, 3)))
    sentences = [rng.choice(openings), *(middles[i] for i in chosen)]
    if rng.random() < 0.6:
        sentences.append(rng.choice(endings))
    return " ".join(fill(sentence, slots, rng) for sentence in sentences)


def _request(rng: random.Random, exclude: frozenset[str]) -> list[Message]:
    """What people come for: a word problem, a bare sum, or a question about the model."""
    share = rng.random()
    if share < PROBLEM_SHARE:
        return _word_problem(rng, exclude, rng.choice(PROBLEM_LEADS))
    return _exchange(SUM if share < PROBLEM_SHARE + SUM_SHARE else rng.choice(INTENTS), rng)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _exchange(intent: Intent, rng: random.Random) -> list[Message]:
    """A question and its reply."""
    slots = words(rng) | {"topic": rng.choice(TOPICS), "country": rng.choice(COUNTRIES)}
    if intent is SUM:
        slots |= _sum(rng)
    said = _as_typed(fill(rng.choice(intent.users), slots, rng), rng)
    return [
        _message("user", said),
        _message("assistant", fill(rng.choice(intent.replies), slots, rng)),
    ]


def _sum(rng: random.Random) -> dict[str, str]:
    """The slots of a bare calculation with numbers of the size of the word problems."""
    op = rng.choice("+-*/")
    a, b = (rng.randint(2, 12 if op in "*/" else 50) for _ in range(2))
    if op == "-":
        a += b
    elif op == "/":
        a *= b
    return {"sum": f"{a} {op} {b}", "result": str(OPERATORS[op](a, b))}


def _word_problem(rng: random.Random, exclude: frozenset[str], lead: str) -> list[Message]:
    """A word problem that is not excluded, asked with some lead, and its worked steps."""
    asked = problem(rng)
    while is_held_out(asked, exclude):
        asked = problem(rng)
    # The calculator annotations belong to the GSM8K format; in a chat they are noise.
    *steps, last = re.sub("<<.*?>>", "", asked.answer).split("\n")
    reply = " ".join(steps) + f" The answer is {last.removeprefix('#### ')}."
    return [_message("user", lead + asked.question), _message("assistant", reply)]


def _as_typed(text: str, rng: random.Random) -> str:
    """Some people type neither capitals nor the last question mark."""
    return text.lower().rstrip("?.! ") if rng.random() < CARELESS_SHARE else text

"""Grade-school word problems in GSM8K's format, drawn from the tables beside this file.

An answer is its steps, one a line, each with GSM8K's calculator annotation, and then the result:

    Mia has 12 + 7 = <<12+7=19>>19 apples after buying.
    She has 19 - 5 = <<19-5=14>>14 apples now.
    #### 14

A kind has between 55 (`times_as_many`) and 79,056 (`take_twice`) draws of numbers and, without
asides, between 1.7 million (`week`) and 560 billion (`buy_then_give`) questions.

The held-out problems are never trained on, and neither is any other problem of the same kind
with the same numbers, whatever its names and words: see `signature`. Their wording is that of
the training problems, so they measure new numbers and names, not new ways to ask.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from examples.problem_tables import ONE_STEP, Kind
from examples.problem_tables_two import TWO_STEP
from examples.problem_words import (
    GENERAL_ASIDES,
    MEN,
    NOUNS,
    PERSON_ASIDES,
    PLACES,
    WOMEN,
    plural,
)

KINDS: tuple[Kind, ...] = ONE_STEP + TWO_STEP
ASIDE_SHARE = 0.1

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    # An inexact quotient is no answer: 0 makes the draw fail, as every number must be >= 2.
    "/": lambda a, b: a // b if b and a % b == 0 else 0,
}
CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
SLOT = re.compile(r"\{(\w+)\}")
STEP = re.compile(r"\[(\w)=(\w+)([-+*/])(\w+)\]")
ANNOTATION = re.compile(r"(\d+) ([-+*/]) (\d+) = <<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


class Problem(NamedTuple):
    """A question, its worked answer ending in `#### N`, and the name of its kind."""

    question: str
    answer: str
    kind: str


def words(rng: random.Random) -> dict[str, str]:
    """One draw of the world: two people with the first one's pronouns, nouns and places."""
    a, b = rng.sample(WOMEN + MEN, 2)
    he, him, his = ("she", "her", "her") if a in WOMEN else ("he", "him", "his")
    slots = {"A": a, "B": b, "he": he, "him": him, "his": his}
    slots |= {"He": he.capitalize(), "His": his.capitalize()}
    for name, nouns in NOUNS.items():
        first, second = rng.sample(nouns, 2)
        slots |= {name: first, plural(name): plural(first)}
        slots |= {f"{name}2": second, f"{plural(name)}2": plural(second)}
    return slots | {name: rng.choice(places) for name, places in PLACES.items()}


def fill(template: str, slots: dict[str, str], rng: random.Random) -> str:
    """Chooses among the `(a|b)` of a template and fills its `{slots}`."""
    chosen = CHOICE.sub(lambda m: rng.choice(m[1].split("|")), template)
    return SLOT.sub(lambda m: slots[m[1]], chosen)


def evaluate(a: str, op: str, b: str, numbers: dict[str, int]) -> int:
    """The value of `a op b`, where each operand is a name in `numbers` or a literal."""
    left, right = (numbers[s] if s in numbers else int(s) for s in (a, b))
    return OPERATORS[op](left, right)


def draw(spec: str, rng: random.Random) -> dict[str, int]:
    """Draws the numbers of a kind: `x=2..50` a range, `x=20|50` a choice, `x=n*q` computed."""
    numbers: dict[str, int] = {}
    for part in spec.split():
        name, rule = part.split("=")
        if ".." in rule:
            low, high = rule.split("..")
            numbers[name] = rng.randint(int(low), int(high))
        elif operation := re.fullmatch(r"(\w+)([-+*/])(\w+)", rule):
            left, operator, right = operation.groups()
            numbers[name] = evaluate(left, operator, right, numbers)
        else:
            numbers[name] = int(rng.choice(rule.split("|")))
    return numbers


def work(answer: str, numbers: dict[str, int]) -> str:
    """Writes out the steps of an answer; adds their results to `numbers`, in order."""

    def step(match: re.Match[str]) -> str:
        name, a, op, b = match.groups()
        numbers[name] = value = evaluate(a, op, b, numbers)
        left, right = (str(numbers.get(s, s)) for s in (a, b))
        return f"{left} {op} {right} = <<{left}{op}{right}={value}>>{value}"

    return STEP.sub(step, answer)


def with_aside(question: str, rng: random.Random) -> str:
    """Adds a fact beside the point, first or just before what is asked."""
    asides = GENERAL_ASIDES + (PERSON_ASIDES if "{A}" in question else ())
    # 8 chairs in the room are beside the point only where no other chairs are counted.
    units = {aside: unit for aside in asides for unit in re.findall(r"\{d\}\W*(\w*)", aside)}
    aside = rng.choice([a for a, unit in units.items() if not unit or unit not in question])
    *facts, asked = re.split(r"(?<=\.) ", question)
    at = rng.choice((0, len(facts)))
    return " ".join([*facts[:at], aside, *facts[at:], asked])


def problem_of(kind: Kind, rng: random.Random) -> Problem:
    """One problem of a kind."""
    question, answer = rng.choice(kind.templates)
    while True:
        numbers = draw(kind.numbers, rng)
        steps = work(answer, numbers)
        if min(numbers.values()) >= 2:
            break
    if rng.random() < ASIDE_SHARE:
        question = with_aside(question, rng)
    slots = words(rng) | {"d": str(rng.randint(5, 12))}
    slots |= {name: str(value) for name, value in numbers.items()}
    slots["times"] = "twice" if numbers.get("k") == 2 else f"{slots.get('k')} times"
    result = list(numbers.values())[-1]
    text = fill(steps, slots, rng)
    return Problem(fill(question, slots, rng), f"{text}\n#### {result}", kind.name)


def problem(rng: random.Random) -> Problem:
    """One problem of any kind, all kinds alike."""
    return problem_of(rng.choice(KINDS), rng)


def problems(seed: int) -> Iterator[Problem]:
    """An endless stream of problems, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield problem(rng)


def check(problem: Problem) -> bool:
    """Whether every step is right, uses only numbers known by then, and leads to the result."""
    *lines, last = problem.answer.split("\n")
    # 2 and 7 may come from "half", "twice" and "week".
    known = {int(n) for n in re.findall(r"\d+", problem.question)} | {2, 7}
    value = None
    for line in lines:
        steps = ANNOTATION.findall(line)
        if len(steps) != 1 or line.count("<<") != 1:
            return False
        a, op, b, *annotation, written = steps[0]
        value = OPERATORS[op](int(a), int(b))
        if annotation != [a, op, b, str(value)] or written != str(value):
            return False
        if not {int(a), int(b)} <= known:
            return False
        known.add(value)
    return value is not None and last == f"#### {value}"


def signature(problem: Problem) -> str:
    """The kind and the numbers of a problem, without its names, its words and its asides."""
    steps = []
    for _, _, _, a, op, b, _, _ in ANNOTATION.findall(problem.answer):
        # 12+7 and 7+12 are one problem.
        a, b = sorted((a, b)) if op in "+*" else (a, b)
        steps.append(f"{a}{op}{b}")
    return " ".join([f"{problem.kind}:", *steps])


def held_out(count: int = 200, seed: int = 20_250_911) -> list[Problem]:
    """The test set: kinds in turn, no two problems with the same signature or question."""
    rng = random.Random(seed)
    found: list[Problem] = []
    seen: frozenset[str] = frozenset()
    while len(found) < count:
        new = problem_of(KINDS[len(found) % len(KINDS)], rng)
        if not is_held_out(new, seen):
            found.append(new)
            seen |= exclusions([new])
    return found


def exclusions(held: Iterable[Problem]) -> frozenset[str]:
    """What must not be trained on: the questions and the signatures of the held-out problems."""
    return frozenset(text for p in held for text in (p.question, signature(p)))


def is_held_out(problem: Problem, exclude: frozenset[str]) -> bool:
    """Whether this problem, or one with its kind and its numbers, is among the `exclusions`."""
    return problem.question in exclude or signature(problem) in exclude


# The default of everything that trains, so that the test set cannot be forgotten.
HELD_OUT: frozenset[str] = exclusions(held_out())


def training_problems(seed: int, exclude: frozenset[str] = HELD_OUT) -> Iterator[Problem]:
    """The stream of problems without those that `exclude` (made by `exclusions`) keeps out."""
    return (p for p in problems(seed) if not is_held_out(p, exclude))


def write_jsonl(path: str | Path, problems: Iterable[Problem]) -> None:
    """Writes problems as GSM8K does: one JSON object a line, with `question` and `answer`."""
    with Path(path).open("w", encoding="ascii", newline="\n") as file:
        for p in problems:
            file.write(json.dumps({"question": p.question, "answer": p.answer}) + "\n")

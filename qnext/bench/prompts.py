"""What servers are asked: prompts of a file, the demo's problems, or tokens drawn at random."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qnext.errors import InputError

# short and frequent, so that a word is about a token of any tokenizer
WORDS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work number night point home water
room mother area money story fact month lot right study book eye job word business issue side kind
head house service friend father power hour game line end member law car city name team minute idea
body back parent face level office door health person art war history party result change morning
""".split()
PREFIX, TAIL, ARRIVALS = range(3)  # streams of one seed


class Prompts(Protocol):
    """Prompts by number. Numbers below 0 are for warm-up."""

    def body(self, index: int) -> dict[str, Any]:
        """The part of a request's body that is the prompt: `prompt` or `messages`."""
        ...


@dataclass(frozen=True)
class Listed:
    """Prompts in order, over and over; warm-up takes them from the end."""

    bodies: Sequence[dict[str, Any]]

    def body(self, index: int) -> dict[str, Any]:
        return self.bodies[index % len(self.bodies)]


@dataclass(frozen=True)
class Drawn:
    """Random prompts: token ids below `vocab`, or a chat message of words where that is None.

    A prompt depends on seed and number alone; the first `shared` tokens are the same in all.
    """

    tokens: int
    shared: int
    seed: int
    vocab: int | None

    def body(self, index: int) -> dict[str, Any]:
        kinds = len(WORDS) if self.vocab is None else self.vocab
        own = np.random.default_rng([self.seed, TAIL, index % 2**32])
        common = np.random.default_rng([self.seed, PREFIX]).integers(kinds, size=self.shared)
        rest = own.integers(kinds, size=self.tokens - self.shared)
        drawn = [*common.tolist(), *rest.tolist()]
        if self.vocab is not None:
            return {"prompt": drawn}
        return {"messages": _asked(" ".join(WORDS[word] for word in drawn))}


def read_prompts(path: Path, chat: bool) -> Listed:
    """Prompts of a JSON-lines file, in the endpoint's form. Raises InputError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    bodies = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            bodies.append(_body(line, chat, f"{path}, line {number}"))
    if not bodies:
        raise InputError(f"{path} holds no prompts")
    return Listed(bodies)


def _body(line: str, chat: bool, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: is no JSON: {error}") from error
    match row:
        case {"messages": list(messages)} if messages:
            if chat:
                return {"messages": messages}
            raise InputError(f"{where}: messages are for --endpoint chat; give prompt or question")
        case {"prompt": str(text)} if text:
            return {"messages": _asked(text)} if chat else {"prompt": text}
        case {"question": str(text)} if text:
            return {"messages": _asked(text)} if chat else {"prompt": f"Question: {text}\nAnswer:"}
    raise InputError(f"{where}: want an object with prompt, messages or question, none empty")


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def arrivals(
    rate: float, seed: int, requests: int | None = None, duration: float | None = None
) -> list[float]:
    """Times of a Poisson process: so many of them, or all before `duration`."""
    draw = np.random.default_rng([seed, ARRIVALS])
    times: list[float] = []
    now = 0.0
    while requests is None or len(times) < requests:
        now += float(draw.exponential(1 / rate))
        if duration is not None and now >= duration:
            break
        times.append(now)
    return times

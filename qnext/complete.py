"""Text in, text out: prompts of token ids continued as streamed text, with stop strings."""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from qnext.acceptance import Acceptance
from qnext.errors import InputError
from qnext.functional.generate import GREEDY
from qnext.functional.params import Params
from qnext.functional.sampling import Sampling
from qnext.runtime.engine import Engine
from qnext.runtime.options import Options
from qnext.runtime.request import Output, Request
from qnext.text import Tokenizer

LEAST = 1024  # tokens of an engine's capacity: steps are compiled for each capacity by itself


class Piece(NamedTuple):
    """Text that became certain in one row; `finish` is set on a row's last piece.

    tokens: new tokens of the row so far. finish: "eos", "stop" or "length". acceptance: of the
    row's guesses so far.
    """

    row: int
    text: str
    tokens: int
    finish: str | None
    acceptance: Acceptance = Acceptance()


def complete(
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stops: Sequence[str] = (),
    draft: int = 0,
    *,
    target: str = "cpu",
    rows: int | None = None,
    marks: Sequence[int] = (),
) -> Iterator[Piece]:
    """Continue prompts (token ids) as text, yielding pieces of any prompt as they become certain.

    A prompt's row ends at an eos token, before the first occurrence of a string of `stops`, or
    after `max_new_tokens`. With `draft` so many tokens are guessed ahead, which changes no text.
    `rows` prompts run at once (default: all), the next as soon as one ends; `marks` are lengths
    that prompts share as a prefix, which is then read once. `target` is what steps are compiled
    for. Raises InputError, LoweringError and TargetError; what goes wrong in a step is raised, too.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
    if not prompts or not all(prompts):
        raise InputError("empty prompt: give at least one token")
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    requests = [
        Request(
            tokens=tuple(prompt),
            max_new_tokens=max_new_tokens,
            sampling=manner,
            stops=tuple(stops),
            marks=tuple(marks),
        )
        for prompt, manner in zip(prompts, each, strict=True)
    ]
    options = Options(
        rows=rows or len(prompts),
        capacity=_room(max(map(len, prompts)) + max_new_tokens),
        max_waiting=len(prompts),
        draft=draft,
        target=target,
    )
    for row, output in outputs(Engine(params, tokenizer, options), requests):
        if output.error:
            raise output.error
        told = output.acceptance if draft else Acceptance(output.made, output.made)
        yield Piece(row, output.text, output.made, output.finish, told)


def outputs(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, Output]]:
    """The outputs of requests as they come, each with its request's place; leaving ends them."""
    made: deque[tuple[int, Output]] = deque()
    try:
        for at, request in enumerate(requests):
            engine.submit(request, partial(_take, made, at))
        busy = True
        while busy:
            busy = engine.step()
            while made:
                at, output = made.popleft()
                if output.text or output.finish:
                    yield at, output
    finally:
        engine.close()


def _take(made: deque[tuple[int, Output]], at: int, output: Output) -> None:
    made.append((at, output))


def _room(tokens: int) -> int:
    """A power of two, so that few capacities are ever compiled for."""
    return max(LEAST, 1 << (tokens - 1).bit_length())

"""Outputs of the engine, of one request or of several at once, and what to make of them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from qnext.acceptance import Acceptance
from qnext.runtime.request import Output, Request
from qnext.runtime.service import Service
from qnext.server.errors import of_output
from qnext.server.schema import Sampled


async def outputs(
    service: Service, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, Output], None]:
    """(which request, its output) of all of them, as they come; ApiError where one fails.

    However it ends, every request has ended with it.
    """
    if len(requests) == 1:
        async with aclosing(service.astream(requests[0])) as stream:
            async for output in stream:
                _raise_failed(output)
                yield 0, output
        return
    found: asyncio.Queue[tuple[int, Output] | BaseException] = asyncio.Queue()

    async def read(index: int, request: Request) -> None:
        try:
            async with aclosing(service.astream(request)) as stream:
                async for output in stream:
                    found.put_nowait((index, output))
        except Exception as error:
            found.put_nowait(error)

    tasks = [asyncio.create_task(read(i, request)) for i, request in enumerate(requests)]
    try:
        missing = len(tasks)
        while missing:
            item = await found.get()
            if isinstance(item, BaseException):
                raise item
            _raise_failed(item[1])
            missing -= item[1].finish is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise_failed(output: Output) -> None:
    error = of_output(output)
    if error is not None:
        raise error


@dataclass
class Whole:
    """The text of one request, put together of its outputs."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    finish: str | None = None
    stopped_by: str | int | None = None

    def add(self, output: Output) -> None:
        self.text += output.text
        self.tokens += output.tokens
        self.prompt, self.cached = output.prompt, output.cached
        self.finish, self.stopped_by = output.finish, output.stopped_by


# what ended a request, as OpenAI's clients are told
REASONS = {"eos": "stop", "stop": "stop", "guide": "stop", "length": "length", "abort": "abort"}


def stop_reason(output: Output, asked: Sampled) -> str | int | None:
    """The stop string or token of stop_token_ids that ended a text; None where others did."""
    given = output.finish == "stop" or output.stopped_by in (asked.stop_token_ids or ())
    return output.stopped_by if given else None


@dataclass
class Tally:
    """Counts for `usage`, over the choices and prompts of a request."""

    made: dict[int, int] = field(default_factory=dict)
    prompts: dict[int, tuple[int, int]] = field(default_factory=dict)  # (tokens, cached)
    guesses: dict[int, Acceptance] = field(default_factory=dict)

    def note(self, index: int, prompt: int, output: Output) -> None:
        """An output of choice `index`, whose prompt is the `prompt`-th."""
        self.made[index] = output.made
        _, cached = self.prompts.get(prompt, (0, output.cached))
        self.prompts[prompt] = output.prompt, min(cached, output.cached)
        self.guesses[index] = output.acceptance

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object."""
        prompt = sum(tokens for tokens, _ in self.prompts.values())
        cached = sum(cached for _, cached in self.prompts.values())
        made = sum(self.made.values())
        right = sum(sum(a.accepted) for a in self.guesses.values())
        wrong = sum(sum(a.judged) for a in self.guesses.values()) - right
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": right,
                "rejected_prediction_tokens": wrong,
            },
        }

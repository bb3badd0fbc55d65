"""POST /v1/completions: answers in OpenAI's shape, whole or streamed."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from qnext.runtime.request import Logprob, Output, Request
from qnext.server.host import Ready, Watch
from qnext.server.schema import CompletionRequest
from qnext.server.streams import REASONS, Tally, outputs, stop_reason
from qnext.text.spelling import token_text

LEAST_LOGPROB = -9999.0  # JSON has no -Infinity


def shown(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


@dataclass
class _Choice:
    """One choice as it grows: where in its text the next token begins."""

    index: int
    prompt: int
    tokens: tuple[int, ...]  # the prompt's
    offset: int = 0
    began: bool = False


class Completions:
    """The answer to one request of /v1/completions."""

    def __init__(
        self,
        ready: Ready,
        asked: CompletionRequest,
        requests: Sequence[Sequence[Request]],
        head: dict[str, Any],
        watch: Watch,
    ) -> None:
        self.service, self.tokenizer = ready.service, ready.tokenizer
        self.asked, self.watch = asked, watch
        self.requests = [request for each in requests for request in each]
        self.choices = [
            _Choice(i * len(each) + j, i, request.tokens)
            for i, each in enumerate(requests)
            for j, request in enumerate(each)
        ]
        self.head = {**head, "object": "text_completion"}
        self.tally = Tally()

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        parts: dict[int, list[dict[str, Any]]] = {}
        async with aclosing(outputs(self.service, self.requests)) as stream:
            async for index, output in stream:
                parts.setdefault(index, []).append(self._piece(self.choices[index], output))
        choices = [_joined(parts[choice.index]) for choice in self.choices]
        return {**self.head, "choices": choices, "usage": self.tally.usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces as they come, and the usage where it is asked for."""
        options = self.asked.stream_options
        always = bool(options and options.continuous_usage_stats)
        async with aclosing(outputs(self.service, self.requests)) as stream:
            async for index, output in stream:
                piece = self._piece(self.choices[index], output)
                if not piece["text"] and not output.finish and not piece["logprobs"]:
                    continue
                chunk = {**self.head, "choices": [piece]}
                yield {**chunk, "usage": self.tally.usage()} if always else chunk
        if options and options.include_usage:
            yield {**self.head, "choices": [], "usage": self.tally.usage()}

    def _piece(self, choice: _Choice, output: Output) -> dict[str, Any]:
        """What an output adds to a choice."""
        self.tally.note(choice.index, choice.prompt, output)
        self.watch.note(choice.index, output)
        text, logprobs = output.text, None
        if self.asked.echo and not choice.began:
            text = self.tokenizer.decode(choice.tokens, skip_special_tokens=False) + text
        if self.asked.logprobs is not None:
            logprobs = self._logprobs(choice, output)
        choice.began = True
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": REASONS.get(output.finish or ""),
            "stop_reason": stop_reason(output, self.asked),
        }

    def _logprobs(self, choice: _Choice, output: Output) -> dict[str, list[Any]]:
        lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        if self.asked.echo and not choice.began:
            self._append(choice, lists, choice.tokens[0], None)  # nothing precedes it
            for each in output.prompt_logprobs:
                self._append(choice, lists, each.token, each)
        for each in output.logprobs:
            self._append(choice, lists, each.token, each)
        return lists

    def _append(
        self, choice: _Choice, lists: dict[str, list[Any]], token: int, told: Logprob | None
    ) -> None:
        text = token_text(self.tokenizer, token)
        top = None
        if told is not None:
            own = {text: shown(told.logprob)}
            top = {token_text(self.tokenizer, t): shown(p) for t, p in told.top} | own
        lists["tokens"].append(text)
        lists["token_logprobs"].append(None if told is None else shown(told.logprob))
        lists["top_logprobs"].append(top)
        lists["text_offset"].append(choice.offset)
        choice.offset += len(text)


def _joined(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The pieces of a choice as one."""
    told = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    logprobs = {key: [x for each in told for x in each[key]] for key in told[0]} if told else None
    text = "".join(piece["text"] for piece in pieces)
    return {**pieces[-1], "text": text, "logprobs": logprobs}

"""POST /v1/chat/completions: answers in OpenAI's shape, whole or streamed.

Both are made of the same events of the same parser, so they cannot disagree.
"""

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from qnext.runtime.request import Logprob, Output, Request
from qnext.server.asked import shown_tools
from qnext.server.completions import shown
from qnext.server.host import Ready, Watch
from qnext.server.parse import Parser, assemble, opens_reasoning
from qnext.server.parse_text import Arguments, CallBegun, Content, Event, Reasoning
from qnext.server.schema import ChatRequest
from qnext.server.streams import REASONS, Tally, outputs, stop_reason
from qnext.text.spelling import token_bytes, token_text


class Chat:
    """The answer to one request of /v1/chat/completions."""

    def __init__(
        self,
        ready: Ready,
        asked: ChatRequest,
        prompt: str,
        requests: Sequence[Request],
        head: dict[str, Any],
        watch: Watch,
    ) -> None:
        self.service, self.tokenizer = ready.service, ready.tokenizer
        self.asked, self.requests, self.head, self.watch = asked, requests, head, watch
        self.tally = Tally()
        self._parsers = [self._parser(prompt) for _ in requests]
        self._called = [False] * len(requests)

    def _parser(self, prompt: str) -> Parser:
        asked = self.asked
        return Parser(
            lambda: f"call_{secrets.token_hex(12)}",
            shown_tools(asked) or (),
            reasoning=asked.separate_reasoning is not False,
            opened=opens_reasoning(prompt),
            parallel=asked.parallel_tool_calls is not False,
        )

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        events: list[list[Event]] = [[] for _ in self.requests]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in self.requests]
        last: dict[int, Output] = {}
        async with aclosing(outputs(self.service, self.requests)) as stream:
            async for index, output in stream:
                events[index] += self._parsed(index, output)
                logprobs[index] += map(self._logprob, output.logprobs)
                last[index] = output
        choices = []
        for index, made in enumerate(events):
            message = {"role": "assistant", **assemble(made)}
            if not message["tool_calls"]:
                del message["tool_calls"]
            choice = self._choice(index, last[index], logprobs[index])
            choices.append({**choice, "message": message})
        head = {**self.head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self.tally.usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces as they come, and the usage where it is asked for."""
        options = self.asked.stream_options
        always = bool(options and options.continuous_usage_stats)
        head = {**self.head, "object": "chat.completion.chunk"}
        began: set[int] = set()
        async with aclosing(outputs(self.service, self.requests)) as stream:
            async for index, output in stream:
                for choice in self._pieces(index, output, index not in began):
                    chunk = {**head, "choices": [choice]}
                    yield {**chunk, "usage": self.tally.usage()} if always else chunk
                began.add(index)
        if options and options.include_usage:
            yield {**head, "choices": [], "usage": self.tally.usage()}

    def _parsed(self, index: int, output: Output) -> list[Event]:
        """What an output's text means; the answer is over with the last."""
        self.tally.note(index, 0, output)
        self.watch.note(index, output)
        parser = self._parsers[index]
        events = parser.push(output.text) if output.text else []
        if output.finish:
            events += parser.finish()
        self._called[index] |= any(isinstance(event, CallBegun) for event in events)
        return events

    def _pieces(self, index: int, output: Output, first: bool) -> list[dict[str, Any]]:
        """An output as deltas: the role before the first, the reason why it ended in the last."""
        deltas = [_delta(event) for event in self._parsed(index, output)]
        if first:
            deltas.insert(0, {"role": "assistant", "content": ""})
        if output.finish or (output.logprobs and not deltas):
            deltas.append({})
        told = [self._logprob(each) for each in output.logprobs]
        pieces = []
        for at, delta in enumerate(deltas):
            last = at == len(deltas) - 1
            choice = self._choice(index, output if last else None, told if last else [])
            pieces.append({**choice, "delta": delta})
        return pieces

    def _choice(
        self, index: int, output: Output | None, logprobs: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """What whole choices and pieces have in common."""
        finish = REASONS.get(output.finish or "") if output else None
        if finish == "stop" and self._called[index]:
            finish = "tool_calls"
        choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
        if self.asked.logprobs:
            choice["logprobs"] = {"content": logprobs, "refusal": None}
        if output and output.finish:
            choice["stop_reason"] = stop_reason(output, self.asked)
        return choice

    def _logprob(self, told: Logprob) -> dict[str, Any]:
        top = [self._spelled(token, value) for token, value in told.top]
        return {**self._spelled(told.token, told.logprob), "top_logprobs": top}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(self.tokenizer, token),
            "logprob": shown(logprob),
            "bytes": list(token_bytes(self.tokenizer, token)),
        }


def _delta(event: Event) -> dict[str, Any]:
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallBegun(index, id, name):
            function: dict[str, Any] = {"name": name, "arguments": ""}
            call = {"index": index, "id": id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    raise AssertionError(event)

"""A model's text as the parts of a message: reasoning, content, tool calls.

There is one parser, and it is incremental: a message that comes at once is its events joined, so
streamed and whole answers agree.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from qnext.server.parse_text import (
    SPACES,
    Arguments,
    CallBegun,
    Content,
    Event,
    Reasoning,
    Source,
    Wait,
)
from qnext.server.parse_tools import OPEN, CallReader, functions

THINK, THINK_END = "<think>", "</think>"
HEADER = "<|im_start|>assistant"


def opens_reasoning(prompt: str) -> bool:
    """Whether the text after a rendered prompt begins inside of reasoning.

    So it does where the prompt ends with `<think>`, or with an assistant's message that begins
    with it and is to be continued.
    """
    _, header, begun = prompt.rpartition(HEADER)
    inside = begun.lstrip().startswith(THINK) and THINK_END not in begun
    return bool(header and inside) or re.search(rf"{THINK}\s*\Z", prompt) is not None


class Parser:
    """Turns text that comes in pieces into events; how it was cut makes no difference.

    tools: as in OpenAI's requests; without any, tool calls stay text. opened: whether the prompt
    opened the reasoning, see `opens_reasoning`. reasoning: off, it stays text as well. parallel:
    off, what follows the first tool call is dropped. make_id: the id of a new call.
    Raises InputError for tools that are none; whatever the text is, nothing is raised.
    """

    def __init__(
        self,
        make_id: Callable[[], str],
        tools: Sequence[Mapping[str, object]] = (),
        *,
        reasoning: bool = True,
        opened: bool = False,
        parallel: bool = True,
    ) -> None:
        self.reasoning, self.opened, self.parallel = reasoning, opened, parallel
        self._source = Source()
        self._events: list[Event] = []
        self._has_content = False
        tools_by_name = functions(tools)
        self._calls = CallReader(self._source, tools_by_name, self._events.append, make_id)
        self._reader = self._read()

    def push(self, text: str) -> list[Event]:
        """Take the next piece; what became certain with it."""
        self._source.rest += text
        return self._advanced()

    def finish(self) -> list[Event]:
        """The events of what was held back; no text follows."""
        self._source.ended = True
        return self._advanced()

    def _advanced(self) -> list[Event]:
        next(self._reader, None)
        # the list itself is shared with the reader of calls
        events = self._events[:]
        self._events.clear()
        return events

    def _read(self) -> Wait[None]:
        if self.reasoning and (self.opened or (yield from self._source.try_take(THINK))):
            yield from self._reason()
        if self._calls.tools:
            yield from self._answer()
        else:
            yield from self._pass_on(self._say)

    def _reason(self) -> Wait[None]:
        """Newlines at both ends belong to the tags, as Qwen's templates write them."""
        yield from self._source.skip("\n")
        if (yield from self._source.flow(THINK_END, "\n", self._think)) is not None:
            self._source.take(len(THINK_END))
            yield from self._source.skip("\n")

    def _answer(self) -> Wait[None]:
        """Content and tool calls in turn."""
        while (gap := (yield from self._source.flow(OPEN, SPACES, self._say))) is not None:
            self._source.take(len(OPEN))
            if not (yield from self._calls.read(partial(self._space, gap))):
                self._say(gap + OPEN)
            elif not self.parallel:
                yield from self._pass_on(lambda text: None)
            elif (yield from self._source.comes(OPEN)):
                yield from self._source.skip(SPACES)
            elif not self._source.rest.strip(SPACES):  # the end
                self._source.take(len(self._source.rest))

    def _space(self, gap: str) -> None:
        """Whitespace between content and a call: the template puts a newline of its own there."""
        if self._has_content:
            self._say(gap.removesuffix("\n"))

    def _pass_on(self, emit: Callable[[str], None]) -> Wait[None]:
        while (yield from self._source.peek()):
            emit(self._source.take(len(self._source.rest)))

    def _say(self, text: str) -> None:
        if text:
            self._has_content = True
            self._events.append(Content(text))

    def _think(self, text: str) -> None:
        if text:
            self._events.append(Reasoning(text))


def assemble(events: Iterable[Event]) -> dict[str, object]:
    """The message that events are, as in OpenAI's answers.

    content: None where there are only calls. reasoning_content: None without any. tool_calls: a
    list, maybe empty.
    """
    content, reasoning = "", ""
    calls: dict[int, dict[str, str]] = {}
    for event in events:
        match event:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case CallBegun(index, id, name):
                calls[index] = {"id": id, "name": name, "arguments": ""}
            case Arguments(index, text):
                calls[index]["arguments"] += text
    return {
        "content": content if content or not calls else None,
        "reasoning_content": reasoning or None,
        "tool_calls": [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in calls.values()
        ],
    }

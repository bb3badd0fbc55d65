"""Server-sent events of a streamed answer, and what they say of a request."""

import json
import re
from contextlib import suppress
from typing import Any

from qnext.bench.figures import Record

DONE = "[DONE]"
MOST_OF_ERROR = 500  # characters of an error's text that are kept


class FailedError(Exception):
    """A request that failed in a way of its own; the rest are aiohttp's errors."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


class Events:
    """The data of server-sent events, from bytes however they were cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """The events that these bytes complete."""
        # a carriage return at the end waits: a newline may belong to it
        *lines, self._rest = re.split(rb"\r\n|\n|\r(?!\Z)", self._rest + piece)
        return [event for line in lines if (event := self._line(line)) is not None]

    def end(self) -> list[str]:
        """The last event, where the blank line after it is missing."""
        return self.feed(b"\n\n")

    def _line(self, line: bytes) -> str | None:
        if not line:
            data, self._data = self._data, []
            return b"\n".join(data).decode("utf-8", "replace") if data else None
        name, _, value = line.partition(b":")  # of a comment, the name is empty
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return None


def note(record: Record, data: str, now: float) -> None:
    """Write down what an event says. Raises FailedError for an error."""
    try:
        event = json.loads(data)
    except json.JSONDecodeError as error:
        raise FailedError("bad event", f"{error}: {data}") from error
    if not isinstance(event, dict):
        raise FailedError("bad event", data)
    if event.get("error") or event.get("object") == "error":
        raise FailedError("error event", reason(event))
    try:
        _note(record, event, now)
    except (AttributeError, TypeError) as error:  # a list where an object should be, and the like
        raise FailedError("bad event", data) from error


def _note(record: Record, event: dict[str, Any], now: float) -> None:
    if event.get("usage"):  # servers may send it in every event: the last one holds
        _count(record, event["usage"])
    choices = event.get("choices") or ()
    if any(map(_says, choices)):
        record.text_times.append(now)
    for choice in choices:
        record.finish = choice.get("finish_reason") or record.finish


def _says(choice: dict[str, Any]) -> bool:
    """Whether a choice brings something of the answer: text, reasoning or a part of a call."""
    delta = choice.get("delta") or {}
    names = ("content", "reasoning_content", "reasoning", "tool_calls", "function_call")
    return bool(choice.get("text")) or any(delta.get(name) for name in names)


def _count(record: Record, usage: dict[str, Any]) -> None:
    record.input_tokens = _integer(usage, "prompt_tokens")
    record.output_tokens = _integer(usage, "completion_tokens")
    record.cached_tokens = _integer(usage.get("prompt_tokens_details"), "cached_tokens")
    details = usage.get("completion_tokens_details")
    record.accepted_guesses = _integer(details, "accepted_prediction_tokens")
    record.rejected_guesses = _integer(details, "rejected_prediction_tokens")


def _integer(counts: dict[str, Any] | None, name: str) -> int | None:
    value = counts.get(name) if counts else None
    return value if isinstance(value, int) else None


def reason(body: Any) -> str:
    """The message in an error's body, in OpenAI's shape or FastAPI's; else the body."""
    if isinstance(body, str):
        with suppress(json.JSONDecodeError):
            return reason(json.loads(body))
        return body[:MOST_OF_ERROR]
    inner = body.get("error") if isinstance(body, dict) else None
    for holder in (inner, body):
        if isinstance(holder, dict) and isinstance(holder.get("message"), str):
            return str(holder["message"])[:MOST_OF_ERROR]
    return str(inner or body)[:MOST_OF_ERROR]

"""Asking a server for completions and chats: bodies in, answers, events and errors out."""

import json
from typing import Any

import httpx

from tests.server.conftest import SECONDS, Running

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def post(server: Running, path: str, body: Any) -> httpx.Response:
    """A body goes out in ASCII, so that it may have what UTF-8 cannot express."""
    headers = {"Content-Type": "application/json"}
    content = json.dumps(body)
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=SECONDS)


def ask(server: Running, path: str, **body: Any) -> dict[str, Any]:
    """The whole answer."""
    response = post(server, path, body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(server: Running, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a streamed answer, all but the last, [DONE]."""
    response = post(server, path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """What is told of an error, in OpenAI's shape."""
    body: dict[str, Any] = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return error


def refused(server: Running, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
    """The error that a body is refused with."""
    response = post(server, path, body)
    assert response.status_code == status, response.text
    return error_of(response)

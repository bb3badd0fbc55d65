"""A server for the chat page that streams what a test has written."""

import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

import qnext.server

PAGE = Path(qnext.server.__file__).parent / "page.html"
LONG = 30.0  # seconds that nothing here should take


def delta(finish: str | None = None, **parts: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": parts, "finish_reason": finish}]}


def usage(prompt: int, made: int, cached: int = 0, right: int = 0, wrong: int = 0) -> Any:
    told: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": made}
    told["prompt_tokens_details"] = {"cached_tokens": cached}
    guesses = {"accepted_prediction_tokens": right, "rejected_prediction_tokens": wrong}
    return {"choices": [], "usage": {**told, "completion_tokens_details": guesses}}


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


def said(text: str) -> list[Any]:
    return [delta(content=text), delta("stop"), usage(9, 3)]


@dataclass
class Fake:
    """scripts: for each request its events in order, where a threading.Event is waited for; or
    (status, body). key: of which requests must bring it."""

    scripts: list[Any] = field(default_factory=list)
    asked: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)
    key: str | None = None
    info: dict[str, Any] = field(default_factory=lambda: {"model": "tiny", "running": 1})
    looks: int = 0
    left: threading.Event = field(default_factory=threading.Event)
    origin: str = ""

    async def answer(self, request: Request) -> Response:
        path = request.url.path
        if path == "/":
            return HTMLResponse(PAGE.read_text(encoding="utf-8"))
        if path == "/health":
            return JSONResponse({"status": "serving"})
        self.looks += path == "/server_info"
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key not in (None, key):
            return JSONResponse(error("this server wants a key"), 401)
        if request.method == "GET":
            listed = {"data": [{"id": "tiny"}, {"id": "other"}]}
            return JSONResponse(self.info if path == "/server_info" else listed)
        assert path == "/v1/chat/completions"
        self.asked.put(await request.json())
        script = self.scripts.pop(0)
        if isinstance(script, tuple):
            return JSONResponse(script[1], script[0])
        return StreamingResponse(self.stream(request, script), media_type="text/event-stream")

    async def stream(self, request: Request, script: list[Any]) -> AsyncIterator[bytes]:
        try:
            for step in script:
                while isinstance(step, threading.Event) and not step.is_set():
                    if await request.is_disconnected():
                        return
                    await asyncio.sleep(0.01)
                if isinstance(step, dict):
                    yield f"data: {json.dumps(step)}\n\n".encode()
            script.clear()
            yield b"data: [DONE]\n\n"
        finally:
            if script:
                self.left.set()

    def messages(self) -> list[tuple[str, str]]:
        """(role, content) of the next request's."""
        return [(m["role"], m["content"]) for m in self.asked.get(timeout=LONG)["messages"]]

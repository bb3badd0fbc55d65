"""A small server with OpenAI's API that answers, dawdles and fails as it is told."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

INPUT, CACHED, TOKENS, ACCEPTED, REJECTED = 7, 3, 5, 2, 4


@dataclass
class Fake:
    """Its state. `failures` tells which requests fail (from 0), and how."""

    first: float = 0.0  # s to the first token
    gap: float = 0.0  # s between tokens
    failures: dict[int, str] = field(default_factory=dict)
    usage: bool = True
    model: str | None = "fake"
    vocab: int | None = 50
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    under_way: int = 0
    most: int = 0
    url: str = ""

    async def models(self, request: web.Request) -> web.Response:
        if self.model is None:
            return web.Response(status=404, text="nothing here")
        return web.json_response({"object": "list", "data": [{"id": self.model}]})

    async def tokenizer(self, request: web.Request) -> web.Response:
        return web.json_response({"vocab_size": self.vocab} if self.vocab else {})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        number = len(self.bodies)
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            return await self._answer(request, self.failures.get(number))
        finally:
            self.under_way -= 1

    async def _answer(self, request: web.Request, failure: str | None) -> web.StreamResponse:
        if failure and failure.isdigit():
            error = {"error": {"message": f"told to answer {failure}", "type": "server_error"}}
            return web.json_response(error, status=int(failure))
        if failure == "whole":
            return web.json_response({"choices": []})
        if failure == "hang":
            await asyncio.sleep(60)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": welcome\n\n")
        await asyncio.sleep(self.first)
        chat = request.path.endswith("/chat/completions")
        for token in range(TOKENS):
            if failure and token == 2:
                return await _break(request, response, failure)
            await asyncio.sleep(self.gap if token else 0)
            data = _event({"choices": [_choice(chat, token)]})
            await response.write(data[:9])  # an event in two pieces
            await asyncio.sleep(0)
            await response.write(data[9:])
        last = {"index": 0, "delta": {}, "text": "", "finish_reason": "length"}
        rest = _event({"choices": [last]})  # the end in one piece, several events
        rest += _event({"choices": [], "usage": _usage()}) if self.usage else b""
        await response.write(rest + b"data: [DONE]\n\n")
        return response


def _choice(chat: bool, token: int) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": None}
    said = {"delta": {"content": f" t{token}"}} if chat else {"text": f" t{token}"}
    return {**choice, **said}


def _usage() -> dict[str, Any]:
    return {
        "prompt_tokens": INPUT,
        "completion_tokens": TOKENS,
        "prompt_tokens_details": {"cached_tokens": CACHED},
        "completion_tokens_details": {
            "accepted_prediction_tokens": ACCEPTED,
            "rejected_prediction_tokens": REJECTED,
        },
    }


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\r\n\r\n"


async def _break(
    request: web.Request, response: web.StreamResponse, failure: str
) -> web.StreamResponse:
    if failure == "reset":
        assert request.transport is not None
        request.transport.abort()
    elif failure == "event":
        error = {"error": {"message": "out of pages", "type": "server_error"}}
        await response.write(_event(error) + b"data: [DONE]\n\n")
    elif failure == "garbage":
        await response.write(b'data: {"choices": [[]]}\n\n')
    return response  # "cut": it just ends


@contextmanager
def serve() -> Iterator[Fake]:
    """A server in a thread while the block runs."""
    server = Fake()
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        app.router.add_get("/tokenizer_info", server.tokenizer)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, server.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = "http://{}:{}".format(*runner.addresses[0])
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.01)
        await runner.cleanup()

    stop = threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        stop.set()
        thread.join(10)
        loop.close()

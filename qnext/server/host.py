"""What all routes share: the model once it is loaded, and how answers go out."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from qnext.errors import QnextError
from qnext.runtime.request import Output
from qnext.runtime.request import Request as Asked
from qnext.runtime.service import Service
from qnext.server.asked import Reader
from qnext.server.errors import ApiError, of_exception
from qnext.server.metrics import Figures, Metrics, Timer
from qnext.server.schema import Placed
from qnext.text import Tokenizer

log = logging.getLogger("qnext")
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class GoneError(Exception):
    """The client left before its answer was complete."""


class Role(Protocol):
    """A server's part where prompts are read by one server and answered by another."""

    async def prepared(
        self, asked: Placed, each: Sequence[Sequence[Asked]]
    ) -> tuple[list[list[Asked]], dict[str, Any]]:
        """For each prompt, what is asked of the engine; and what an answer tells beside."""
        ...

    def figures(self) -> Figures:
        """What /metrics tells of it."""
        ...

    def info(self) -> dict[str, Any]:
        """What /server_info tells of it."""
        ...

    def close(self) -> None:
        """End what is under way, and the transport."""
        ...


@dataclass(frozen=True)
class Ready:
    """A model that is loaded."""

    service: Service
    tokenizer: Tokenizer
    reader: Reader
    role: Role | None = None


@dataclass
class Host:
    """The state of a server: loading, serving, draining, or failed."""

    model: str
    info: dict[str, Any] = field(default_factory=dict)  # of the model and its target, to be told
    ready: Ready | None = None
    failure: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.model)

    def loaded(self, ready: Ready) -> None:
        self.metrics.watch(ready.service, ready.role.figures if ready.role else None)
        self.ready = ready

    @property
    def state(self) -> str:
        if self.ready is None:
            return "loading" if self.failure is None else "failed"
        return self.ready.service.state

    def model_for(self, name: str | None) -> Ready:
        """The loaded model, if it is the one that was asked for. Raises ApiError."""
        if self.ready is None:
            raise ApiError(503, f"the model is {self.state}: try again later", "overloaded_error")
        if name is not None:
            self.check_name(name)
        return self.ready

    def check_name(self, name: str) -> None:
        """Raise ApiError unless that is the model's name."""
        if name != self.model:
            raise ApiError(
                404,
                f"there is no model {name!r} here; this server has {self.model!r}",
                param="model",
                code="model_not_found",
            )

    def head(self, prefix: str) -> dict[str, Any]:
        """What every chunk of an answer begins with."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.model,
        }


class Watch:
    """Times an answer's outputs for the metrics, and leaves figures for the log."""

    def __init__(self, host: Host, request: Request) -> None:
        self.timers: dict[int, Timer] = {}
        self.host, self.request = host, request
        self.began = time.monotonic()
        self.last: dict[int, Output] = {}

    def note(self, index: int, output: Output) -> None:
        timer = self.timers.setdefault(index, Timer(self.host.metrics, self.began))
        timer.note(output, time.monotonic())
        self.last[index] = output
        if output.finish:
            lasts = self.last.values()
            self.request.state.figures = {
                "prompt": sum(o.prompt for o in lasts),
                "cached": sum(o.cached for o in lasts),
                "new": sum(o.made for o in lasts),
                "finish": output.finish,
            }
            if output.uncached:  # why `cached` is 0 whatever the prompt
                self.request.state.figures["uncached"] = output.uncached


async def placed(
    request: Request, ready: Ready, asked: Placed, each: list[list[Asked]]
) -> tuple[list[list[Asked]], dict[str, Any]]:
    """The requests of each prompt as the server's role has them; what an answer tells beside."""
    if ready.role is None:
        return each, {}
    return await attended(request, ready.role.prepared(asked, each))


async def attended(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled when the client leaves: then GoneError."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def streamed(request: Request, chunks: AsyncGenerator[Mapping[str, Any], None]) -> Response:
    """Chunks as server-sent events. What fails before the first of them is an error as any other;
    later ones end with an event that tells the error."""
    try:
        first = await attended(request, anext(chunks))
    except StopAsyncIteration:
        first = None
    except BaseException:
        await chunks.aclose()
        raise

    async def events() -> AsyncGenerator[bytes, None]:
        async with aclosing(chunks):
            try:
                if first is not None:
                    yield event(first)
                async for chunk in chunks:
                    yield event(chunk)
            except Exception as error:
                if not isinstance(error, ApiError | QnextError):  # our mistake, told in the log
                    log.exception("an answer broke off")
                yield event(of_exception(error).body)
        yield DONE

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + _json(chunk) + b"\n\n"


def answered(body: Mapping[str, Any]) -> Response:
    return Response(_json(body), media_type="application/json")


def failed(error: ApiError) -> Response:
    """An error as a response; in ASCII, as a message may quote text that UTF-8 cannot express."""
    body = json.dumps(error.body)
    return Response(body, error.status, error.headers, media_type="application/json")


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _json(value: Mapping[str, Any]) -> bytes:
    return _encode(value).encode("utf-8", "replace")

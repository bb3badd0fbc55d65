"""What stands before every route: keys, sizes, request ids, one line of log a request."""

import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from qnext.server.errors import ApiError

log = logging.getLogger("qnext.access")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN = ("/", "/health")  # without a key: a page without secrets, and what load balancers ask
ID = b"x-request-id"
LONGEST_ID = 128
MOST_BYTES = 16 << 20  # of a body


class Guard:
    """ASGI middleware: 401 without a right key, 413 for bodies that are too large, X-Request-Id
    echoed (made where there is none), and a line for each request without a word of its prompt."""

    def __init__(
        self,
        app: Any,
        keys: Sequence[str],
        most_bytes: int,
        json_log: bool,
        count: Callable[[str, str], None],
    ) -> None:
        self.app, self.most_bytes, self.json_log = app, most_bytes, json_log
        self.count = count  # is told each answer's route and status
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _id_of(headers.get(ID))
        scope.setdefault("state", {})["request_id"] = request_id
        began, status = time.monotonic(), [0]

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [*message.get("headers", ()), (ID, request_id.encode())]
            await send(message)

        try:
            refused = self._refused(scope, headers)
            if refused:
                await answer(refused, told)
            else:
                await self.app(scope, _Limited(receive, self.most_bytes), told)
        finally:
            self._tell(scope, status[0], time.monotonic() - began, request_id)

    def _refused(self, scope: Message, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._keys and scope["path"] not in OPEN and not self._knows(headers):
            return ApiError(
                401,
                "this server wants a key: send the header 'Authorization: Bearer KEY'",
                "authentication_error",
                code="invalid_api_key",
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most_bytes:
            return too_large(self.most_bytes)
        return None

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        # every key is compared, in constant time: neither tells how much of it was right
        known = False
        for key in self._keys:
            known |= hmac.compare_digest(given.strip(), key)
        return known

    def _tell(self, scope: Message, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "none")  # a path may be anything
        self.count(route, str(status or "gone"))
        facts = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status or "gone",  # the client left before there was an answer
            "seconds": round(seconds, 3),
            "id": request_id,
            **scope["state"].get("figures", {}),
        }
        if self.json_log:
            log.info(json.dumps(facts))
        else:
            log.info(" ".join(f"{name}={_plain(value)}" for name, value in facts.items()))


class _Limited:
    """`receive` that stops a body which is longer than its header said, or had no header."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.left, self.most = receive, most, most

    async def __call__(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.request":
            self.left -= len(message.get("body", b""))
            if self.left < 0:
                raise too_large(self.most)
        return message


def too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes, the most this server takes")


async def answer(error: ApiError, send: Send) -> None:
    """Send an error as a whole response."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= error.headers
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


def _id_of(given: bytes | None) -> str:
    """The client's request id where it is a plain one, so that none can forge a line of log."""
    text = (given or b"").decode("latin-1")
    plain = 0 < len(text) <= LONGEST_ID and all(33 <= ord(c) < 127 for c in text)
    return text if plain else uuid.uuid4().hex


def _plain(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else ascii(text)

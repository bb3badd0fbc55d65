"""Servers that read prompts for others, and servers that answer prompts which others have read.

Two conventions name the two sides to each other. sglang-router posts one body to both at once, with
`bootstrap_host`, `bootstrap_port` and `bootstrap_room`: the port is this server's own. vllm-router
posts to the side that prefills first, asking for `kv_transfer_params` with `do_remote_decode`, and
gives those that it answers to the side that decodes.

Whatever goes wrong with a hand-off, the side that decodes reads the prompt itself.
"""

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from fastapi import APIRouter, Request, Response

from qnext.functional.state import pages_of
from qnext.handoff.layout import Layout, layout_of
from qnext.handoff.manifest import Claim, HandoffError, Offer, claim_of
from qnext.handoff.mooncake import BELL
from qnext.handoff.receive import Receiver
from qnext.handoff.send import Sender
from qnext.handoff.transport import Transport
from qnext.runtime.engine import Engine
from qnext.runtime.kept import Kept
from qnext.runtime.request import Request as Asked
from qnext.runtime.request import Start
from qnext.server.errors import ApiError, bad
from qnext.server.metrics import Figures
from qnext.server.native import host_of
from qnext.server.schema import Placed

log = logging.getLogger("qnext")
router = APIRouter()
REACHED, TAKEN = 1.0, 3.0  # seconds until a peer is reached, and until it says that it has an offer
T = TypeVar("T")


class Where(NamedTuple):
    """A prompt's room at the side that prefills."""

    host: str
    port: int
    room: str

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class Values:
    """What values of an engine's model are: of which weights, laid out how."""

    def __init__(self, engine: Engine) -> None:
        self.like = engine.worker.like
        self.model = engine.params.config.fingerprint
        self.weights = engine.worker.moves.digest(engine.params)

    def of(self, tokens: Sequence[int]) -> tuple[Claim, Layout]:
        """The value after these tokens."""
        layout = layout_of(self.like, pages_of(len(tokens)))
        return claim_of(self.model, self.weights, tokens, layout), layout


def pool_bytes(engine: Engine) -> int:
    """Of a pool that takes the values of as many sequences as the engine's own pages do."""
    like, options = engine.worker.like, engine.options
    one, two = (layout_of(like, pages).nbytes for pages in (1, 2))
    return BELL + options.rows * one + options.pool * (two - one)


class Prefiller:
    """The role of a server that reads prompts for others.

    host, port: as those reach it. seconds: how long a value waits for somebody who wants it.
    """

    def __init__(
        self, engine: Engine, transport: Transport, host: str, port: int, seconds: float
    ) -> None:
        self.values, self.host, self.port = Values(engine), host, port
        self.sender = Sender(transport, seconds, first=BELL)
        self.transport = transport

    async def prepared(
        self, asked: Placed, each: Sequence[Sequence[Asked]]
    ) -> tuple[list[list[Asked]], dict[str, Any]]:
        """Requests that read the prompts alone, and what an answer tells beside; as they came where
        no hand-off is asked for."""
        rooms = _rooms(asked, len(each))
        told: dict[str, Any] = {}
        if rooms is None and (asked.kv_transfer_params or {}).get("do_remote_decode"):
            rooms = [uuid.uuid4().hex for _ in each]
            told["kv_transfer_params"] = {
                "do_remote_decode": False,
                "do_remote_prefill": True,
                "remote_host": self.host,
                "remote_port": self.port,
                "remote_engine_id": self.transport.address,
                "remote_block_ids": [],
                "rooms": rooms,
            }
        if rooms is None:
            return [list(choices) for choices in each], {}
        reading = list[Asked]()
        try:
            for choices, room in zip(each, rooms, strict=True):
                reading.append(self._reading(choices[0], room))
        except HandoffError as error:
            for request in reading:
                if request.handoff is not None:
                    request.handoff.fail(f"another prompt of its request was refused: {error}")
            raise ApiError(503, str(error), "overloaded_error") from error
        return [[request] for request in reading], told

    def _reading(self, request: Asked, room: str) -> Asked:
        if len(request.tokens) < 2:  # there is nothing to read
            return replace(request, max_new_tokens=1, min_new_tokens=0, guide=None)
        outgoing = self.sender.open(room, *self.values.of(request.tokens[:-1]))
        return Asked(
            tokens=request.tokens,
            max_new_tokens=0,
            handoff=outgoing,
            marks=request.marks,
            priority=request.priority,
            deadline=request.deadline,
            cache=request.cache,
        )

    def figures(self) -> Figures:
        stats = self.sender.stats
        return Figures(stats.values, stats.nbytes, stats.seconds, dict(stats.failures))

    def info(self) -> dict[str, Any]:
        return {"role": "prefill", "handoff_bytes_held": self.sender.regions.taken}

    def close(self) -> None:
        self.sender.close()
        self.transport.close()


class Decoder:
    """The role of a server that answers prompts which others have read.

    seconds: how long a hand-off may take; then the prompt is read here. peers: the hosts that may
    be named as those which prefill (none: any); they alone are told the `key`, if they want one.
    """

    def __init__(
        self,
        engine: Engine,
        transport: Transport,
        seconds: float,
        peers: Sequence[str] = (),
        key: str | None = None,
    ) -> None:
        self.values, self.transport, self.seconds = Values(engine), transport, seconds
        self.receiver = Receiver(transport, first=BELL)
        self.full = 0  # prompts for whose values there was no room
        self.peers = frozenset(peers)
        # whoever sends a request says where its prompt is read: no key goes to just anybody
        self._headers = {"Authorization": f"Bearer {key}"} if key and peers else {}

    async def prepared(
        self, asked: Placed, each: Sequence[Sequence[Asked]]
    ) -> tuple[list[list[Asked]], dict[str, Any]]:
        """Requests that begin where the prompts were read to, if they were."""
        places = _places(asked, len(each))
        if places is None:
            return [list(choices) for choices in each], {}
        for where in places:
            if self.peers and where.host not in self.peers:
                raise ApiError(403, f"{where.host!r} is no --peer of this server")
        starts = await asyncio.gather(
            *(self._start(where, choices) for where, choices in zip(places, each, strict=True))
        )
        begun = [
            [replace(request, start=start) for request in choices]
            for choices, start in zip(each, starts, strict=True)
        ]
        return begun, {}

    async def _start(self, where: Where, choices: Sequence[Asked]) -> Start | None:
        """What the choices for a prompt begin with; None where it must be read here."""
        read = choices[0].tokens[:-1]
        if not read:
            return None
        try:
            return Start(len(read), await self._value(where, read), uses=len(choices))
        except HandoffError as error:
            log.warning("room %s: %s; the prompt is read here", where.room, error)
            return None

    async def _value(self, where: Where, tokens: Sequence[int]) -> Kept:
        claim, layout = self.values.of(tokens)
        try:
            expected = self.receiver.expect(where.room, claim, layout, self.seconds)
        except HandoffError:
            self.full += 1
            raise
        try:
            if refusal := await self._offer(where, expected.offer):
                self.receiver.cancel(expected, *refusal)
            return await asyncio.wrap_future(expected.value)
        finally:
            self.receiver.cancel(expected)  # if nobody waits for it any more

    async def _offer(self, where: Where, offer: Offer) -> tuple[str, str] | None:
        """Tell the other side; why it does not take the offer, and what that counts as."""
        import aiohttp

        limit = aiohttp.ClientTimeout(total=min(self.seconds, TAKEN), sock_connect=REACHED)
        body = offer.model_dump_json()
        try:
            async with (
                aiohttp.ClientSession(headers=self._headers, timeout=limit) as session,
                session.post(f"{where.url}/handoff", data=body) as reply,
            ):
                if reply.status != 202:
                    return f"{where.url} refuses: {(await reply.text())[:500]}", "refused"
        except (aiohttp.ClientError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            return f"{where.url} does not answer: {why}", "unreachable"
        return None

    def figures(self) -> Figures:
        stats = self.receiver.stats
        failures = {**stats.failures, "full": self.full}
        return Figures(stats.values, stats.nbytes, stats.seconds, failures)

    def info(self) -> dict[str, Any]:
        return {"role": "decode", "handoff_bytes_held": self.receiver.regions.taken}

    def close(self) -> None:
        self.receiver.close()
        self.transport.close()


@router.post("/handoff", include_in_schema=False)
async def handoff(request: Request) -> Response:
    """A decoder's offer: where the value of a prompt that is read here is to be written."""
    ready = host_of(request).model_for(None)
    if not isinstance(ready.role, Prefiller):
        raise ApiError(404, "this server hands nothing off: start it with --role prefill")
    try:
        offer = Offer.model_validate_json(await request.body())
    except ValueError as error:
        raise bad(f"the body is no offer: {error}") from error
    try:
        ready.role.sender.offered(offer)
    except HandoffError as error:
        raise ApiError(409, str(error)) from error
    return Response(status_code=202)


def _rooms(asked: Placed, count: int) -> list[str] | None:
    """The rooms of so many prompts, as sglang-router names them; None where it names none."""
    rooms = _each(asked.bootstrap_room, count, "bootstrap_room")
    return None if rooms is None else [str(room) for room in rooms]


def _places(asked: Placed, count: int) -> list[Where] | None:
    """Where so many prompts are read; None where nobody says."""
    rooms = _rooms(asked, count)
    if rooms is not None:
        hosts = _each(asked.bootstrap_host, count, "bootstrap_host")
        ports = _each(asked.bootstrap_port, count, "bootstrap_port")
        if hosts is None or ports is None:
            raise bad(
                "bootstrap_room needs bootstrap_host and bootstrap_port, this server's peer and "
                "the port that it listens on",
                "bootstrap_room",
            )
        return [
            Where(host, port, room) for host, port, room in zip(hosts, ports, rooms, strict=True)
        ]
    given = asked.kv_transfer_params or {}
    if not given.get("do_remote_prefill"):
        return None
    rooms = given.get("rooms")
    host, port = given.get("remote_host"), given.get("remote_port")
    if not (
        isinstance(host, str)
        and isinstance(port, int)
        and isinstance(rooms, list)
        and len(rooms) == count
    ):
        raise bad(
            "kv_transfer_params: give those that the side which prefills has answered",
            "kv_transfer_params",
        )
    return [Where(host, port, str(room)) for room in rooms]


def _each(value: T | list[T] | None, count: int, name: str) -> list[T] | None:
    """A value for each of so many prompts; of one for each choice the first of a prompt's."""
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    if not values or len(values) % count:
        raise bad(f"{name}: has {len(values)} for {count} prompts", name)
    return values[:: len(values) // count]

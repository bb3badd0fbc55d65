"""A load generator for servers that speak OpenAI's API: what it asks, when, and what it notes."""

import asyncio
import itertools
import json
import math
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from qnext.bench.events import DONE, Events, FailedError, note, reason
from qnext.bench.figures import INTERRUPTED, Record
from qnext.bench.prompts import Drawn, Prompts, arrivals, read_prompts
from qnext.errors import InputError

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
UNKNOWN_VOCAB = 1000  # every tokenizer has so many tokens
BREATH = 0.1  # s a worker waits after a lost connection, else it would ask in a frenzy
LINGER = 1.0  # s for a stream to close after its last event, so that its connection serves again
NEEDS = "needs the extra: pip install 'qnext[bench]'"


@dataclass(frozen=True)
class Options:
    """What to ask and how often. Raises InputError where that makes no sense."""

    url: str
    prompts: Path
    model: str | None = None  # None: the first that the server tells
    endpoint: str = "chat"
    concurrency: int | None = 16  # closed loop: so many at once
    rate: float | None = None  # open loop: so many a second
    requests: int | None = 100
    duration: float | None = None
    input_tokens: int | None = None  # random prompts in place of the file's
    output_tokens: int = 128
    shared_prefix: int = 0
    seed: int = 0
    api_key: str | None = field(default=None, repr=False)
    warmup: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.url):
            raise InputError(f"--url must begin with http:// or https://, got {self.url!r}")
        for name in ("concurrency", "requests", "input_tokens", "output_tokens"):
            self._check(name, 1)
        for name in ("shared_prefix", "seed", "warmup", "temperature"):
            self._check(name, 0)
        for name in ("rate", "duration", "timeout"):
            self._check(name, 0, itself=False)
        if self.shared_prefix > (self.input_tokens or 0):
            raise InputError(
                f"--shared-prefix {self.shared_prefix} is a part of random prompts: give "
                "--input-tokens, at least as many"
            )

    def _check(self, name: str, least: int, itself: bool = True) -> None:
        value = getattr(self, name)
        if value is None or (least < value < math.inf) or (itself and value == least):
            return
        option = name.replace("_", "-")
        raise InputError(f"--{option} must be {'>=' if itself else '>'} {least}, got {value}")

    @property
    def base(self) -> str:
        """The server's root; clients' base URLs often end in /v1."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    def to_json(self) -> dict[str, Any]:
        """All of them, but for the key."""
        told = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}
        return {**told, "api_key": None if self.api_key is None else "given"}


# ---- one request


class Client:
    """Sends requests and notes what becomes of them."""

    def __init__(
        self, session: "ClientSession", options: Options, model: str, prompts: Prompts
    ) -> None:
        self.session, self.options, self.model, self.prompts = session, options, model, prompts
        self.began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.began

    async def ask(self, records: list[Record], index: int, planned: float | None = None) -> Record:
        """Send one request and read its answer; its record is added however it ends."""
        from aiohttp import ClientError

        body = self._body(index)
        record = Record(index, planned, sent=self.now())
        try:
            await self._answer(body, record)
        except FailedError as error:
            record.error, record.message = error.kind, error.message
        except TimeoutError:
            record.error, record.message = "timeout", f"over {self.options.timeout:g} s"
        except (ClientError, OSError) as error:
            record.error, record.message = "connection", str(error) or type(error).__name__
        except asyncio.CancelledError:
            record.error = INTERRUPTED
            raise
        finally:
            record.ended = record.ended or self.now()
            records.append(record)
        return record

    def _body(self, index: int) -> bytes:
        options = self.options
        body = {
            "model": self.model,
            **self.prompts.body(index),
            "max_tokens": options.output_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body).encode()

    async def _answer(self, body: bytes, record: Record) -> None:
        from aiohttp import ClientError

        head = {"Content-Type": "application/json"}
        url = self.options.base + PATHS[self.options.endpoint]
        async with self.session.post(url, data=body, headers=head) as response:
            if response.status != 200:
                text = await response.text(errors="replace")
                raise FailedError(f"HTTP {response.status}", reason(text))
            try:
                await self._read(response, record)
            except TimeoutError:  # some are ClientErrors, too
                raise
            except (ClientError, OSError) as error:
                raise FailedError("broken stream", str(error) or type(error).__name__) from error

    async def _read(self, response: "ClientResponse", record: Record) -> None:
        """Note a stream's events until the last."""
        events, seen = Events(), False
        async for piece in response.content.iter_any():
            now = self.now()
            for data in events.feed(piece):
                if data == DONE:
                    record.ended = now
                    await _close(response)
                    return
                seen = True
                note(record, data, now)
        for data in events.end():
            seen = True
            if data != DONE:
                note(record, data, self.now())
        if not seen:
            raise FailedError("no stream", f"an answer of type {response.content_type}")
        if record.finish is None:
            raise FailedError("broken stream", "it ended without a finish_reason or [DONE]")


async def _close(response: "ClientResponse") -> None:
    """Read a stream to its end; what may still go wrong is no longer a matter of the answer."""
    from aiohttp import ClientError

    with suppress(TimeoutError, ClientError, OSError):
        async with asyncio.timeout(LINGER):
            await response.content.read()


# ---- a run


class Bench:
    """One run. Cut off at any time, `records` holds what was measured until then."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.records: list[Record] = []
        self.warmed: list[Record] = []
        self.model = options.model or ""
        self.vocab: int | None = None  # that token ids of random prompts are drawn from
        self.seconds = 0.0
        self._listed: Prompts | None = None
        if options.input_tokens is None:  # now, as a file may be refused
            self._listed = read_prompts(options.prompts, options.endpoint == "chat")

    async def run(self) -> None:
        """Ask the server. Raises InputError where it cannot be asked at all."""
        aiohttp = import_aiohttp()
        options = self.options
        head = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=options.timeout),
            headers=head,
        ) as session:
            self.model = await self._find_model(session)
            prompts = self._listed or await self._draw(session)
            client = Client(session, options, self.model, prompts)
            await self._warm(client)
            client.began = time.perf_counter()
            try:
                with tqdm(total=options.requests, unit=" requests", disable=None) as bar:
                    await (self._open(client, bar) if options.rate else self._closed(client, bar))
            finally:
                self.seconds = max((r.ended for r in self.records), default=0.0)

    async def _find_model(self, session: "ClientSession") -> str:
        """The model to ask for. Asked even where it is given: a server that is not there shows."""
        status, body = await self._get(session, "/v1/models")
        if self.options.model is not None:
            return self.options.model
        match body:
            case {"data": [{"id": str(name)}, *_]}:
                return name
        raise InputError(f"GET /v1/models (HTTP {status}) tells no model: give --model")

    async def _draw(self, session: "ClientSession") -> Prompts:
        options = self.options
        if options.endpoint == "completions":
            _, body = await self._get(session, "/tokenizer_info")
            told = body.get("vocab_size") if isinstance(body, dict) else None
            self.vocab = told if isinstance(told, int) and told > 0 else UNKNOWN_VOCAB
        tokens = options.input_tokens or 0
        return Drawn(tokens, options.shared_prefix, options.seed, self.vocab)

    async def _get(self, session: "ClientSession", path: str) -> tuple[int, Any]:
        """Status and JSON of a page, None where it is no JSON."""
        from aiohttp import ClientError

        url = self.options.base + path
        try:
            async with session.get(url) as response:
                text = await response.text(errors="replace")
        except TimeoutError as error:
            raise InputError(f"{url} gave no answer in {self.options.timeout:g} s") from error
        except (ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise InputError(f"{url} cannot be asked: {reason}. Is the server running?") from error
        try:
            return response.status, json.loads(text)
        except json.JSONDecodeError:
            return response.status, None

    async def _warm(self, client: Client) -> None:
        """Requests that do not count; where all fail, measuring is vain."""
        indices = range(-self.options.warmup, 0)
        await _work(client, self.warmed, iter(indices), self.options.concurrency or len(indices))
        if self.warmed and all(record.error for record in self.warmed):
            first = self.warmed[0]
            raise InputError(
                f"no warm-up request was answered; the first: {first.error}: {first.message}"
            )

    async def _closed(self, client: Client, bar: Any) -> None:
        """So many workers, each of which sends when its last request has ended."""
        options = self.options
        numbers = itertools.count() if options.requests is None else range(options.requests)

        def go_on() -> Iterable[int]:
            for index in numbers:
                if options.duration is not None and client.now() >= options.duration:
                    return
                yield index

        await _work(client, self.records, iter(go_on()), options.concurrency or 1, bar)

    async def _open(self, client: Client, bar: Any) -> None:
        """Requests at times drawn beforehand, however the server keeps up."""
        options = self.options
        assert options.rate is not None
        times = arrivals(options.rate, options.seed, options.requests, options.duration)

        async def ask(index: int, planned: float) -> None:
            await client.ask(self.records, index, planned)
            bar.update()

        async with asyncio.TaskGroup() as group:
            for index, planned in enumerate(times):
                await asyncio.sleep(planned - client.now())
                group.create_task(ask(index, planned))


async def _work(
    client: Client, records: list[Record], indices: Any, workers: int, bar: Any = None
) -> None:
    async def work() -> None:
        for index in indices:
            record = await client.ask(records, index)
            if bar is not None:
                bar.update()
            if record.error == "connection":
                await asyncio.sleep(BREATH)

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())


def import_aiohttp() -> Any:
    """aiohttp, which the rest of qnext does without."""
    try:
        import aiohttp
    except ModuleNotFoundError as error:
        raise InputError(f"qnext bench serve {NEEDS} ({error.name} is missing)") from error
    return aiohttp

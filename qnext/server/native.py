"""Routes beside OpenAI's: health, server_info, tokenizer, and SGLang's /generate."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

import qnext
from qnext.runtime.request import Output
from qnext.runtime.request import Request as Asked
from qnext.server.errors import bad
from qnext.server.host import Host, Ready, Watch, answered, attended, placed, streamed
from qnext.server.schema import (
    STREAMED,
    ChatRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
)
from qnext.server.streams import REASONS, Whole, outputs

router = APIRouter()


def host_of(request: Request) -> Host:
    host: Host = request.app.state.host
    return host


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests are taken, else 503: loading, draining, closed, or failed."""
    host = host_of(request)
    serving = host.state == "serving"
    body = {"status": host.state} | ({"message": host.failure} if host.failure else {})
    return JSONResponse(body, status_code=200 if serving else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": qnext.__version__}


@router.get("/server_info")
async def server_info(request: Request) -> dict[str, Any]:
    """What is served, on what, and how busy it is."""
    host = host_of(request)
    told: dict[str, Any] = {"model": host.model, "state": host.state, **host.info}
    if host.ready is None:
        return told
    engine = host.ready.service.engine
    board, options, stats = engine.board, engine.options, engine.stats
    role = host.ready.role
    return told | {
        **(role.info() if role else {}),
        "draft": options.draft,
        "capacity": options.capacity,
        "rows": options.rows,
        "rows_free": board.free_rows,
        "pages": options.pool,
        "pages_free": board.pages.free,
        "pages_cached": board.cache.held,
        "snapshots": len(board.cache),
        "running": len(board.running),
        "waiting": len(board.waiting),
        "generated": stats.generated,
        "preempted": stats.preempted,
        "cache_queries": stats.cache_queries,
        "cache_hits": stats.cache_hits,
        "accepted": list(stats.acceptance.rates),
        "tokens_per_step": stats.acceptance.tokens_per_step,
        "fallbacks": engine.fallbacks,
    }


@router.get("/model_info")
async def model_info(request: Request) -> dict[str, Any]:
    """What SGLang's router asks."""
    host = host_of(request)
    return {"model_path": host.model, "is_generation": True, **host.info}


@router.get("/health_generate")
async def health_generate(request: Request) -> Response:
    """200 where a token can really be drawn."""
    ready = host_of(request).model_for(None)
    asked = Asked(tokens=(0,), max_new_tokens=1, cache=False)
    await attended(request, _collected(ready, asked, None))
    return JSONResponse({"status": "serving"})


# ---- the tokenizer


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What clients without tokenizer files need to know."""
    tokenizer = host_of(request).model_for(None).tokenizer
    ends = tokenizer.eos_ids
    eos = tokenizer.special_tokens.get("eos_token")
    if eos is None and ends:
        eos = tokenizer.backend.id_to_token(ends[0])
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "eos_token_ids": list(ends),
        "bos_token": tokenizer.special_tokens.get("bos_token"),
        "pad_token": tokenizer.special_tokens.get("pad_token"),
        "vocab_size": tokenizer.vocab_size,
        "chat_template": tokenizer.template.source if tokenizer.template else None,
    }


@router.post("/tokenize")
def tokenize(request: Request, asked: TokenizeRequest) -> dict[str, Any]:
    """The tokens of a text, or of a conversation as the template writes it."""
    ready = host_of(request).model_for(None)
    if (asked.prompt is None) == (asked.messages is None):
        raise bad("give prompt or messages, one of them", "prompt")
    if asked.messages is None:
        assert asked.prompt is not None
        special = bool(asked.add_special_tokens)
        tokens = ready.tokenizer.encode(asked.prompt, add_special_tokens=special)
    else:
        chat = ChatRequest(messages=asked.messages, tools=asked.tools)
        begun = asked.add_generation_prompt is not False
        _, tokens = ready.reader.rendered(chat, begun)
    return {
        "tokens": tokens,
        "count": len(tokens),
        "max_model_len": ready.service.engine.options.capacity,
    }


@router.post("/detokenize")
def detokenize(request: Request, asked: DetokenizeRequest) -> dict[str, Any]:
    """The text of tokens, special ones included."""
    ready = host_of(request).model_for(None)
    return {"prompt": ready.tokenizer.decode(asked.tokens, skip_special_tokens=False)}


# ---- SGLang's /generate


@router.post("/generate", responses=STREAMED)
async def generate(request: Request, asked: GenerateRequest) -> Response:
    """Text of a text or of tokens. Streamed, each event has all the text so far."""
    host = host_of(request)
    ready = host.model_for(None)
    wanted = await run_in_threadpool(ready.reader.native, asked)
    each, _ = await placed(request, ready, asked, [[wanted]])
    wanted = each[0][0]
    watch = Watch(host, request)
    if asked.stream:
        return await streamed(request, _cumulative(ready, wanted, asked, watch))
    whole = await attended(request, _collected(ready, wanted, watch))
    return answered(_native_body(wanted, asked, whole))


async def _collected(ready: Ready, wanted: Asked, watch: Watch | None) -> Whole:
    whole = Whole()
    async with aclosing(outputs(ready.service, [wanted])) as stream:
        async for index, output in stream:
            _note(watch, index, output)
            whole.add(output)
    return whole


async def _cumulative(
    ready: Ready, wanted: Asked, asked: GenerateRequest, watch: Watch
) -> AsyncGenerator[dict[str, Any], None]:
    whole = Whole()
    async with aclosing(outputs(ready.service, [wanted])) as stream:
        async for index, output in stream:
            _note(watch, index, output)
            whole.add(output)
            yield _native_body(wanted, asked, whole)


def _note(watch: Watch | None, index: int, output: Output) -> None:
    if watch:
        watch.note(index, output)


def _native_body(wanted: Asked, asked: GenerateRequest, whole: Whole) -> dict[str, Any]:
    reason: dict[str, Any] | None = None
    if whole.finish:
        reason = {"type": REASONS[whole.finish]}
        if whole.finish == "length":
            reason["length"] = wanted.max_new_tokens
        elif whole.stopped_by is not None:
            reason["matched"] = whole.stopped_by
    return {
        "text": whole.text,
        "output_ids": whole.tokens,
        "meta_info": {
            "id": asked.rid or wanted.id,
            "finish_reason": reason,
            "prompt_tokens": whole.prompt,
            "completion_tokens": len(whole.tokens),
            "cached_tokens": whole.cached,
        },
    }

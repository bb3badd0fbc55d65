"""OpenAI's routes: models, completions, chat completions."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from qnext.server.chat import Chat
from qnext.server.completions import Completions
from qnext.server.host import Host, Watch, answered, attended, placed, streamed
from qnext.server.native import host_of
from qnext.server.schema import STREAMED, ChatRequest, CompletionRequest

router = APIRouter(prefix="/v1")


def _card(host: Host) -> dict[str, Any]:
    card = {"id": host.model, "object": "model", "created": host.created, "owned_by": "qnext"}
    if host.ready is not None:
        card["max_model_len"] = host.ready.service.engine.options.capacity
    return card


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_card(host_of(request))]}


@router.get("/models/{model_id:path}")
async def model(request: Request, model_id: str) -> dict[str, Any]:
    """That model, by its name."""
    host = host_of(request)
    host.check_name(model_id)
    return _card(host)


@router.post("/completions", responses=STREAMED)
async def completions(request: Request, asked: CompletionRequest) -> Response:
    """Continue one prompt or several, given as text or as tokens."""
    host = host_of(request)
    ready = host.model_for(asked.model)
    wanted = await run_in_threadpool(ready.reader.completion, asked)
    wanted, told = await placed(request, ready, asked, wanted)
    head = {**host.head("cmpl"), **told}
    made = Completions(ready, asked, wanted, head, Watch(host, request))
    if asked.stream:
        return await streamed(request, made.chunks())
    return answered(await attended(request, made.whole()))


@router.post("/chat/completions", responses=STREAMED)
async def chat_completions(request: Request, asked: ChatRequest) -> Response:
    """Answer the last message of a conversation."""
    host = host_of(request)
    ready = host.model_for(asked.model)
    prompt, wanted = await run_in_threadpool(ready.reader.chat, asked)
    each, told = await placed(request, ready, asked, [wanted])
    head = {**host.head("chatcmpl"), **told}
    made = Chat(ready, asked, prompt, each[0], head, Watch(host, request))
    if asked.stream:
        return await streamed(request, made.chunks())
    return answered(await attended(request, made.whole()))

"""The ASGI application: routes, and what is answered where something is wrong."""

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import qnext
from qnext.errors import QnextError
from qnext.server import native, openai, roles
from qnext.server.errors import ApiError, bad, of_exception
from qnext.server.guard import MOST_BYTES, Guard
from qnext.server.host import GoneError, Host, failed
from qnext.server.schema import ErrorBody

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request breaks a rule, which the message tells",
        401: "No key, or a wrong one",
        404: "No such model or path",
        405: "No such method here",
        413: "The body is too large",
        429: "Too many requests wait: try again after Retry-After",
        500: "The server failed",
        503: "The server is loading or draining",
        504: "The request took longer than it may",
    }.items()
}


def create_app(
    host: Host,
    keys: Sequence[str] = (),
    most_bytes: int = MOST_BYTES,
    origins: Sequence[str] = (),
    json_log: bool = False,
    lifespan: Callable[[FastAPI], Any] | None = None,
) -> Any:
    """The application for a host. keys: of which each request must bring one (none: open to all).

    origins: whose pages may call it from browsers (CORS).
    """
    app = FastAPI(
        title="qnext",
        version=qnext.__version__,
        description="Qwen3-Next behind OpenAI's API",
        docs_url=None,
        redoc_url=None,
        responses=REFUSALS,
        lifespan=lifespan,
    )
    app.state.host = host
    for kind in (ApiError, QnextError, HTTPException, RequestValidationError, RecursionError):
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(GoneError, _silent)
    app.add_exception_handler(Exception, _refuse)
    app.include_router(openai.router)
    app.include_router(native.router)
    app.include_router(roles.router)
    app.get("/", include_in_schema=False)(page)
    app.get("/metrics", response_class=Response, include_in_schema=False)(metrics)
    app.head("/", include_in_schema=False)(page)
    app.head("/metrics", include_in_schema=False)(metrics)
    app.head("/health", include_in_schema=False)(native.health)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    guarded: Any = Guard(app, keys, most_bytes, json_log, host.metrics.count)
    if origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    return guarded


def page() -> Response:
    return HTMLResponse(files("qnext.server").joinpath("page.html").read_text(encoding="utf-8"))


def metrics(request: Request) -> Response:
    host: Host = request.app.state.host
    return Response(generate_latest(host.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _refuse(request: Request, error: Exception) -> Response:
    match error:
        case RequestValidationError():
            return failed(_of_validation(error))
        case RecursionError():
            return failed(bad("the body is nested too deeply"))
        # what FastAPI makes of whatever was raised while it read a body
        case HTTPException(__cause__=ApiError() | RecursionError() as cause):
            return _refuse(request, cause)
        case HTTPException(status_code=400, __cause__=ValueError() as cause):
            return failed(bad(f"the body is no JSON: {cause}"))
        case HTTPException():
            made = ApiError(
                error.status_code, f"{error.detail}: {request.method} {request.url.path}"
            )
            response = failed(made)
            response.headers.update(error.headers or {})
            return response
    return failed(of_exception(error))


def _of_validation(error: RequestValidationError) -> ApiError:
    """What is wrong with a body; of several things the one deepest in it, the first of those."""
    each = [(_place(detail, error.body), detail) for detail in error.errors()]
    place, first = max(each, key=lambda pair: len(pair[0]))
    if first["type"] == "json_invalid":
        return bad(f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if not place and first["type"] != "string_unicode":  # that is of a name in it
        return bad("the body must be a JSON object, sent with Content-Type: application/json")
    message = first["msg"].removeprefix("Value error, ")
    return bad(f"{'.'.join(place) or 'body'}: {message}", place[0] if place else None)


def _place(detail: Any, body: Any) -> list[str]:
    """Where in a body something is wrong, without the names of types that pydantic tried there."""
    place, missing = [], detail["type"] == "missing"
    for part in detail["loc"][1:]:
        inside: Any = range(len(body)) if isinstance(body, list) else body
        if isinstance(inside, Mapping | range) and part in inside:
            body = body[part]
        elif not missing or part != detail["loc"][-1]:
            continue
        place.append(str(part))
    return place


def _silent(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _document(app: FastAPI) -> dict[str, Any]:
    """OpenAPI without the answer 422, which this server does not give."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        _mend_bounds(schema)
        app.openapi_schema = schema
    return app.openapi_schema


def _mend_bounds(schema: Any) -> None:
    """Bounds of integers as integers: FastAPI makes floats of them, which round large ones."""
    if isinstance(schema, list):
        for each in schema:
            _mend_bounds(each)
    elif isinstance(schema, dict):
        if schema.get("type") == "integer":
            bounds = {name: value for name, value in schema.items() if isinstance(value, float)}
            schema.update({name: int(value) for name, value in bounds.items()})
        for each in schema.values():
            _mend_bounds(each)

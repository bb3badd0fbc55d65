"""What clients are told when something is wrong: OpenAI's error body, with the right status."""

from typing import Any

from qnext.errors import InputError, QnextError
from qnext.runtime.request import ContextError, FullError, Output, RefusedError
from qnext.text import TokenizerError

INVALID, SERVER = "invalid_request_error", "server_error"
RETRY_SECONDS = 1


class ApiError(Exception):
    """An error with its HTTP status; `body` is what OpenAI's clients make typed exceptions of."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that no retry makes right."""
    return ApiError(400, message, param=param, code=code)


def of_exception(error: Exception) -> ApiError:
    """Whatever was raised, as what the client is told; our own mistakes are not told in detail."""
    match error:
        case ApiError():
            return error
        case ContextError():
            return bad(str(error), code="context_length_exceeded")
        case RefusedError():
            status = 429 if isinstance(error, FullError) else 503
            return ApiError(status, str(error), "overloaded_error", code="overloaded")
        case InputError() | TokenizerError():
            return bad(str(error))
        case QnextError():
            return ApiError(500, str(error), SERVER)
    return ApiError(500, f"the server failed: {type(error).__name__}", SERVER)


def of_output(output: Output) -> ApiError | None:
    """Why a request ended that did not end well, or None."""
    match output.finish:
        case "error":
            assert output.error is not None
            return of_exception(output.error)
        case "deadline":
            return ApiError(504, "the request took longer than it may", SERVER, code="timeout")
        case "closed":
            return ApiError(503, "the server stopped before the answer was complete", SERVER)
    return None

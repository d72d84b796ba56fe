"""Says in OpenAI's form what is wrong with a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from trimode.errors import (
    EngineError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
    TrimodeError,
    UsageError,
)

RETRY_AFTER_S = 1
CLIENT_LEFT = 499
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """Reports to a client why there is no answer.

    Attributes:
        status: HTTP status.
        message: Expected and found values, and what to do next.
        param: Field of the request that is wrong; None where it is none.
        code: Short name that programs can compare.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_S))

    def body(self) -> dict[str, Any]:
        """Return the object that OpenAI's clients read."""
        kind = _TYPES.get(self.status, "server_error")
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": about}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def api_error(error: BaseException) -> ApiError:
    """Translate an error of the library into an HTTP error.

    A client learns from it what the error means for it.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return ApiError(400, _words(error), code="invalid_value")
    if isinstance(error, QueueFullError):
        return ApiError(429, _words(error), code="queue_full")
    if isinstance(error, RequestTimeoutError):
        return ApiError(503, _words(error), code="timeout")
    if isinstance(error, RequestCancelledError):
        return ApiError(503, "the server has cancelled this request", code="cancelled")
    if isinstance(error, EngineError):
        return ApiError(503, _words(error), code="engine_stopped")
    if isinstance(error, TrimodeError):
        return ApiError(500, _words(error), code="internal")
    return ApiError(500, "the server has failed; its log says how", code="internal")


def _words(error: TrimodeError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


async def answer_http_error(_: Request, error: Exception) -> JSONResponse:
    """Answer a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    code = "unknown_path" if error.status_code == 404 else "wrong_method"
    return ApiError(
        error.status_code, str(error.detail), code=code, headers=error.headers
    ).response()

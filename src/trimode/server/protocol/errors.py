"""Declares what an error looks like."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """Says what was expected, what was found, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Holds an error, in OpenAI's form."""

    error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declare these statuses as errors, for the OpenAPI schema."""
    return {status: {"model": ErrorBody, "description": _WORDS[status]} for status in statuses}


_WORDS = {
    400: "A value cannot be used, or the body is no JSON.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body took too long.",
    413: "The body is too large.",
    422: "A field is unknown, or of another type.",
    429: "As many requests wait as may.",
    499: "The client has left.",
    503: "The server is shutting down, or its engine has stopped.",
}
OF_BODIES = (400, 401, 404, 408, 413, 422)
OF_TEXTS = (*OF_BODIES, 429, 499, 503)

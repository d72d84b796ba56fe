"""Reads bodies within their limits, and checks them against what is declared."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from trimode.server.errors import CLIENT_LEFT, ApiError
from trimode.server.limits import Limits

Model = TypeVar("Model", bound=BaseModel)
_SMALL = 1 << 16
"""Bytes that are checked on the event loop; more would keep it."""


async def read_model(request: Request, kind: type[Model], limits: Limits) -> Model:
    """Read a body.

    Raises:
        ApiError: it is too large or too slow (413, 408), no JSON (400), or not as declared (422).
    """
    body = await _read(request, limits)
    if len(body) <= _SMALL:
        return _parse(kind, body)
    return await asyncio.to_thread(_parse, kind, body)


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe a body for the OpenAPI schema.

    FastAPI does not see it by itself.
    """
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _read(request: Request, limits: Limits) -> bytes:
    most = limits.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
    except TimeoutError:
        found = f"expected the body within {limits.body_timeout_s:g} s, found it unfinished"
        raise ApiError(408, found, code="slow_body", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(CLIENT_LEFT, "the client has left", code="client_left") from None
    return b"".join(parts)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"expected a body of at most {most} bytes, found more",
        code="body_too_large",
        headers={"Connection": "close"},
    )


def _parse(kind: type[Model], body: bytes) -> Model:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise _refused(first) from None


def _refused(first: Any) -> ApiError:
    """Name the first wrong field, but not the value found there."""
    if first["type"] == "json_invalid":
        return ApiError(400, f"expected a body in JSON, found: {first['msg']}", code="invalid_json")
    param = ".".join(str(part) for part in first["loc"]) or None
    code = "unknown_field" if first["type"] == "extra_forbidden" else "invalid_field"
    return ApiError(422, f"{param or 'body'}: {first['msg']}", param=param, code=code)

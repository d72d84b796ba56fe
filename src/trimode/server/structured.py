"""Says in the engine's words what an answer has to follow."""

from __future__ import annotations

from typing import Any

from trimode.server.calling import forced_schema
from trimode.server.errors import ApiError
from trimode.server.protocol.base import Sampling
from trimode.server.protocol.chat import ChatRequest
from trimode.server.protocol.structured import JsonObject, JsonSchema, ResponseFormat


def structured_outputs_of(request: Sampling, *, is_thinking: bool) -> dict[str, Any] | None:
    """Return the engine's keyword; None for free text.

    Args:
        request: Checked request.
        is_thinking: Whether the answer begins with thinking, which follows nothing.

    Raises:
        ApiError: 400, it is asked for in two ways.
    """
    ways = {"structured_outputs": _of_fields(request)}
    if isinstance(request, ChatRequest):
        schema = forced_schema(request)
        ways["response_format"] = _of_format(request.response_format)
        ways["tool_choice"] = None if schema is None else {"json": schema}
    asked = {name: one for name, one in ways.items() if one is not None}
    if len(asked) > 1:
        raise ApiError(
            400,
            f"expected one of {', '.join(ways)}, found {' and '.join(asked)}",
            param=next(iter(asked)),
            code="invalid_value",
        )
    for found in asked.values():
        return found | ({"after_thinking": True} if is_thinking else {})
    return None


def _of_fields(request: Sampling) -> dict[str, Any] | None:
    asked = request.structured_outputs
    return None if asked is None else asked.model_dump(exclude_none=True, by_alias=True)


def _of_format(asked: ResponseFormat | None) -> dict[str, Any] | None:
    if isinstance(asked, JsonObject):
        return {"json_object": True}
    if isinstance(asked, JsonSchema):
        schema = asked.json_schema.schema_
        return {"json_object": True} if schema is None else {"json": schema}
    return None

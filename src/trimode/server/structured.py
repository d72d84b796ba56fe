"""Says in the engine's words what an answer has to follow."""

from __future__ import annotations

from typing import Any

from trimode.server.errors import ApiError
from trimode.server.protocol.base import Sampling
from trimode.server.protocol.structured import JsonObject, JsonSchema, ResponseFormat


def structured_outputs_of(request: Sampling, *, is_thinking: bool) -> dict[str, Any] | None:
    """Return the engine's keyword; None for free text.

    Args:
        request: Checked request.
        is_thinking: Whether the answer begins with thinking, which follows nothing.

    Raises:
        ApiError: 400, it is asked for in two ways.
    """
    of_format = _of_format(getattr(request, "response_format", None))
    of_fields = request.structured_outputs
    if of_format is not None and of_fields is not None:
        raise ApiError(
            400,
            "expected response_format or structured_outputs, found both",
            param="structured_outputs",
            code="invalid_value",
        )
    found = of_format
    if of_fields is not None:
        found = of_fields.model_dump(exclude_none=True, by_alias=True)
    if found is None:
        return None
    return found | ({"after_thinking": True} if is_thinking else {})


def _of_format(asked: ResponseFormat | None) -> dict[str, Any] | None:
    if isinstance(asked, JsonObject):
        return {"json_object": True}
    if isinstance(asked, JsonSchema):
        schema = asked.json_schema.schema_
        return {"json_object": True} if schema is None else {"json": schema}
    return None

"""Tells calls of tools apart in what a client reads."""

from __future__ import annotations

from typing import Any

from trimode.server.errors import ApiError
from trimode.server.outputs import Delta
from trimode.server.protocol.chat import ChatRequest, NamedTool
from trimode.server.tools import ForcedCall, Found, ToolCallParser, call_schema, schemas_of


def offered_tools(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the tools that the model may call, in plain types.

    Raises:
        ApiError: 400, a tool must be called that is not among them.
    """
    choice = request.tool_choice
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    if choice == "none":
        return []
    name = choice.function.name if isinstance(choice, NamedTool) else None
    is_missing = choice == "required" and not tools
    if is_missing or (name is not None and name not in schemas_of(tools)):
        raise ApiError(
            400,
            "expected, for this tool_choice, the tool among tools, found none",
            param="tool_choice",
            code="invalid_value",
        )
    return tools


def forced_schema(request: ChatRequest) -> dict[str, Any] | None:
    """Return the JSON schema of an answer that must be a call.

    None where it need not be one.
    """
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        return call_schema(offered_tools(request), choice.function.name)
    return call_schema(offered_tools(request)) if choice == "required" else None


class CallProcessor:
    """Moves calls into ``tool_calls``.

    Args:
        request: Request with tools.
    """

    def __init__(self, request: ChatRequest) -> None:
        self._parser: ForcedCall | ToolCallParser
        if forced_schema(request) is not None:
            self._parser = ForcedCall()
        else:
            is_parallel = request.parallel_tool_calls is not False
            schemas = schemas_of(offered_tools(request))
            self._parser = ToolCallParser(schemas, is_parallel=is_parallel)

    def push(self, delta: Delta) -> Delta:
        """Take text; return what is certain."""
        return _delta(self._parser.push(delta.content), delta.reasoning_content)

    def finish(self) -> Delta:
        """Return what was held back."""
        return _delta(self._parser.finish())

    def finish_reason(self, reason: str) -> str:
        """Return ``tool_calls`` where the text has ended with a call."""
        return "tool_calls" if self._parser.has_calls and reason == "stop" else reason


def _delta(found: Found, reasoning: str = "") -> Delta:
    return Delta(found.content, reasoning, list(found.calls))

"""Declares requests for an answer to a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from trimode.server.protocol.base import MOST_TOKENS, MOST_TOP_LOGPROBS, Sampling
from trimode.server.protocol.strict import WHOLE, Strict, Whole
from trimode.server.protocol.structured import ResponseFormat


class TextPart(Strict):
    """Holds a part of a message's text."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """Holds a call of a function: its name and its arguments.

    The arguments are JSON.
    """

    name: str
    arguments: str


class ToolCall(Strict):
    """Holds a call that an earlier answer asked for."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: Whole | None = None
    function: FunctionCall


class ChatMessage(Strict):
    """Holds a message.

    Attributes:
        role: Speaker; ``developer`` is taken for ``system``.
        content: Text, or parts of it that are joined.
        name: Name of the speaker, for templates that show it.
        tool_calls: Calls of an assistant's message.
        tool_call_id: Call that a tool's message answers.
        reasoning_content: Thinking of an assistant's message.
        refusal: Accepted from answers of OpenAI's API that are sent back; not used.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class FunctionSchema(Strict):
    """Describes a function that the model may ask to be called."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """Describes a tool."""

    type: Literal["function"]
    function: FunctionSchema


class NamedFunction(Strict):
    """Names a function."""

    name: str


class NamedTool(Strict):
    """Names the tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    """Asks for an answer to a conversation.

    Attributes:
        messages: Conversation.
        max_completion_tokens: OpenAI's newer name of ``max_tokens``.
        logprobs: Whether each token comes with its log-probability.
        top_logprobs: Number of most probable tokens that come with each token.
        tools: Tools that the model may ask for.
        tool_choice: Whether it may, must not, or must.
        parallel_tool_calls: Accepted, not used.
        response_format: OpenAI's way to ask for JSON.
        chat_template_kwargs: Values for the chat template, such as ``enable_thinking``.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS), WHOLE] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None

"""Turns messages into input for the chat template, and into token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimode.runtime.text.codec import TextCodec
from trimode.server.calling import offered_tools
from trimode.server.choices import check_most
from trimode.server.errors import ApiError
from trimode.server.limits import Limits
from trimode.server.protocol.chat import ChatMessage, ChatRequest
from trimode.server.protocol.tokenize import TokenizeRequest

_TAKEN = frozenset(
    {"messages", "tools", "documents", "chat_template", "tokenize"}
    | {"add_generation_prompt", "continue_final_message"}
)


@dataclass(frozen=True)
class Conversation:
    """Holds what the chat template takes.

    Attributes:
        messages: Messages in plain types; contents are texts.
        tools: Tools, or None.
        options: Values for the template.
        size: Characters of all texts.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    options: dict[str, Any]
    size: int


def plain_conversation(asked: ChatRequest | TokenizeRequest, limits: Limits) -> Conversation:
    """Make messages plain.

    Raises:
        ApiError: 400, there are too many messages or tools, or one has no content.
    """
    messages, tools = asked.messages or [], asked.tools or []
    check_most("messages", len(messages), limits.max_messages, "messages")
    check_most("tools", len(tools), limits.max_tools, "tools")
    plain = [_plain(number, message) for number, message in enumerate(messages)]
    options = _template_options(asked.chat_template_kwargs or {})
    if isinstance(asked, ChatRequest):
        schemas = offered_tools(asked)
    else:
        schemas = [tool.model_dump(exclude_none=True) for tool in tools]
    size = sum(len(str(message)) for message in plain)
    return Conversation(plain, schemas or None, options, size)


def render(codec: TextCodec, conversation: Conversation) -> tuple[str, list[int]]:
    """Render a conversation; texts of messages never become control tokens.

    Returns:
        The rendered prompt, and its token ids.

    Raises:
        UsageError: the template does not take the conversation.
    """
    return codec.encode_messages(
        conversation.messages, tools=conversation.tools, **conversation.options
    )


def _template_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a template's options; refuse names that the server sets.

    Such names would replace the bundle's template, or what is said elsewhere.
    """
    if taken := _TAKEN & given.keys():
        name = min(taken)
        raise ApiError(
            400,
            f"chat_template_kwargs: expected no {name}, found it",
            param=f"chat_template_kwargs.{name}",
            code="invalid_value",
        )
    return dict(given)


def _plain(number: int, message: ChatMessage) -> dict[str, Any]:
    found = message.model_dump(exclude_none=True, exclude={"refusal"})
    found["role"] = "system" if message.role == "developer" else message.role
    if isinstance(message.content, list):
        found["content"] = "".join(part.text for part in message.content)
    if message.content is None:
        if not message.tool_calls:
            raise ApiError(
                400,
                f"messages.{number}.content: expected a text, found none",
                param=f"messages.{number}.content",
                code="invalid_value",
            )
        found["content"] = ""
    for call in found.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return found


def _arguments(text: str) -> Any:
    """Return arguments as an object, or unchanged where they are none.

    Templates expect an object.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text

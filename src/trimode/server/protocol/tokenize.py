"""Declares requests for token ids, and for their text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trimode.server.protocol.chat import ChatMessage, Tool
from trimode.server.protocol.completions import TokenIds
from trimode.server.protocol.strict import Strict


class TokenizeRequest(Strict):
    """Asks for the token ids of a text or a conversation.

    A conversation is rendered by the chat template.

    Attributes:
        model: Name that the bundle is served under; None = that one.
        prompt: Text; control tokens in it count as such.
        messages: Conversation, in place of a text.
        tools: Tools of the conversation.
        chat_template_kwargs: Values for the chat template.
        return_token_strs: Whether the tokens come as texts, too.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Asks for the text of token ids, without special tokens.

    Attributes:
        model: Name that the bundle is served under; None = that one.
        tokens: Token ids.
    """

    model: str | None = None
    tokens: TokenIds

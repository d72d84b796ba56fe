"""Chooses the steps from text to answer for a request."""

from __future__ import annotations

from trimode.server.calling import CallProcessor, offered_tools
from trimode.server.outputs import OutputProcessor
from trimode.server.protocol.base import Sampling
from trimode.server.protocol.chat import ChatRequest
from trimode.server.thinking import ThinkingProcessor


def default_processors(request: Sampling, prompt: str) -> list[OutputProcessor]:
    """Return the steps that separate thinking, calls and answers of a conversation.

    There are none for a completion: its text stays as it is.
    """
    if not isinstance(request, ChatRequest):
        return []
    steps: list[OutputProcessor] = [ThinkingProcessor(prompt)]
    return [*steps, CallProcessor(request)] if offered_tools(request) else steps

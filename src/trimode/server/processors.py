"""Chooses the steps from text to answer for a request."""

from __future__ import annotations

from trimode.server.outputs import OutputProcessor
from trimode.server.protocol.base import Sampling
from trimode.server.protocol.chat import ChatRequest
from trimode.server.thinking import ThinkingProcessor


def default_processors(request: Sampling, prompt: str) -> list[OutputProcessor]:
    """Tell thinking from answers of conversations; leave completions as they are."""
    return [ThinkingProcessor(prompt)] if isinstance(request, ChatRequest) else []

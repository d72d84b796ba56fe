"""Builds the bodies of requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimode.loadtest.options import Sampling
from trimode.loadtest.questions import Message, Question

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
OPTIONAL = ("min_tokens", "seed", "stream_options")
"""Fields that some servers refuse, and a load test can go without."""


@dataclass(frozen=True)
class Request:
    """Holds where a request goes, and its body."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Composer:
    """Composes the requests of a run.

    Attributes:
        model: Name of the model.
        sampling: Values that every request asks for.
        mode: Mode, a field that only trimode knows; None = it is left out.
        left_out: Fields of :data:`OPTIONAL` that the server refuses.
    """

    model: str
    sampling: Sampling
    mode: str | None = None
    left_out: frozenset[str] = field(default_factory=frozenset)

    def compose(self, question: Question, messages: Sequence[Message]) -> Request:
        """Compose the request that answers ``messages``, or the question's token ids."""
        limit = question.max_tokens or self.sampling.max_tokens
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": limit,
            "temperature": self.sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.sampling.min_tokens is not None:
            body["min_tokens"] = min(limit, self.sampling.min_tokens)
        if self.sampling.temperature:
            body["seed"] = self.sampling.seed
        if self.mode is not None:
            body["mode"] = self.mode
        body = {name: value for name, value in body.items() if name not in self.left_out}
        if question.token_ids is not None:
            return Request(COMPLETIONS, {**body, "prompt": list(question.token_ids)})
        return Request(CHAT, {**body, "messages": list(messages)})

"""Writes answers in OpenAI's form."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trimode.server.logprobs import chat_logprobs, completion_logprobs
from trimode.server.outputs import Delta, Update
from trimode.server.service import Service
from trimode.server.tools import whole_calls

Object = dict[str, Any]


@dataclass
class Whole:
    """Gathers one text for an answer in one piece.

    Attributes:
        delta: All that the text says.
        token_ids: Its tokens.
        logprobs: Their log-probabilities; None where they were not asked for.
        finish_reason: Why it has ended.
    """

    delta: Delta = field(default_factory=Delta)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] | None = None
    finish_reason: str | None = None

    def add(self, update: Update) -> None:
        """Append news of the text."""
        self.delta.add(update.delta)
        self.token_ids += update.token_ids
        if update.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *update.logprobs]
        self.finish_reason = update.finish_reason or self.finish_reason


class Shape(Protocol):
    """Declares how an endpoint writes its answers.

    Attributes:
        with_ids: Whether choices have ``token_ids``.
    """

    with_ids: bool

    def first(self, index: int) -> Object | None:
        """Return a choice's event before any text; None without one."""
        ...

    def part(self, update: Update) -> Object:
        """Return the choice of an event."""
        ...

    def whole(self, index: int, text: Whole) -> Object:
        """Return a choice of an answer in one piece."""
        ...


class ChatShape:
    """Writes answers to conversations."""

    def __init__(self, service: Service, *, with_ids: bool) -> None:
        self._codec, self.with_ids = service.codec, with_ids

    def first(self, index: int) -> Object | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, update: Update) -> Object:
        choice = {
            "index": update.index,
            "delta": _delta(update.delta),
            "logprobs": chat_logprobs(self._codec, update.logprobs),
            "finish_reason": update.finish_reason,
        }
        return choice | ({"token_ids": update.token_ids} if self.with_ids else {})

    def whole(self, index: int, text: Whole) -> Object:
        message: Object = {"role": "assistant", "content": text.delta.content, "refusal": None}
        if text.delta.reasoning_content:
            message["reasoning_content"] = text.delta.reasoning_content
        if text.delta.tool_calls:
            calls = whole_calls(text.delta.tool_calls)
            message |= {"tool_calls": calls, "content": text.delta.content or None}
        choice = {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._codec, text.logprobs),
            "finish_reason": text.finish_reason,
        }
        return choice | ({"token_ids": text.token_ids} if self.with_ids else {})


class CompletionShape:
    """Writes continuations of texts."""

    def __init__(self, service: Service, *, with_ids: bool) -> None:
        self._codec, self.with_ids = service.codec, with_ids
        self._offsets: dict[int, int] = {}

    def first(self, index: int) -> Object | None:  # noqa: ARG002
        return None

    def part(self, update: Update) -> Object:
        text = Whole(update.delta, update.token_ids, None, update.finish_reason)
        text.logprobs = None if update.logprobs is None else list(update.logprobs)
        offset = self._offsets.get(update.index, 0)
        self._offsets[update.index] = offset + len(update.delta.content)
        return self._choice(update.index, text, offset)

    def whole(self, index: int, text: Whole) -> Object:
        return self._choice(index, text, 0)

    def _choice(self, index: int, text: Whole, offset: int) -> Object:
        choice = {
            "index": index,
            "text": text.delta.content,
            "logprobs": completion_logprobs(self._codec, text.logprobs, offset),
            "finish_reason": text.finish_reason,
        }
        return choice | ({"token_ids": text.token_ids} if self.with_ids else {})


@dataclass(frozen=True)
class Envelope:
    """Holds what all objects of an answer begin with.

    Attributes:
        kind: Name of the object, such as ``chat.completion``.
        prefix: First letters of its id.
        model: Name that the bundle is served under.
        ident: Id of the answer.
        created: Unix time.
    """

    kind: str
    prefix: str
    model: str
    ident: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: Sequence[Object], *, is_event: bool = False) -> Object:
        """Put choices into an answer."""
        chat = self.kind == "chat.completion"
        return {
            "id": f"{self.prefix}-{self.ident}",
            "object": f"{self.kind}.chunk" if chat and is_event else self.kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }


def _delta(delta: Delta) -> Object:
    found: Object = {"content": delta.content} if delta.content else {}
    if delta.reasoning_content:
        found["reasoning_content"] = delta.reasoning_content
    if delta.tool_calls:
        found["tool_calls"] = delta.tool_calls
    return found

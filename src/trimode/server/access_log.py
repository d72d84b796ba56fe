"""Writes one line for each request, with what became of its texts."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimode.server.outputs import Delta
from trimode.server.records import RequestRecord

MOST_CHARACTERS = 1 << 16
"""Most characters of a prompt or an answer in the log, where they are asked for."""
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Paths that are asked every few seconds: told only where they fail, or for debugging."""
logger = logging.getLogger("trimode.server.access")


@dataclass
class _Notes:
    """Holds what is noted of a request while it is answered."""

    records: list[RequestRecord] = field(default_factory=list)
    refusal: str | None = None


_NOTES: ContextVar[_Notes | None] = ContextVar("trimode_request_notes", default=None)


class RequestLog:
    """Notes texts and refusals for the log line of their request.

    It is an observer.
    """

    def observe(self, record: RequestRecord) -> None:
        """Take note of a text that has ended."""
        if (notes := _NOTES.get()) is not None:
            notes.records.append(record)

    def reject(self, reason: str) -> None:
        """Take note of a request that was refused."""
        if (notes := _NOTES.get()) is not None:
            notes.refusal = reason


class AccessLog:
    """Writes the log line of each request once it is over.

    It is the outermost middleware.

    Args:
        app: Application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request answered, and tell of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, notes, status = time.perf_counter(), _Notes(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        token = _NOTES.set(notes)
        try:
            await self._app(scope, receive, noting)
        finally:
            _NOTES.reset(token)
            _write(scope, status, time.perf_counter() - start, notes)


class TextLog:
    """Writes prompt and answer to the log.

    It is a step of outputs, for servers that are told to log texts.

    Args:
        prompt: Prompt of the text.
    """

    def __init__(self, prompt: str) -> None:
        self._prompt, self._answer = prompt, Delta()

    def push(self, delta: Delta) -> Delta:
        """Note what passes by."""
        self._answer.add(delta)
        return delta

    def finish(self) -> Delta:
        """Hold nothing back."""
        return Delta()

    def finish_reason(self, reason: str) -> str:
        """Write the line."""
        answer = self._answer
        texts = {"prompt": self._prompt, "answer": answer.content}
        if answer.reasoning_content:
            texts["reasoning"] = answer.reasoning_content
        fields: dict[str, Any] = {name: text[:MOST_CHARACTERS] for name, text in texts.items()}
        logger.info("text", extra={"fields": fields | {"tool_calls": answer.tool_calls}})
        return reason


def _write(scope: Scope, status: int, seconds: float, notes: _Notes) -> None:
    is_quiet = scope["path"] in QUIET_PATHS and status < 400
    level = logging.DEBUG if is_quiet else logging.INFO
    if not logger.isEnabledFor(level):
        return
    client = scope.get("client") or ("", 0)
    route = getattr(scope.get("route"), "path", None)
    fields = {
        "request_id": scope.get("state", {}).get("request_id"),
        "method": scope["method"],
        "path": route or "unknown",  # of what does not exist nothing is repeated
        "status": status,
        "duration_ms": round(1000 * seconds, 1),
        "client": client[0],
    }
    if notes.refusal is not None:
        fields["refusal"] = notes.refusal
    logger.log(level, "request", extra={"fields": fields | _about(notes.records)})


def _about(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Sum up the texts of a request."""
    if not records:
        return {}
    firsts = [one.times.ttft_s for one in records if one.times.ttft_s is not None]
    about = {
        "mode": records[0].mode,
        "texts": len(records),
        "finish_reasons": ",".join(one.finish_reason for one in records),
        "prompt_tokens": records[0].prompt_tokens,
        "cached_tokens": records[0].cached_tokens,
        "completion_tokens": sum(one.completion_tokens for one in records),
        "accepted_drafts": sum(one.drafts.num_accepted for one in records),
        "queue_ms": round(1000 * max(one.times.queue_s for one in records), 1),
        "ttft_ms": round(1000 * min(firsts), 1) if firsts else None,
    }
    errors = sorted({one.error for one in records if one.error is not None})
    return about | ({"errors": ",".join(errors)} if errors else {})

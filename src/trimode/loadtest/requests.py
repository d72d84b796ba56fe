"""Turns requests that were played into records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from trimode.formats.load import RequestRecord, SpeculationRecord
from trimode.loadtest.client import Exchange
from trimode.loadtest.play import Played


def request_records(played: Sequence[Played], run: int) -> list[RequestRecord]:
    """Return the records of requests that count, in order of sending."""
    counted = sorted((one for one in played if one.is_measured), key=lambda one: one.exchange.sent)
    start = counted[0].exchange.sent if counted else 0.0
    return [request_record(one, run, start) for one in counted]


def request_record(played: Played, run: int, start: float) -> RequestRecord:
    """Return the record of a request.

    ``start`` is the time at which the run began.
    """
    done = played.exchange
    usage = done.usage
    details = usage.get("prompt_tokens_details") or {}
    counted = _whole(usage.get("completion_tokens"))
    return RequestRecord(
        run=run,
        question_id=played.question.question_id,
        category=played.question.category,
        turn=played.turn,
        start_time=done.sent - start,
        ttft=done.chunk_times[0] - done.sent if done.chunk_times else None,
        latency=_latency(done),
        itl=tuple(after - before for before, after in pairwise(done.chunk_times)),
        input_tokens=_whole(usage.get("prompt_tokens")),
        cached_tokens=_whole(details.get("cached_tokens")),
        output_tokens=len(done.chunk_times) if counted is None else counted,
        status=done.status,
        finish_reason=done.finish_reason,
        error=done.error,
        text=done.text,
        speculative_decoding=_speculation(done.speculation),
    )


def counted_by(played: Sequence[Played]) -> str:
    """Say who counted the output tokens: the server, or the client.

    A client counts its events with text.
    """
    done = [one.exchange for one in played if one.is_measured and one.exchange.succeeded]
    return "server" if all("completion_tokens" in one.usage for one in done) else "chunks"


def _latency(done: Exchange) -> float | None:
    return None if done.error or done.ended is None else done.ended - done.sent


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _speculation(found: Mapping[str, Any] | None) -> SpeculationRecord | None:
    """Return the counts of vLLM's form; None if it is another."""
    if found is None:
        return None
    known = {name: found[name] for name in SpeculationRecord.model_fields if name in found}
    try:
        return SpeculationRecord(**known)
    except ValidationError:
        return None

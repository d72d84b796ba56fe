"""Computes the figures of a run from its requests, by vLLM's definitions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from trimode.formats.load import RequestRecord, SpeculationRecord, TimesRecord
from trimode.loadtest.options import Goodput

_MS = 1000.0
_PERCENTILES = (90, 99)


def times(requests: Sequence[RequestRecord]) -> TimesRecord:
    """Summarise the times of completed requests."""
    done = [one for one in requests if not one.error]
    values = {
        "ttft": [one.ttft for one in done if one.ttft is not None],
        "tpot": [tpot for one in done if (tpot := tpot_of(one)) is not None],
        "itl": [gap for one in done for gap in one.itl],
        "e2el": [one.latency for one in done if one.latency is not None],
    }
    return TimesRecord(**{k: v for name, some in values.items() for k, v in _spread(name, some)})


def tpot_of(request: RequestRecord) -> float | None:
    """Return seconds per token after the first; None under two tokens."""
    if request.latency is None or request.ttft is None or request.output_tokens < 2:
        return None
    return (request.latency - request.ttft) / (request.output_tokens - 1)


def throughput(requests: Sequence[RequestRecord]) -> dict[str, Any]:
    """Compute counts and rates; ``duration`` lasts until the last answer."""
    done = [one for one in requests if not one.error]
    duration = max((one.start_time + (one.latency or 0) for one in requests), default=0.0)
    sent = sum(one.input_tokens or 0 for one in done)
    written = sum(one.output_tokens for one in done)
    chunks = sum(len(one.itl) + 1 for one in done if one.ttft is not None)
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(requests) - len(done),
        "total_input_tokens": sent,
        "total_output_tokens": written,
        "request_throughput": _per(len(done), duration),
        "output_throughput": _per(written, duration),
        "total_token_throughput": _per(sent + written, duration),
        "max_output_tokens_per_s": peak_tokens(done),
        "max_concurrent_requests": peak_requests(done),
        "mean_concurrent_requests": _per(sum(one.latency or 0 for one in done), duration),
        "mean_tokens_per_chunk": written / chunks if chunks else None,
        "errors": dict(Counter(one.error for one in requests if one.error).most_common()),
    }


def good(requests: Iterable[RequestRecord], goodput: Goodput) -> int:
    """Count the completed requests that keep every limit.

    As in vLLM, a request of one token has a TPOT of 0.
    """
    return sum(_is_good(one, goodput.limits) for one in requests if not one.error)


def peak_tokens(requests: Sequence[RequestRecord]) -> float:
    """Return the most output tokens in any whole second.

    The tokens of a request are spread evenly over its events with text.
    """
    seconds: Counter[int] = Counter()
    for one in requests:
        if one.ttft is None:
            continue
        arrived = one.start_time + one.ttft + np.cumsum([0.0, *one.itl])
        for second in arrived.astype(int).tolist():
            seconds[second] += one.output_tokens / len(arrived)  # type: ignore[assignment]
    return float(max(seconds.values(), default=0))


def peak_requests(requests: Iterable[RequestRecord]) -> int:
    """Return the most requests under way at a time.

    One that ends makes room before another begins.
    """
    changes: list[tuple[float, int]] = []
    for one in requests:
        changes += [(one.start_time, 1), (one.start_time + (one.latency or 0), -1)]
    under_way = most = 0
    for _, change in sorted(changes):
        under_way += change
        most = max(most, under_way)
    return most


def acceptance(requests: Iterable[RequestRecord]) -> SpeculationRecord | None:
    """Sum what the server told about drafts."""
    found = (one.speculative_decoding for one in requests if not one.error)
    return SpeculationRecord.summed(one for one in found if one is not None)


def acceptance_by_category(requests: Sequence[RequestRecord]) -> dict[str, SpeculationRecord]:
    """Sum the server's counts of drafts, for each category with any."""
    names = sorted({one.category for one in requests if one.category})
    sums = {name: acceptance(one for one in requests if one.category == name) for name in names}
    return {name: one for name, one in sums.items() if one is not None}


def _spread(name: str, values: Sequence[float]) -> Iterable[tuple[str, float]]:
    if not values:
        return
    found = np.asarray(values) * _MS
    yield f"mean_{name}_ms", float(np.mean(found))
    yield f"median_{name}_ms", float(np.median(found))
    yield f"std_{name}_ms", float(np.std(found))
    for percent in _PERCENTILES:
        yield f"p{percent}_{name}_ms", float(np.percentile(found, percent))


def _per(count: float, duration: float) -> float:
    return count / duration if duration > 0 else 0.0


def _is_good(one: RequestRecord, limits: dict[str, float]) -> bool:
    found = {
        "ttft": math.inf if one.ttft is None else one.ttft,
        "tpot": tpot_of(one) or 0.0,
        "e2el": math.inf if one.latency is None else one.latency,
    }
    return all(_MS * found[name] <= limit for name, limit in limits.items())

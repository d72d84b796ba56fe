"""Counts requests for Prometheus, under vLLM's names where meanings match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from trimode.runtime.engine.stats import EngineStats
from trimode.server.engine_metrics import EngineCollector
from trimode.server.records import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_POSITIONS = 64
"""Draft positions with a series of their own; later ones count as the last."""

REJECTIONS = (
    *("queue_full", "draining", "engine_stopped", "timeout"),
    *("invalid_json", "invalid_value", "invalid_field", "unknown_field", "limit_exceeded"),
    *("body_too_large", "slow_body", "model_not_found", "unauthorized"),
)
OTHER = "other"

_TTFT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0)
_TTFT_BOUNDS = (*_TTFT, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
_GAP_BOUNDS = (*_GAP, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0)
_LONG_BOUNDS = (*_LONG, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)


class Timing(NamedTuple):
    """Describes a histogram of the texts that ended well."""

    name: str
    text: str
    bounds: Sequence[float]
    value: Callable[[RequestRecord], float | None]


TIMINGS = (
    Timing(
        "vllm:time_to_first_token_seconds",
        "Time from a request's coming to its first token.",
        _TTFT_BOUNDS,
        lambda r: r.times.ttft_s,
    ),
    Timing(
        "vllm:request_time_per_output_token_seconds",
        "Time a token after the first one, by text.",
        _GAP_BOUNDS,
        lambda r: r.time_per_token_s,
    ),
    Timing(
        "vllm:e2e_request_latency_seconds",
        "Time from a request's coming to the end of its text.",
        _LONG_BOUNDS,
        lambda r: r.times.e2e_s,
    ),
    Timing(
        "vllm:request_queue_time_seconds",
        "Time that a text waited for a row.",
        _LONG_BOUNDS,
        lambda r: r.times.queue_s,
    ),
    Timing(
        "vllm:request_prefill_time_seconds",
        "Time from a text's row to its first token.",
        _LONG_BOUNDS,
        lambda r: r.times.prefill_s,
    ),
    Timing(
        "vllm:request_decode_time_seconds",
        "Time from a text's first token to its end.",
        _LONG_BOUNDS,
        lambda r: r.times.decode_s,
    ),
)


class Families:
    """Makes metrics that all carry the model's name.

    Attributes:
        registry: Registry of the metrics.
        model_name: Name that the bundle is served under.
    """

    def __init__(self, model_name: str) -> None:
        self.registry, self.model_name = CollectorRegistry(), model_name

    def counter(self, name: str, text: str) -> Counter:
        """Make a counter."""
        return Counter(name, text, ("model_name",), registry=self.registry).labels(self.model_name)

    def labelled(self, name: str, text: str, *labels: str) -> Callable[..., Counter]:
        """Return a function that gives the counter for values of labels."""
        made = Counter(name, text, ("model_name", *labels), registry=self.registry)
        return partial(made.labels, self.model_name)

    def histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        """Make a histogram with these upper bounds."""
        made = Histogram(name, text, ("model_name",), buckets=bounds, registry=self.registry)
        return made.labels(self.model_name)

    def constant(self, name: str, text: str, facts: Mapping[str, str]) -> None:
        """Make a metric that is always 1, with facts for labels."""
        labels = {"model_name": self.model_name, **facts}
        Gauge(name, text, tuple(labels), registry=self.registry).labels(**labels).set(1)


class DraftCounters:
    """Counts the drafts of self-speculation and the denoising of diffusion."""

    def __init__(self, make: Families) -> None:
        self._num_drafts = make.counter(
            "vllm:spec_decode_num_drafts", "Blocks drafted and verified."
        )
        self._num_tokens = make.counter("vllm:spec_decode_num_draft_tokens", "Drafts verified.")
        self._num_accepted = make.counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafts accepted."
        )
        self._at = make.labelled(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts accepted, by their position in the block.",
            "position",
        )
        self._num_steps = make.counter("vllm:diffusion_num_denoising_steps", "Denoise forwards.")
        self._num_slots = make.counter("vllm:diffusion_num_canvas_positions", "Slots denoised.")
        self._num_committed = make.counter(
            "vllm:diffusion_num_committed_tokens", "Tokens that came of denoising."
        )

    def observe(self, record: RequestRecord) -> None:
        """Count those of one text."""
        drafts, diffusion = record.drafts, record.diffusion
        self._num_drafts.inc(drafts.num_cycles)
        self._num_tokens.inc(drafts.num_tokens)
        self._num_accepted.inc(drafts.num_accepted)
        for place, count in enumerate(drafts.accepted_by_position):
            self._at(str(min(place, MOST_POSITIONS - 1))).inc(count)
        self._num_steps.inc(diffusion.num_steps)
        self._num_slots.inc(diffusion.num_slots)
        self._num_committed.inc(diffusion.num_committed)


class Metrics:
    """Holds all metrics of a server, in a registry of its own.

    Args:
        stats: Function that reads the engine's counts, at each scrape.
        model_name: Name that the bundle is served under.
        max_length: Most tokens of a text, for the bounds of histograms.
        info: Facts that do not change, such as ``target`` and ``precision``.

    Attributes:
        registry: Registry of these metrics alone.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        model_name: str,
        max_length: int,
        info: Mapping[str, str],
    ) -> None:
        make = Families(model_name)
        self.registry = make.registry
        self.registry.register(EngineCollector(stats, model_name))
        ProcessCollector(registry=self.registry)
        make.constant("trimode:info", "Facts about what is served; always 1.", info)
        self._drafts = DraftCounters(make)
        self._success = make.labelled(
            "vllm:request_success", "Texts that ended, by reason.", "finished_reason"
        )
        self._requests = make.labelled(
            "trimode:requests", "Texts that ended, by mode and reason.", "mode", "finished_reason"
        )
        self._rejections = make.labelled(
            "vllm:admission_rejections", "Requests that were refused, by reason.", "reason"
        )
        self._timings = [
            (make.histogram(one.name, one.text, one.bounds), one.value) for one in TIMINGS
        ]
        self._gaps = make.histogram(
            "vllm:inter_token_latency_seconds",
            "Time between pieces of a text; a piece may have several tokens.",
            _GAP_BOUNDS,
        )
        sizes = one_two_five(max_length)
        self._prompt = make.histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", sizes)
        self._answer = make.histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", sizes
        )

    def observe(self, record: RequestRecord) -> None:
        """Count a text that has ended; from any thread."""
        self._success(record.finish_reason).inc()
        self._requests(record.mode, record.finish_reason).inc()
        if record.error is not None:
            return
        for histogram, value in self._timings:
            if (seconds := value(record)) is not None:
                histogram.observe(seconds)
        for gap in record.times.gaps_s:
            self._gaps.observe(gap)
        self._prompt.observe(record.prompt_tokens)
        self._answer.observe(record.completion_tokens)
        self._drafts.observe(record)

    def reject(self, reason: str) -> None:
        """Count a refused request by the error's code, from any thread."""
        self._rejections(reason if reason in REJECTIONS else OTHER).inc()

    def render(self) -> bytes:
        """Write all metrics as Prometheus' text; see :data:`CONTENT_TYPE`."""
        # Not as OpenMetrics: the client would write `vllm_...` for samples alone.
        return generate_latest(self.registry)


def one_two_five(most: int) -> list[float]:
    """Return 1, 2, 5, 10, ... until one reaches ``most``."""
    bounds: list[float] = []
    for value in (step * 10**power for power in range(10) for step in (1, 2, 5)):
        bounds.append(value)
        if value >= most:
            break
    return bounds

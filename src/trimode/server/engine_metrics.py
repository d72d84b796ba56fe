"""Reads an engine's counts whenever somebody asks for metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from trimode.runtime.engine.stats import EngineStats

Value = Callable[[EngineStats], float | None]
Values = Callable[[EngineStats], Mapping[str, float]]

STEP_SIZES = tuple(1 << power for power in range(14))
"""Bounds of the histogram of steps: 1 to 8192 tokens."""


class One(NamedTuple):
    """Describes a metric with one value."""

    name: str
    text: str
    value: Value


class Several(NamedTuple):
    """Describes a metric with a value for each value of a label."""

    name: str
    text: str
    label: str
    values: Values


def _share_taken(stats: EngineStats) -> float:
    return stats.running / max(1, stats.running + stats.free_rows)


GAUGES = (
    One("vllm:num_requests_running", "Texts that have a row.", lambda s: s.running),
    One("vllm:num_requests_waiting", "Texts that wait for a row.", lambda s: s.waiting),
    One(
        "vllm:kv_cache_usage_perc",
        "Share of the rows, each with its own K/V, that are taken; 1 means all.",
        _share_taken,
    ),
    One("trimode:free_rows", "Rows that are free.", lambda s: s.free_rows),
    One("trimode:healthy", "Whether the engine takes requests: 1 or 0.", lambda s: s.is_healthy),
    One(
        "trimode:step_prediction_ratio",
        "Measured over predicted time of forwards, of late; none without timings.",
        lambda s: s.prediction_ratio,
    ),
    One("trimode:kept_tokens", "Tokens of ended texts in host memory.", lambda s: s.kept_tokens),
    One("trimode:kept_bytes", "Bytes of their keys and values.", lambda s: s.kept_bytes),
)
COUNTERS = (
    One("vllm:prompt_tokens", "Tokens of prompts that got a row.", lambda s: s.prompt_tokens),
    One(
        "vllm:prompt_tokens_cached",
        "Tokens of prompts that were not computed again.",
        lambda s: s.cached_tokens,
    ),
    One("vllm:generation_tokens", "Tokens delivered.", lambda s: s.completion_tokens),
    One(
        "vllm:prefix_cache_queries",
        "Tokens that were looked for in the prefix cache.",
        lambda s: s.prompt_tokens,
    ),
    One(
        "vllm:prefix_cache_hits",
        "Tokens that were found in the prefix cache.",
        lambda s: s.cached_tokens,
    ),
    One(
        "trimode:prefix_cache_hit_requests",
        "Texts of whose prompt something was found in the prefix cache.",
        lambda s: s.hits,
    ),
    One("trimode:forward_rows", "Rows that forwards served.", lambda s: s.forward_rows),
    One(
        "trimode:forward_tokens",
        "New tokens that forwards ran over, drafts and masked slots included.",
        lambda s: s.forward_tokens,
    ),
    One(
        "trimode:padding_tokens",
        "Tokens that forwards ran over so that rows have one length.",
        lambda s: s.padding_tokens,
    ),
    One(
        "trimode:evicted_tokens",
        "Kept tokens that made room for others.",
        lambda s: s.evicted_tokens,
    ),
    One("trimode:copied_tokens", "Tokens whose K/V were copied.", lambda s: s.copied_tokens),
    One("trimode:mode_switches", "Plans of modes that changed.", lambda s: s.num_mode_switches),
)
LABELLED_GAUGES = (
    Several(
        "trimode:rows",
        "Rows at work by the slots of their cache.",
        "capacity",
        lambda s: {str(size): rows for size, rows in s.rows_by_capacity.items()},
    ),
    Several(
        "trimode:mode_rows",
        "Rows at work by the mode that was asked for.",
        "mode",
        lambda s: {str(mode): rows for mode, rows in s.rows_by_mode.items()},
    ),
)
LABELLED_COUNTERS = (
    Several(
        "trimode:forwards",
        "Forwards by graph.",
        "graph",
        lambda s: {str(graph): count for graph, count in s.forwards.items()},
    ),
    Several(
        "trimode:steps",
        "Steps by outcome.",
        "outcome",
        lambda s: {"committed": s.steps, "failed": s.failed_steps},
    ),
    Several(
        "trimode:step_seconds",
        "Time of steps by what they did.",
        "phase",
        lambda s: {"prefill": s.prefill_s, "decode": s.decode_s},
    ),
)


class EngineCollector(Collector):
    """Turns an engine's counts into metrics.

    Args:
        stats: Function that reads the counts.
        model_name: Name that the bundle is served under.
    """

    def __init__(self, stats: Callable[[], EngineStats], model_name: str) -> None:
        self._stats, self._model_name = stats, model_name

    def collect(self) -> Iterable[Metric]:
        """Read the counts once, and return all metrics of them."""
        stats = self._stats()
        return [
            *self._single(GaugeMetricFamily, GAUGES, stats),
            *self._single(CounterMetricFamily, COUNTERS, stats),
            *self._by_label(GaugeMetricFamily, LABELLED_GAUGES, stats),
            *self._by_label(CounterMetricFamily, LABELLED_COUNTERS, stats),
            self._step_sizes(stats),
        ]

    def _single(
        self,
        family: type[GaugeMetricFamily | CounterMetricFamily],
        metrics: Iterable[One],
        stats: EngineStats,
    ) -> Iterator[Metric]:
        for one in metrics:
            made = family(one.name, one.text, labels=["model_name"])
            if (value := one.value(stats)) is not None:
                made.add_metric([self._model_name], float(value))
            yield made

    def _by_label(
        self,
        family: type[GaugeMetricFamily | CounterMetricFamily],
        metrics: Iterable[Several],
        stats: EngineStats,
    ) -> Iterator[Metric]:
        for one in metrics:
            made = family(one.name, one.text, labels=["model_name", one.label])
            for value, number in one.values(stats).items():
                made.add_metric([self._model_name, value], float(number))
            yield made

    def _step_sizes(self, stats: EngineStats) -> Metric:
        counts = [stats.step_sizes.get(size, 0) for size in STEP_SIZES]
        more = sum(stats.step_sizes.values()) - sum(counts)
        names = [*map(str, map(float, STEP_SIZES)), "+Inf"]
        buckets = list(zip(names, accumulate([*counts, more]), strict=True))
        made = HistogramMetricFamily(
            "trimode:step_tokens", "New tokens that a step ran over.", labels=["model_name"]
        )
        made.add_metric([self._model_name], buckets, stats.forward_tokens)
        return made

"""Figures against slow, obvious computations over random requests, and values known by hand."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from trimode.errors import UsageError
from trimode.formats.load import RequestRecord, SpeculationRecord
from trimode.loadtest import figures
from trimode.loadtest.arrivals import arrivals
from trimode.loadtest.options import Goodput


def request(**changes: object) -> RequestRecord:
    values = {
        "run": 0,
        "question_id": "a",
        "category": "",
        "turn": 0,
        "start_time": 0.0,
        "ttft": 0.1,
        "latency": 0.5,
        "itl": (0.2, 0.2),
        "input_tokens": 10,
        "cached_tokens": None,
        "output_tokens": 5,
        "status": 200,
        "finish_reason": "stop",
        "error": "",
        "text": "x",
        **changes,
    }
    return RequestRecord.model_validate(values)


def random_requests(seed: int, count: int) -> list[RequestRecord]:
    rng, found = random.Random(seed), []
    for _ in range(count):
        gaps = tuple(rng.expovariate(20) for _ in range(rng.randrange(6)))
        ttft = rng.expovariate(5)
        found.append(
            request(
                start_time=rng.uniform(0, 8),
                ttft=ttft,
                latency=ttft + sum(gaps) + rng.uniform(0, 0.01),
                itl=gaps,
                input_tokens=rng.randrange(1, 90),
                output_tokens=rng.randrange(1, 40),
                error=rng.choice(("", "", "", "HTTP 429: full")),
            )
        )
    return found


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_plain_loops(seed: int) -> None:
    requests = random_requests(seed, 60)
    done = [one for one in requests if one.error == ""]
    rates, times = figures.throughput(requests), figures.times(requests)
    end = max(one.start_time + one.latency for one in requests if one.latency)
    tokens = sum(one.output_tokens for one in done)
    assert (rates["completed"], rates["failed"]) == (len(done), len(requests) - len(done))
    assert rates["duration"] == pytest.approx(end)
    assert rates["output_throughput"] == pytest.approx(tokens / end)
    total = tokens + sum(one.input_tokens or 0 for one in done)
    assert rates["total_token_throughput"] == pytest.approx(total / end)
    tpots = [
        1000 * (one.latency - one.ttft) / (one.output_tokens - 1)  # type: ignore[operator]
        for one in done
        if one.output_tokens > 1
    ]
    assert times.mean_tpot_ms == pytest.approx(statistics.fmean(tpots))
    assert times.median_tpot_ms == pytest.approx(statistics.median(tpots))
    assert times.std_tpot_ms == pytest.approx(statistics.pstdev(tpots))
    inclusive = statistics.quantiles(tpots, n=100, method="inclusive")
    assert (times.p90_tpot_ms, times.p99_tpot_ms) == pytest.approx((inclusive[89], inclusive[98]))
    gaps = [1000 * gap for one in done for gap in one.itl]
    assert times.median_itl_ms == pytest.approx(statistics.median(gaps))
    moments = [one.start_time for one in done]
    under_way = [
        sum(o.start_time <= now < o.start_time + (o.latency or 0) for o in done) for now in moments
    ]
    assert rates["max_concurrent_requests"] == max(under_way)
    chunks = sum(1 + len(one.itl) for one in done)
    assert rates["mean_tokens_per_chunk"] == pytest.approx(tokens / chunks)


def test_the_peak_of_tokens_is_that_of_a_second() -> None:
    bursts = request(start_time=0.5, ttft=0.2, itl=(0.2, 0.2), output_tokens=9, latency=0.7)
    # 3 tokens each at 0.7, 0.9 and 1.1; 4 more at 1.5
    later = request(start_time=1.0, ttft=0.5, itl=(), output_tokens=4, latency=0.5)
    assert figures.peak_tokens([bursts, later]) == pytest.approx(7.0)


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    slow_start = request(ttft=0.6, latency=0.7, output_tokens=11)  # TPOT 10 ms
    slow_rest = request(ttft=0.1, latency=1.1, output_tokens=11)  # TPOT 100 ms
    good = request(ttft=0.5, latency=1.0, output_tokens=11)  # both at their limits
    single = request(ttft=0.2, latency=0.2, output_tokens=1)
    failed = request(error="HTTP 500: x", latency=None)
    requests = [slow_start, slow_rest, good, single, failed]
    assert figures.good(requests, Goodput.parse("ttft:500 tpot:50")) == 2
    assert figures.good(requests, Goodput.parse("ttft:500")) == 3
    assert figures.good(requests, Goodput.parse("tpot:50,e2el:700")) == 2


@pytest.mark.parametrize("text", ["", "ttft", "ttft:x", "itl:5", "ttft:1 ttft:2", "tpot:-1", "a:b"])
def test_wrong_limits_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected `goodput` like ttft:500"):
        Goodput.parse(text)


def test_nothing_measured_has_no_times() -> None:
    assert figures.times([]).mean_ttft_ms is None
    assert figures.throughput([])["output_throughput"] == 0
    assert figures.times([request(error="x", latency=None)]).p99_e2el_ms is None


def test_acceptance_is_summed_by_category() -> None:
    def told(accepted: int, steps: int, histogram: dict[int, int]) -> SpeculationRecord:
        return SpeculationRecord(
            num_spec_steps=steps,
            num_draft_tokens=7 * steps,
            num_accepted_draft_tokens=accepted,
            acceptance_histogram=histogram,
            mean_acceptance_length=1 + accepted / steps,
            draft_acceptance_rate=accepted / (7 * steps),
        )

    requests = [
        request(category="math", speculative_decoding=told(3, 1, {3: 1})),
        request(category="math", speculative_decoding=told(1, 3, {0: 2, 1: 1})),
        request(category="sql", speculative_decoding=told(7, 1, {7: 1})),
        request(category="sql", speculative_decoding=told(7, 1, {7: 1}), error="cut"),
        request(category="json"),
    ]
    by_category = figures.acceptance_by_category(requests)
    assert set(by_category) == {"math", "sql"}
    # not the mean of the requests' lengths, which would be (4 + 1.33) / 2
    assert by_category["math"].mean_acceptance_length == pytest.approx(2.0)
    assert by_category["math"].draft_acceptance_rate == pytest.approx(4 / 28)
    assert by_category["math"].acceptance_histogram == {0: 2, 1: 1, 3: 1}
    everything = figures.acceptance(requests)
    assert everything is not None
    assert everything.num_spec_steps == 5


@pytest.mark.parametrize(("rate", "burstiness"), [(5.0, 1.0), (40.0, 0.25), (2.0, 8.0)])
def test_gaps_have_the_mean_and_spread_of_their_distribution(
    rate: float, burstiness: float
) -> None:
    source, count = arrivals(rate, burstiness, seed=3), 20_000
    times = [next(source) for _ in range(count)]
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    # the mean of a gamma distribution is 1 / rate, its deviation that over the root of the shape
    deviation = 1 / rate / math.sqrt(burstiness)
    assert statistics.fmean(gaps) == pytest.approx(1 / rate, abs=5 * deviation / math.sqrt(count))
    assert statistics.pstdev(gaps) == pytest.approx(deviation, rel=0.08)

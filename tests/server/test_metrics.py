"""The exporter, read by Prometheus's own parser and compared with counts taken elsewhere."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Built
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families as parse

from trimode import Engine, Handle, TriModeModel
from trimode.errors import RequestCancelledError
from trimode.server.metrics import MOST_POSITIONS, REJECTIONS, Metrics, one_two_five
from trimode.server.records import Drafts, RequestRecord, Timeline, make_record

MODES: tuple[Any, ...] = ("ar", "diffusion", "linear_spec", "quadratic_spec", "auto")
MODEL_NAME = 'a "b" \\ c'  # needs escaping


@pytest.fixture(scope="module")
def model(quadratic: Callable[[str], Built]) -> TriModeModel:
    return quadratic("three_kv_heads").model


@pytest.fixture
def engine(model: TriModeModel) -> Iterator[Engine]:
    with Engine(model, max_rows=3) as engine:
        yield engine


def metrics_of(engine: Engine) -> Metrics:
    return Metrics(engine.stats, MODEL_NAME, 500, {"target": "cpu", "precision": "fp32"})


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Value by the sample's name and its label, beside the model's name."""
    found: dict[tuple[str, str], float] = {}
    for family in parse(metrics.render().decode()):
        for sample in family.samples:
            if sample.name.startswith("process_") or sample.name.endswith("_created"):
                continue
            labels = dict(sample.labels)
            assert labels.pop("model_name") == MODEL_NAME, sample
            key = sample.name, ",".join(labels.values())
            assert key not in found
            found[key] = sample.value
    return found


def run(engine: Engine, metrics: Metrics) -> list[RequestRecord]:
    records = []
    for number, mode in enumerate(MODES * 2):
        ids = [(7 * n + number) % 90 + 5 for n in range(9 + 13 * number)]
        handle = engine.submit(ids, mode=mode, max_new_tokens=5 + 6 * number)
        handle.result()
        records.append(make_record(handle, request_id="r", model=MODEL_NAME, mode=mode))
        metrics.observe(records[-1])
    while engine.stats().running:  # a row is freed in the turn after its end
        time.sleep(0.001)
    return records


def test_values_are_those_counted_elsewhere(engine: Engine) -> None:
    metrics = metrics_of(engine)
    records = run(engine, metrics)
    found = samples(metrics)

    assert found["vllm:prompt_tokens_total", ""] == sum(r.prompt_tokens for r in records)
    assert found["vllm:generation_tokens_total", ""] == sum(r.completion_tokens for r in records)
    assert found["vllm:prefix_cache_hits_total", ""] == sum(r.cached_tokens for r in records)
    assert found["vllm:num_requests_running", ""] == found["vllm:num_requests_waiting", ""] == 0
    assert found["vllm:kv_cache_usage_perc", ""] == 0
    assert found["trimode:free_rows", ""] == 3
    assert found["trimode:healthy", ""] == 1
    assert ("trimode:step_prediction_ratio", "") not in found  # no timings were measured here
    for reason, count in Counter(r.finish_reason for r in records).items():
        assert found["vllm:request_success_total", reason] == count
    for (mode, reason), count in Counter((r.mode, r.finish_reason) for r in records).items():
        assert found["trimode:requests_total", f"{reason},{mode}"] == count
    for name in ("vllm:e2e_request_latency_seconds", "vllm:time_to_first_token_seconds"):
        assert found[f"{name}_count", ""] == found[f"{name}_bucket", "+Inf"] == len(records)
    assert found["vllm:e2e_request_latency_seconds_sum", ""] == pytest.approx(
        sum(r.times.e2e_s for r in records)
    )
    gaps = [gap for r in records for gap in r.times.gaps_s]
    assert found["vllm:inter_token_latency_seconds_count", ""] == len(gaps)
    assert found["vllm:inter_token_latency_seconds_sum", ""] == pytest.approx(sum(gaps))
    lengths = [r.completion_tokens for r in records]
    for bound in (1, 2, 5, 10, 20, 50, 100, 200, 500):
        within = sum(length <= bound for length in lengths)
        assert found["vllm:request_generation_tokens_bucket", f"{float(bound)}"] == within
    drafts = [r.drafts for r in records]
    assert found["vllm:spec_decode_num_drafts_total", ""] == sum(d.num_cycles for d in drafts) > 0
    assert found["vllm:spec_decode_num_draft_tokens_total", ""] == sum(d.num_tokens for d in drafts)
    accepted = sum(d.num_accepted for d in drafts)
    assert found["vllm:spec_decode_num_accepted_tokens_total", ""] == accepted
    positions = [v for (n, _), v in found.items() if n.endswith("tokens_per_pos_total")]
    assert sum(positions) == accepted
    diffusion = [r.diffusion for r in records if r.mode == "diffusion"]
    assert found["vllm:diffusion_num_committed_tokens_total", ""] == sum(
        r.completion_tokens for r in records if r.mode == "diffusion"
    )
    assert found["vllm:diffusion_num_denoising_steps_total", ""] == sum(
        d.num_steps for d in diffusion
    )


def test_the_engines_forwards(engine: Engine) -> None:
    """Forwards of single texts have one row and no padding; their tokens are known."""
    metrics = metrics_of(engine)
    ids = [5 + n for n in range(40)]
    engine.submit(ids, mode="ar", max_new_tokens=4, eos_token_ids=()).result()
    found = samples(metrics)
    # the prompt, then three tokens; the fourth is not run over
    assert found["trimode:forwards_total", "ar"] == 4
    assert found["trimode:forward_rows_total", ""] == 4
    assert found["trimode:forward_tokens_total", ""] == 43
    assert found["trimode:padding_tokens_total", ""] == 0
    assert found["trimode:steps_total", "committed"] == 4
    assert found["trimode:steps_total", "failed"] == 0
    assert found["trimode:step_tokens_bucket", "1.0"] == 3
    assert found["trimode:step_tokens_bucket", "32.0"] == 3
    assert found["trimode:step_tokens_bucket", "64.0"] == 4
    assert found["trimode:step_tokens_sum", ""] == 43
    assert found["trimode:step_tokens_count", ""] == 4
    seconds = [found["trimode:step_seconds_total", phase] for phase in ("prefill", "decode")]
    assert min(seconds) > 0


def test_padding_is_what_rows_lack(engine: Engine) -> None:
    """Prompts of different length in one forward: the shorter ones are padded."""
    before = engine.stats()
    handles = [engine.submit([5 + n] * (3 + n), mode="ar", max_new_tokens=6) for n in range(3)]
    for handle in handles:
        handle.result()
    after = engine.stats()
    real = after.forward_tokens - before.forward_tokens
    read = sum(len(handle.prompt) - handle.usage.cached_tokens for handle in handles)
    assert real == read + sum(handle.usage.completion_tokens - 1 for handle in handles)
    assert after.padding_tokens >= before.padding_tokens


def test_gauges_of_texts_at_work(engine: Engine) -> None:
    metrics = metrics_of(engine)
    handles = [
        engine.submit([5 + n, 6], mode="ar", max_new_tokens=240, eos_token_ids=()) for n in range(5)
    ]
    next(iter(handles[0]))
    found = samples(metrics)
    for handle in handles:
        handle.cancel()
    assert found["vllm:num_requests_running", ""] == 3 == found["trimode:mode_rows", "ar"]
    assert found["vllm:num_requests_waiting", ""] == 2
    assert found["vllm:kv_cache_usage_perc", ""] == 1
    assert sum(v for (name, _), v in found.items() if name == "trimode:rows") == 3


def test_types_units_and_help(engine: Engine) -> None:
    families = {family.name: family for family in parse(metrics_of(engine).render().decode())}
    for name, family in families.items():
        if not name.startswith(("vllm:", "trimode:")):
            assert name.startswith("process_")
            continue
        if name.endswith("_created"):
            continue
        assert family.documentation.endswith("."), name
        assert family.type in ("counter", "gauge", "histogram")
        assert re.fullmatch(r"(vllm|trimode):[a-z0-9_]+", name)
        is_time = family.type == "histogram" and not name.endswith("_tokens")
        assert name.endswith("_seconds") or not is_time
    assert families["vllm:prompt_tokens"].type == "counter"
    assert families["vllm:num_requests_running"].type == "gauge"
    assert families["vllm:time_to_first_token_seconds"].type == "histogram"
    assert "process_resident_memory_bytes" in families


def test_texts_that_do_not_end_well_have_no_times(engine: Engine) -> None:
    metrics = metrics_of(engine)
    handle = engine.submit([5, 6], mode="ar", max_new_tokens=200, eos_token_ids=())
    handle.cancel()
    with pytest.raises(RequestCancelledError):
        handle.result()
    metrics.observe(make_record(handle, request_id="r", model="m", mode="ar"))
    found = samples(metrics)
    assert found["vllm:request_success_total", "abort"] == 1
    assert found["vllm:e2e_request_latency_seconds_count", ""] == 0


def test_labels_are_bounded(engine: Engine) -> None:
    """Whatever clients send, and however long blocks get, the series do not multiply."""
    metrics = metrics_of(engine)
    times = Timeline(0.0, 0.0, 0.1, 0.1, 0.1, 0.2)
    drafts = Drafts(1, 500, (499,))
    for number in range(200):
        metrics.reject(f"code {number}")
        metrics.reject(REJECTIONS[number % len(REJECTIONS)])
        metrics.observe(
            RequestRecord(f"r{number}", "m", "auto", 5, 0, 9, "stop", None, times, drafts=drafts)
        )
    found = samples(metrics)
    names = Counter(name for name, _ in found)
    assert names["vllm:admission_rejections_total"] == len(REJECTIONS) + 1
    assert found["vllm:admission_rejections_total", "other"] == 200
    assert names["vllm:spec_decode_num_accepted_tokens_per_pos_total"] == MOST_POSITIONS
    assert sum(v for (name, _), v in found.items() if name.endswith("per_pos_total")) == 200 * 499
    assert not any("r199" in label for _, label in found)


def test_no_global_state(engine: Engine) -> None:
    before = {family.name for family in REGISTRY.collect()}
    first, second = metrics_of(engine), metrics_of(engine)
    first.reject("draining")
    assert samples(first) != samples(second)
    assert {family.name for family in REGISTRY.collect()} == before


def test_bounds_of_tokens() -> None:
    assert one_two_five(500) == [1, 2, 5, 10, 20, 50, 100, 200, 500]
    assert one_two_five(4096)[-1] == 5000


def test_the_demo_counts_one_text(demo: Path) -> None:
    with TriModeModel.from_pretrained(demo, num_threads=1) as model, Engine(model) as engine:
        metrics = metrics_of(engine)
        ids = model.codec.encode_chat([{"role": "user", "content": "Sort: 5 3 9 1"}])
        handle: Handle = engine.submit(ids, mode="linear_spec")
        made = handle.result()
        metrics.observe(make_record(handle, request_id="r", model="m", mode="linear_spec"))
        found = samples(metrics)
    assert found["trimode:forwards_total", "verify"] == made.forwards.verify
    assert found["vllm:spec_decode_num_drafts_total", ""] == made.forwards.verify
    assert found["trimode:forwards_total", "draft"] == made.forwards.draft

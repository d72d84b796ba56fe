"""Records of ended texts: every count against one taken from outside of the decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Built

from trimode import Engine, Handle, TriModeModel
from trimode.errors import EngineError, RequestCancelledError, RequestTimeoutError
from trimode.runtime.decode.forward import Forward
from trimode.server.records import RequestRecord, make_record

QUESTIONS = ("Sort: 5 3 9 1", "What is 17 + 25?", "Reverse: a b c d", "Count from 3 to 9.")


@pytest.fixture(scope="module")
def demo_model(demo: Path) -> Iterator[TriModeModel]:
    with TriModeModel.from_pretrained(demo, num_threads=1, target="portable") as model:
        yield model


@dataclass
class Watched:
    """What a text asked for and got, forward by forward."""

    verified: int = 0
    accepted: list[int] = field(default_factory=list)
    denoised: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


def watch(model: TriModeModel, ids: list[int], mode: Any, **options: Any) -> Watched:
    """Run the forwards of a text by hand, and count what goes by."""
    stream, out, block = model.stream([ids], mode, **options), Watched(), None
    sequence = stream._sequence
    step = stream.advance()
    while step is not None:
        if isinstance(step, Forward):
            drafts = step.token_ids.tolist()
            if step.graph_name == "verify":
                block = drafts[1:]
            elif step.graph_name == "quadratic":
                block = drafts
            elif step.graph_name == "draft" and mode == "diffusion":
                out.denoised.append(len(drafts))
            step = stream.advance(sequence.answer(step))
            continue
        out.token_ids += step.token_ids
        if block is not None:
            is_known = mode == "quadratic_spec"
            agreeing = 0
            while block[agreeing : agreeing + 1] == step.token_ids[agreeing : agreeing + 1] != []:
                agreeing += 1
            out.verified += len(block) - is_known
            out.accepted.append(agreeing - is_known)
            block = None
        step = stream.advance()
    return out


def record_of(handle: Handle, mode: Any) -> RequestRecord:
    return make_record(handle, request_id="r", model="m", mode=mode)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear_spec", "auto"])
@pytest.mark.parametrize("choices", [{}, {"temperature": 1.0, "seed": 5}, {"stop": ["3 5", "42"]}])
def test_drafts_and_slots_are_those_that_went_by(
    demo_model: TriModeModel, mode: Any, choices: dict[str, Any]
) -> None:
    some_accepted = 0
    with Engine(demo_model, max_rows=2) as engine:
        for number, question in enumerate(QUESTIONS):
            ids = demo_model.codec.encode_chat([{"role": "user", "content": question}])
            options = {"max_new_tokens": (40, 7)[number % 2], **choices}
            handle = engine.submit(ids, mode=mode, **options)
            handle.result()
            record, seen = record_of(handle, mode), watch(demo_model, ids, mode, **options)
            assert handle.token_ids == seen.token_ids
            if mode != "auto":  # which has other block lengths in an engine with timings
                assert record.drafts.num_tokens == seen.verified
                assert list(record.drafts.accepted) == seen.accepted
            assert record.diffusion.num_slots == sum(seen.denoised)
            assert record.diffusion.num_steps == len(seen.denoised)
            assert record.diffusion.num_committed == (
                len(seen.token_ids) if mode == "diffusion" else 0
            )
            assert record.completion_tokens == len(seen.token_ids)
            some_accepted += record.drafts.num_accepted
    assert (some_accepted > 0) == (mode in ("linear_spec", "auto"))


def test_quadratic_drafts(quadratic: Callable[[str], Built]) -> None:
    """The first draft of a block is known to be right: it is no guess."""
    model = quadratic("three_kv_heads").model
    with Engine(model) as engine:
        for length in (5, 11, 40):
            ids = [(7 * n) % 90 + 5 for n in range(length)]
            handle = engine.submit(ids, mode="quadratic_spec", max_new_tokens=30, block_length=8)
            handle.result()
            record = record_of(handle, "quadratic_spec")
            seen = watch(model, ids, "quadratic_spec", max_new_tokens=30, block_length=8)
            assert list(record.drafts.accepted) == seen.accepted
            assert record.drafts.num_tokens == seen.verified == 7 * len(seen.accepted)


def test_positions_and_histogram(demo_model: TriModeModel) -> None:
    ids = demo_model.codec.encode_chat([{"role": "user", "content": QUESTIONS[0]}])
    with Engine(demo_model) as engine:
        handle = engine.submit(ids, mode="linear_spec", max_new_tokens=60)
        made = handle.result()
    drafts = record_of(handle, "linear_spec").drafts
    assert sum(drafts.accepted_by_position) == drafts.num_accepted > 0
    assert drafts.accepted_by_position == sorted(drafts.accepted_by_position, reverse=True)
    assert sum(drafts.histogram) == drafts.num_cycles == made.forwards.verify
    assert sum(n * count for n, count in enumerate(drafts.histogram)) == drafts.num_accepted
    # the text is the first token, then each block's accepted drafts and one more, but at its end
    assert 0 <= 1 + drafts.num_cycles + drafts.num_accepted - len(made.token_ids) <= 1


def test_times_add_up(demo_model: TriModeModel) -> None:
    received, wall = time.perf_counter() - 0.25, time.time() - 0.25
    with Engine(demo_model) as engine:
        handle = engine.submit([5, 6, 7, 8], mode="ar", max_new_tokens=9, eos_token_ids=())
        handle.result()
    record = make_record(handle, request_id="r", model="m", mode="ar", received=received)
    times = record.times
    assert times.ttft_s is not None
    assert times.decode_s is not None
    assert times.prefill_s is not None
    assert times.e2e_s == pytest.approx(times.ttft_s + times.decode_s)
    assert times.ttft_s == pytest.approx(
        handle.times.submitted - received + times.queue_s + times.prefill_s
    )
    assert 0.25 < times.ttft_s < times.e2e_s
    assert abs(times.began_at - wall) < 0.2
    assert record.time_per_token_s == pytest.approx(times.decode_s / 8)
    assert (record.finish_reason, record.error) == ("length", None)


def test_texts_that_do_not_end_well(demo_model: TriModeModel) -> None:
    with Engine(demo_model, max_rows=1) as engine:
        first = engine.submit([5, 6], mode="ar", max_new_tokens=500, eos_token_ids=())
        waiting = engine.submit([5, 6], mode="ar", max_new_tokens=5)
        late = engine.submit([5, 7], mode="ar", max_new_tokens=5, timeout_s=0.0)
        with pytest.raises(RequestTimeoutError):
            late.result(10)
        waiting.cancel()
        next(iter(first))
        first.cancel()
        with pytest.raises(RequestCancelledError):
            first.result()
    broken = Handle([1, 2], lambda _: None)
    broken.fail(EngineError("expected a forward to run, found it failing"))
    found = {one: record_of(one, "ar") for one in (first, waiting, late, broken)}
    reasons = [record.finish_reason for record in found.values()]
    assert reasons == ["abort", "abort", "timeout", "error"]
    assert found[broken].error == "EngineError"
    assert found[first].completion_tokens == len(first.token_ids) > 0
    assert found[waiting].times.ttft_s is None
    assert found[waiting].times.queue_s == pytest.approx(found[waiting].times.e2e_s)
    assert found[waiting].forwards is None
    assert found[waiting].time_per_token_s is None


def test_a_text_at_work_has_no_record() -> None:
    with pytest.raises(ValueError, match="at work"):
        record_of(Handle([1], lambda _: None), "ar")

"""A load test against a real server: texts and counts are those of single runs in this process."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimode.loadtest.job import run_load_test
from trimode.loadtest.options import Load, Sampling, Server, Span
from trimode.loadtest.plan import LoadTest
from trimode.loadtest.questions import Questions, read_questions
from trimode.loadtest.random_questions import RandomLengths

FOLDER = Path(__file__).parents[2] / "artifacts" / "speed-demo"
MODES = ("ar", "linear-spec", "diffusion", "auto")


def a_few(count: int) -> Questions:
    """One conversation of each category, of three turns, and some of one."""
    data = read_questions(FOLDER)
    chosen = data.questions[:: max(1, len(data.questions) // count)][:count]
    return replace(data, questions=chosen)


@pytest.mark.parametrize("mode", MODES)
def test_answers_under_load_are_those_of_single_runs(running: Any, mode: str) -> None:
    data = a_few(7)
    test = LoadTest(
        Server(running.address, timeout=60),
        data,
        (Load(concurrency=6),),
        modes=(mode,),
        span=Span(num_prompts=12),
        sampling=Sampling(max_tokens=40),
        checks=True,
    )
    measured = run_load_test(test)
    (run,) = measured.runs
    assert run.failed == 0, run.errors
    manifest = (running.model.bundle.path / "manifest.json").read_bytes()
    assert measured.server is not None
    assert measured.server.bundle_sha256 == hashlib.sha256(manifest).hexdigest()
    assert measured.check is not None
    assert (measured.check.compared, measured.check.differing) == (run.completed, 0)
    if mode == "linear-spec":
        by_category = run.acceptance_by_category.values()
        assert run.acceptance is not None
        assert sum(one.num_spec_steps for one in by_category) == run.acceptance.num_spec_steps
        told = run.acceptance.acceptance_histogram
        assert sum(told.values()) == run.acceptance.num_spec_steps
        accepted = sum(length * count for length, count in told.items())
        assert accepted == run.acceptance.num_accepted_draft_tokens
    codec, by_id = running.model.codec, {one.question_id: one for one in data.questions}
    for one in measured.requests:
        if one.turn == 0:
            ids = codec.encode_chat(list(by_id[one.question_id].turns[0]))
            options: dict[str, Any] = {"max_new_tokens": 40}
            made = running.model.stream([ids], mode.replace("-", "_"), **options).finish()
            assert one.text == codec.decode(made.token_ids)
            assert one.output_tokens == len(made.token_ids)
            assert one.input_tokens == len(ids)


def test_random_prompts_have_their_lengths(running: Any) -> None:
    """The server takes token ids, and answers with as many tokens as were drawn."""
    lengths = RandomLengths(30, 12, range_ratio=0.5, count=5, seed=2)
    test = LoadTest(
        Server(running.address, timeout=60),
        lengths,
        (Load(rate=20.0),),
        span=Span(num_prompts=5),
        sampling=Sampling(min_tokens=99),
        shared_prefix=10,
    )
    measured = run_load_test(test)
    assert measured.questions is not None
    asked = {one.question_id: one for one in measured.questions.questions}
    assert Counter(one.error for one in measured.requests) == {"": 5}
    for one in measured.requests:
        assert one.input_tokens == len(asked[one.question_id].token_ids or ())
        assert one.output_tokens == asked[one.question_id].max_tokens

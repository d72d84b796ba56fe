"""Whole load tests against a server of known behaviour."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from typing import Any

import pytest
from stub_server import Stub, running, script

from trimode.errors import EngineError, UsageError
from trimode.loadtest.job import run_load_test
from trimode.loadtest.options import Goodput, Load, Sampling, Server, Span
from trimode.loadtest.plan import LoadTest
from trimode.loadtest.questions import Question, Questions
from trimode.loadtest.random_questions import RandomLengths
from trimode.loadtest.served import served_record

LATE_MS = 80.0
"""Milliseconds that an answer may be noted late."""


def questions(*contents: str | list[str], category: str = "") -> Questions:
    found = []
    for number, content in enumerate(contents):
        texts = [content] if isinstance(content, str) else content
        turns = tuple(({"role": "user", "content": text},) for text in texts)
        found.append(Question(f"q{number}", category, turns))
    return Questions("stub", "0" * 64, tuple(found))


def load_test(stub: Stub, data: Questions | RandomLengths, **changes: Any) -> LoadTest:
    usual = LoadTest(
        Server(stub.url, timeout=10), data, (Load(concurrency=1),), span=Span(num_prompts=4)
    )
    return replace(usual, **changes)


def test_known_times_give_known_figures() -> None:
    """10 tokens: 4 at 80 ms, 6 more at 140 ms. TTFT 80, TPOT 60 / 9, ITL 60, E2EL 140."""
    text = script((0.08, "aaaa"), (0.06, "bbbbbb"), tokens=10)
    with running() as stub:
        test = load_test(stub, questions(text), goodput=Goodput.parse("ttft:5000 tpot:5000"))
        measured = run_load_test(test)
    (run,) = measured.runs
    assert (run.completed, run.failed, run.total_output_tokens) == (4, 0, 40)
    assert run.total_input_tokens == 28
    # a busy machine makes server and client late: the server's own times are the measure
    sent = stub.served[1:]
    ttft, itl, e2el = (
        1000 * statistics.median(values)
        for values in (
            [one.sent[0] - one.received for one in sent],
            [one.sent[1] - one.sent[0] for one in sent],
            [one.ended - one.received for one in sent],
        )
    )
    assert run.median_ttft_ms is not None
    assert run.median_e2el_ms is not None
    assert 80 <= ttft <= run.median_ttft_ms < ttft + LATE_MS
    assert run.median_itl_ms == pytest.approx(itl, abs=LATE_MS)
    assert 140 <= e2el <= run.median_e2el_ms < e2el + LATE_MS
    assert run.median_tpot_ms == pytest.approx(itl / 9, abs=LATE_MS / 9)
    assert run.mean_tokens_per_chunk == 5
    span = sent[-1].ended - sent[0].received
    assert 4 * 0.14 <= span < run.duration < span + 2 * LATE_MS / 1000
    assert run.output_throughput == pytest.approx(40 / run.duration)
    assert run.output_throughput_per_user == run.output_throughput
    assert run.request_goodput == run.request_throughput
    assert run.output_tokens_counted_by == "server"
    assert 0 < run.client_cpu_share < 1
    assert measured.server is not None
    assert (measured.server.model, measured.server.bundle_sha256) == ("stub", "ab" * 32)


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    with running() as stub:
        test = load_test(
            stub,
            questions(*[script((0.05, str(n)), tokens=1) for n in range(7)]),
            loads=(Load(concurrency=3), Load(concurrency=6)),
            span=Span(num_prompts=24),
        )
        runs = run_load_test(test).runs
    assert [run.max_concurrent_requests for run in runs] == [3, 6]
    assert [run.completed for run in runs] == [24, 24]
    assert stub.peak == 6
    # 24 requests of 50 ms by 3 and 6 clients
    assert (runs[0].duration >= 8 * 0.05, runs[1].duration >= 4 * 0.05) == (True, True)
    for run in runs:
        assert run.mean_concurrent_requests > 0.7 * (run.max_concurrency or 0)


def test_every_question_comes_before_one_comes_again() -> None:
    with running() as stub:
        contents = [script((0, str(n)), tokens=1) for n in range(5)]
        test = load_test(stub, questions(*contents), span=Span(num_prompts=10))
        run_load_test(test)
        asked = [one.body["messages"][-1]["content"] for one in stub.served[1:]]
        assert sorted(asked[:5]) == sorted(asked[5:]) == sorted(contents)
        before = len(stub.served)
        run_load_test(test)
    again = [one.body["messages"][-1]["content"] for one in stub.served[before + 1 :]]
    assert again == asked  # the same seed, the same order


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """At 100 a second, answers of 200 ms overlap about 20 times."""
    with running() as stub:
        test = load_test(
            stub,
            questions(script((0.2, "a"), tokens=1)),
            loads=(Load(rate=100),),
            span=Span(num_prompts=60),
        )
        (run,) = run_load_test(test).runs
    assert run.max_concurrent_requests > 12
    assert run.max_concurrency is None
    assert run.mean_concurrent_requests == pytest.approx(
        60 * statistics.fmean([run.mean_e2el_ms or 0]) / 1000 / run.duration
    )
    assert run.output_throughput_per_user == pytest.approx(
        run.output_throughput / run.mean_concurrent_requests
    )
    starts = [one.received for one in stub.served[1:]]
    assert 0.004 < (starts[-1] - starts[0]) / 59 < 0.04


def test_a_conversation_is_played_turn_by_turn() -> None:
    turns = [script((0.01, f"answer {n}"), tokens=2) for n in range(3)]
    with running() as stub:
        run_load_test(load_test(stub, questions(turns), span=Span(num_prompts=1)))
    last = stub.served[-1].body["messages"]
    assert [one["role"] for one in last] == ["user", "assistant"] * 2 + ["user"]
    assert [one["content"] for one in last[1::2]] == ["answer 0", "answer 1"]
    for before, after in zip(stub.served[1:], stub.served[2:], strict=False):
        assert after.received >= before.ended


def test_requests_of_the_warm_up_do_not_count() -> None:
    with running() as stub:
        test = load_test(
            stub,
            questions(script((0.02, "a"), tokens=1)),
            loads=(Load(concurrency=2),),
            span=Span(warmup=0.3, duration=0.4),
        )
        began = time.perf_counter()
        measured = run_load_test(test)
        assert time.perf_counter() - began > 0.7
    (run,) = measured.runs
    start = stub.served[1].received + 0.3  # the first request is the probe
    expected = [one for one in stub.served[1:] if one.received >= start]
    assert abs(len(expected) - run.completed) <= 3
    assert len(stub.served) > run.completed + 6
    assert min(one.start_time for one in measured.requests) == 0


def test_modes_are_sent_only_when_asked_for() -> None:
    with running() as stub:
        text = questions(script((0, "a"), tokens=1))
        run_load_test(load_test(stub, text))
        assert all("mode" not in one.body for one in stub.served)
        runs = run_load_test(load_test(stub, text, modes=("ar", "linear-spec"))).runs
    assert [run.mode for run in runs] == ["ar", "linear-spec"]
    assert [one.body["mode"] for one in stub.served[5:]] == ["ar"] * 5 + ["linear-spec"] * 5


def test_fields_that_a_server_refuses_are_left_out() -> None:
    with running(refused=("min_tokens", "stream_options")) as stub:
        test = load_test(
            stub,
            questions(script((0, "a"), (0, "b"), tokens=8)),
            sampling=Sampling(min_tokens=3, temperature=0.5, seed=11),
        )
        (run,) = run_load_test(test).runs
    assert run.completed == 4
    assert run.output_tokens_counted_by == "chunks"
    assert run.total_output_tokens == 8
    assert "min_tokens" not in stub.served[-1].body
    with running(refused=("mode",)) as stub, pytest.raises(EngineError, match="in mode ar") as no:
        run_load_test(load_test(stub, questions(script((0, "a"), tokens=1)), modes=("ar",)))
    assert "unknown field mode" in no.value.message


def test_random_prompts_are_token_ids_where_the_server_has_a_tokenizer() -> None:
    lengths = RandomLengths(6, 3, count=4)
    with running(token_ids=[5, 6, 8, 5]) as stub:
        run_load_test(load_test(stub, lengths, sampling=Sampling(min_tokens=99)))
    assert {one.path for one in stub.served} == {"/v1/completions"}
    for one in stub.served:
        assert len(one.body["prompt"]) == 6
        assert set(one.body["prompt"]) <= {5, 6, 8}
        assert (one.body["max_tokens"], one.body["min_tokens"]) == (3, 3)


def test_a_check_finds_answers_that_differ() -> None:
    """The stub answers what its script says, but for one that counts its requests."""
    with running() as stub:
        test = load_test(
            stub, questions(*[script((0, str(n)), tokens=1) for n in range(3)]), checks=True
        )
        check = run_load_test(test).check
        assert check is not None
        assert (check.compared, check.differing) == (4, 0)

        def later_wrong(body: dict[str, Any]) -> dict[str, Any]:
            found = dict(json.loads(body["messages"][-1]["content"]))
            if found["chunks"][0][1] == "1" and len(stub.served) > before + 4:
                found["chunks"] = [[0, "one"]]
            return found

        before = len(stub.served)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stub_server.script_of", later_wrong)
            check = run_load_test(replace(test, span=Span(num_prompts=6))).check
    assert check is not None
    assert (check.compared, check.differing) == (6, 2)
    first = check.differences[0]
    assert (first.question_id, first.expected, first.found) == (
        "q1",
        "1 (1 tokens, stop)",
        "one (1 tokens, stop)",
    )


def test_overload_is_counted_not_hidden() -> None:
    with running(most=2) as stub:
        test = load_test(
            stub,
            questions(script((0.1, "a"), tokens=1)),
            loads=(Load(rate=200),),
            span=Span(num_prompts=50),
        )
        (run,) = run_load_test(test).runs
    assert run.completed + run.failed == 50
    assert run.failed > 20
    assert run.errors == {"HTTP 429: full": run.failed}
    assert run.completed == len(stub.served) - 1


def test_a_run_is_given_up_where_nothing_is_answered_any_more() -> None:
    with running() as stub:
        test = load_test(
            stub,
            questions(script((0, "a"), tokens=1)),
            loads=(Load(concurrency=32), Load(concurrency=1)),
            span=Span(duration=60),
        )

        def last(body: dict[str, Any]) -> dict[str, Any]:
            stub.most = 0
            return {"chunks": [[0, "a"]], "tokens": 1}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stub_server.script_of", last)
            measured = run_load_test(test)
    (run,) = measured.runs  # the second load is left out
    assert run.partial
    assert 200 <= run.failed < 300
    assert measured.is_partial
    assert not measured.is_interrupted


def test_a_server_that_is_gone_ends_the_test() -> None:
    with running() as stub:
        test = load_test(stub, questions(script((0, "a"), tokens=1)))
    with pytest.raises(EngineError, match=f"expected a server at {stub.url}"):
        run_load_test(test)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": Server("127.0.0.1:8000")}, "expected an address like http://"),
        ({"loads": (Load(concurrency=0),)}, "expected `concurrency` of at least 1"),
        ({"loads": (Load(rate=0),)}, "expected `rate` above 0"),
        ({"loads": (Load(rate=1, burstiness=-1),)}, "expected `burstiness` above 0"),
        ({"span": Span(1, None, None)}, "expected `duration` or `num_prompts`, found neither"),
        ({"span": Span(-1, 1, None)}, "expected `warmup` from 0"),
        ({"span": Span(0, 0, None)}, "expected `duration` above 0"),
        ({"sampling": Sampling(max_tokens=0)}, "expected `max_tokens` of at least 1"),
        ({"sampling": Sampling(temperature=1), "checks": True}, "expected `check` with greedy"),
        ({"shared_prefix": -1}, "expected `shared_prefix` from 0"),
        ({"data": RandomLengths(0, 1)}, "expected `random_input_len` of at least 1"),
        ({"data": RandomLengths(1, 1, 1.0)}, "expected `random_range_ratio` from 0 to below 1"),
    ],
)
def test_bad_values_are_refused_before_anything_is_sent(
    changes: dict[str, Any], message: str
) -> None:
    test = replace(load_test(Stub("http://127.0.0.1:9"), questions("x")), **changes)
    with pytest.raises(UsageError, match=message):
        run_load_test(test)


def test_counters_are_compared() -> None:
    before = {"vllm:prefix_cache_hits_total": 100.0, "vllm:prefix_cache_queries_total": 400.0}
    after = {
        "vllm:prefix_cache_hits_total": 130.0,
        "vllm:prefix_cache_queries_total": 500.0,
        'trimode:forward_rows_total{model_name="m"}': 50.0,
        'trimode:forwards_total{graph="ar",model_name="m"}': 5.0,
        'trimode:forwards_total{graph="verify",model_name="m"}': 15.0,
        "vllm:spec_decode_num_drafts_total": 4.0,
        "vllm:spec_decode_num_draft_tokens_total": 20.0,
        "vllm:spec_decode_num_accepted_tokens_total": 10.0,
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"}': 4.0,
        'trimode:mode_switches_total{from="ar",to="linear_spec",reason="load"}': 2.0,
        'trimode:mode_switches_total{from="linear_spec",to="ar",reason="load"}': 1.0,
    }
    served = served_record(before, after)
    assert (served.hit_rate, served.rows_per_forward, served.mode_switches) == (0.3, 2.5, 3)
    assert served.forward_share == {"ar": 0.25, "verify": 0.75}
    assert served.spec_decode_acceptance_length == 3.5
    assert served.spec_decode_acceptance_rate == 50
    assert served.counters["vllm:prefix_cache_hits_total"] == 30
    assert served_record({}, {}).mode_switches is None


def test_metrics_of_the_server_are_read_before_and_after() -> None:
    text = (
        "# TYPE vllm:prefix_cache_hits counter\nvllm:prefix_cache_hits_total 5\n"
        "# TYPE trimode:rows gauge\ntrimode:rows 4\n"
    )
    with running(metrics=text) as stub:
        (run,) = run_load_test(load_test(stub, questions(script((0, "a"), tokens=1)))).runs
    assert run.served.counters == {}  # nothing grew, and a gauge is no counter
    assert run.served.mode_switches is None

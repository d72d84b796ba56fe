"""Mode auto: the policy against simulated texts, and the decoder against AR."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Built
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_texts import (
    CPU,
    GPU,
    Rates,
    bursts,
    by_stretch,
    by_text,
    constant,
    milliseconds_per_token,
)

from trimode.errors import UsageError
from trimode.runtime.auto import acceptance as estimate
from trimode.runtime.auto.acceptance import Acceptance
from trimode.runtime.auto.policy import AdaptivePolicy, FixedPolicy, Policy, StepCosts
from trimode.runtime.auto.prior import (
    PRIOR_ACCEPTANCE,
    AcceptanceHistory,
    FinishedText,
    Prior,
    acceptance_rate,
    tell_apart,
)
from trimode.runtime.auto.timings import (
    AcceptanceRecord,
    ForwardTime,
    Timings,
    save_timings,
    subject_of,
    table_path,
)
from trimode.runtime.decode import algorithms
from trimode.runtime.measure.acceptance import write_texts
from trimode.runtime.model import TriModeModel

# --- the policy alone

KINDS: dict[int, tuple[Rates, int]] = {
    7: (constant(0.97), 16),
    8: (constant(0.5), 40),
    9: (constant(0.97), 47),
}
"""First token of the prompt -> what texts are like and how long they are behind their first
token.
"""


def past_texts(kind: int, count: int) -> list[FinishedText]:
    """What `trimode bench` would have seen of such texts, in blocks of 32."""
    rates, length = KINDS[kind]
    texts = []
    for number in range(count):
        rng, position, tried, accepted = (
            np.random.default_rng((6, number)),
            0,
            np.zeros(31, np.int64),
            np.zeros(31, np.int64),
        )
        accepts = rng.random(length) < rates(rng, length)
        while position < length:
            drafts = accepts[position : position + 31]
            found = len(drafts) if drafts.all() else int(drafts.argmin())
            found = min(found, length - position - 1)
            accepted[:found] += 1
            tried[: found + (found < 31 and position + found + 1 < length)] += 1
            position += found + 1
        texts.append(FinishedText([kind, number], tried, accepted, length + 1))
    return texts


@pytest.mark.parametrize("is_confident", [True, False])
def test_texts_whose_kind_was_measured_are_written_faster(is_confident: bool) -> None:
    """Faster than by any single choice and than without knowing their kind, each kind and all of
    them, and the more so the shorter they are.
    """
    kinds = tell_apart([text for kind in KINDS for text in past_texts(kind, 20)])
    assert [one.num_tokens for one in kinds] == [0, 1, 1, 1]
    spent: dict[str, list[float]] = {}
    for kind, (rates, length) in KINDS.items():
        knowing = replace(CPU, history=AcceptanceHistory(0.93, kinds))
        ways: dict[str, Callable[[], Policy]] = {
            "knowing": partial(AdaptivePolicy, knowing, [kind, 999], is_confident=is_confident),
            "not knowing": partial(AdaptivePolicy, CPU, [kind, 999], is_confident=is_confident),
            **{str(n): partial(FixedPolicy, n) for n in (1, *CPU.lengths)},
        }
        for way, make in ways.items():
            spent.setdefault(way, []).append(
                milliseconds_per_token(
                    make, CPU, rates, length, 60, is_confident=is_confident, limit=500
                )
            )
    best_of_each = np.min([spent[str(n)] for n in (1, *CPU.lengths)], axis=0)
    assert (np.array(spent["knowing"]) < 1.03 * best_of_each).all()
    assert sum(spent["knowing"]) < 0.95 * sum(spent["not knowing"])
    assert sum(spent["knowing"]) < 0.85 * min(sum(spent[str(n)]) for n in (1, *CPU.lengths))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_that_leaves_no_doubt_is_doubted(rate: float) -> None:
    """Where every draft of the measured prompts was accepted, or none: what a text shows counts all
    the same.
    """
    policy = AdaptivePolicy(replace(CPU, history=AcceptanceHistory(rate)), is_confident=False)
    assert policy.choose(64, 1000) == (32 if rate else 1)
    for _ in range(30):
        length = step(policy, 1)
    assert length == 1


def test_blocks_share_what_is_left_of_a_text_of_known_length() -> None:
    """Of 17 tokens one is written: 16 are left, in one block of 16. Of 49, 48: in blocks of 32 and
    16, in whatever order.
    """
    for length, expected in ((17, [16]), (9, [8]), (49, [16, 32]), (33, [32])):
        kinds = tell_apart(
            [FinishedText([1, n], np.full(31, 50), np.full(31, 50), length) for n in range(20)]
        )
        policy, written, picks = (
            AdaptivePolicy(
                replace(CPU, history=AcceptanceHistory(0.93, kinds)), [1, 99], is_confident=True
            ),
            1,
            [],
        )
        while written < length:
            picks.append(policy.choose(64, 500))
            wanted = min(picks[-1], length - written)
            policy.rows_to_verify(wanted, np.full(picks[-1], 0.9999))
            policy.record(wanted)
            written += wanted
        assert sorted(picks) == expected, length


def regret(
    costs: StepCosts, rates: Rates, length: int, texts: int, *, is_confident: bool = False
) -> float:
    """What the policy takes over the best single choice, less 1."""
    run = partial(
        milliseconds_per_token,
        costs=costs,
        rates=rates,
        length=length,
        texts=texts,
        is_confident=is_confident,
    )
    return (
        run(lambda: AdaptivePolicy(costs, is_confident=is_confident))
        / min(run(partial(FixedPolicy, n)) for n in (1, *costs.lengths))
        - 1
    )


@pytest.mark.parametrize("costs", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7, 0.85, 0.93, 0.98])
def test_hardly_worse_than_the_best_single_choice_where_acceptance_is_constant(
    costs: StepCosts, rate: float
) -> None:
    """Where AR is best, what remains is that drafting is tried again now and then."""
    assert regret(costs, constant(rate), 500, 12) < (0.05 if rate > 0.5 else 0.08)


@pytest.mark.parametrize("costs", [CPU, GPU], ids=["cpu", "gpu"])
def test_better_than_any_single_choice_where_texts_differ(costs: StepCosts) -> None:
    assert regret(costs, by_text, 300, 30) < -0.1
    assert regret(costs, by_text, 60, 60) < -0.1
    assert regret(costs, by_stretch, 500, 12) < 0.03


def test_drafts_that_know_what_they_are_worth_make_it_better() -> None:
    """They tell what not to verify, where rows cost time, and how long the next block should be."""
    assert regret(CPU, by_stretch, 500, 12, is_confident=True) < min(
        -0.1, regret(CPU, by_stretch, 500, 12) - 0.05
    )
    assert regret(GPU, by_stretch, 500, 12, is_confident=True) < min(
        -0.02, regret(GPU, by_stretch, 500, 12) - 0.02
    )
    for costs in (CPU, GPU):
        assert (
            regret(costs, bursts, 300, 30, is_confident=True)
            < regret(costs, bursts, 300, 30) - 0.01
        )
        # Where acceptance is the same throughout a text, the text's past says it as well.
        assert (
            regret(costs, by_text, 300, 30, is_confident=True)
            < regret(costs, by_text, 300, 30) + 0.005
        )


def test_rows_that_are_verified() -> None:
    """As many as save more than they cost, of those that were measured; what lies behind the last
    token wanted saves nothing.
    """
    policy = AdaptivePolicy(replace(CPU, history=AcceptanceHistory(0.99)), is_confident=True)
    assert policy.choose(64, 1000) == 32
    certain = np.ones(32)
    # In the middle of a text a token more or two is not worth the next longer verification.
    for tokens, rows in {1: 8, 2: 8, 8: 8, 9: 8, 12: 16, 16: 16, 18: 16, 24: 32, 32: 32}.items():
        assert policy.rows_to_verify(32, np.where(np.arange(32) < tokens, 0.9999, 0.01)) == rows

    # At its end two tokens would be left to AR, which takes 1.8 ms for them, and the next longer
    # verification 1.7 ms more; one would not be worth it.
    for tokens, rows in {1: 8, 8: 8, 12: 16, 16: 16, 17: 16, 18: 32, 24: 32}.items():
        assert policy.rows_to_verify(tokens, certain) == rows


def test_where_tokens_are_drawn_all_that_is_wanted_is_verified() -> None:
    policy = AdaptivePolicy(replace(CPU, history=AcceptanceHistory(0.99)), is_confident=True)
    assert policy.choose(64, 1000) == 32
    assert {n: policy.rows_to_verify(n, None) for n in (1, 8, 9, 16, 17, 32)} == {
        1: 8,
        8: 8,
        9: 16,
        16: 16,
        17: 32,
        32: 32,
    }


def test_a_cut_says_nothing_in_favour_of_what_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 whose drafts are good for 7 slots, all of which are verified and accepted: the
    slots behind are as bad as they were judged.
    """
    # in this text what a draft says of the next block is wrong
    monkeypatch.setattr(estimate, "AHEAD_TRIALS", 0.0)
    confidence = np.where(np.arange(32) < 8, 0.999, 0.05)
    policy, lengths = (
        AdaptivePolicy(replace(CPU, history=AcceptanceHistory(0.99)), is_confident=True),
        [],
    )
    for _ in range(40):
        lengths.append(length := policy.choose(64, 1000))
        rows = policy.rows_to_verify(length, confidence[:length])
        policy.record(rows)
        assert rows == 8
    assert lengths[0] == 32
    assert 32 not in lengths[1:]


def test_what_a_draft_says_of_the_next_block_counts() -> None:
    """Its first token rejected: sure drafts behind it make the next block long, an end drafted
    behind it makes it short.
    """
    for confidence, num_wanted, length in (
        (np.full(32, 0.9999), 32, 32),
        (np.full(32, 0.9999), 9, 8),
        (np.full(32, 0.2), 32, 1),
    ):
        policy = AdaptivePolicy(replace(CPU, history=AcceptanceHistory(0.99)), is_confident=True)
        assert policy.choose(64, 1000) == 32
        policy.rows_to_verify(num_wanted, confidence)
        policy.record(1)
        assert policy.choose(65, 999) == length


def test_a_draft_that_was_unsure_of_everything_is_soon_forgotten() -> None:
    policy = AdaptivePolicy(CPU, is_confident=True)
    for tokens, confidence in ((32, 0.99), (32, 0.99), (1, 0.05)):
        length = policy.choose(64, 1000)
        policy.rows_to_verify(length, np.full(length, confidence))
        policy.record(min(length, tokens))
    steps = 0
    while policy.choose(64, 1000) == 1:
        policy.record(1)
        steps += 1
    assert 1 <= steps <= 6


def flat(num_slots: int, weight: float) -> Prior:
    return Prior((1 - PRIOR_ACCEPTANCE,) * num_slots, weight)


def expected_tokens(rates: Sequence[float]) -> np.ndarray:
    """Of a cycle in which at most 1, 2, ... tokens are wanted."""
    return np.cumsum([1.0, *np.cumprod(rates)])


def test_the_estimate_is_the_mean_of_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With next to no prior and no forgetting: the mean over the cycles of the tokens that were
    wanted, counted one by one.
    """
    monkeypatch.setattr(estimate, "SLOT_TRIALS", 1e-9)
    rng, acceptance = np.random.default_rng(1), Acceptance(flat(11, 1e-9))
    seen = [min(int(n), 12) for n in rng.geometric(0.2, 500)]
    for tokens in seen:
        acceptance.record(11, tokens - 1)
    for wanted in (1, 2, 7, 12):
        assert expected_tokens(acceptance.rates())[wanted - 1] == pytest.approx(
            np.mean([min(n, wanted) for n in seen])
        )


def test_short_blocks_say_nothing_against_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off at 4 slots, the same cycles give the same estimate for 4 slots, and one for all that
    is no lower than the truth.
    """
    monkeypatch.setattr(estimate, "SLOT_TRIALS", 1e-9)
    whole, cut = Acceptance(flat(30, 1e-9)), Acceptance(flat(30, 1e-9))
    for tokens in np.random.default_rng(2).geometric(0.1, 4000):
        whole.record(30, min(int(tokens), 31) - 1)
        cut.record(3, min(int(tokens), 4) - 1)
    np.testing.assert_allclose(expected_tokens(cut.rates())[:4], expected_tokens(whole.rates())[:4])
    assert expected_tokens(cut.rates())[30] == pytest.approx(
        expected_tokens(whole.rates())[30], rel=0.1
    )


def step(policy: Policy, tokens: int) -> int:
    """A step that yields so many tokens, or as many as it can; its block length."""
    length = policy.choose(64, 1000)
    rows = policy.rows_to_verify(length, None) if length > 1 else 1
    policy.record(min(tokens, rows))
    return length


def test_drafting_is_tried_again() -> None:
    policy = AdaptivePolicy(CPU, is_confident=True)
    for _ in range(20):
        length = step(policy, 1)
    assert length == 1
    steps = 0
    while step(policy, 1) == 1:
        steps += 1
    assert 20 < steps < 400


def test_costs_are_interpolated_between_cached_lengths() -> None:
    """Drafting pays at short lengths only; the break-even is where the two lines meet."""
    costs = StepCosts((100, 300), (1.0, 1.0), {8: (0.0, 99.0)}, {8: (1.0, 1.0)})
    policy = AdaptivePolicy(costs, is_confident=True)
    tokens = float(expected_tokens(Acceptance(AcceptanceHistory().prior((), 7)).rates())[7])
    even = 100 + 200 * (tokens - 1) / 99
    for past, block in (
        (1, 8),
        (100, 8),
        (int(even) - 1, 8),
        (int(even) + 2, 1),
        (300, 1),
        (10000, 1),
    ):
        assert policy.choose(past, 1000) == block


def test_the_end_is_not_drafted_past() -> None:
    """With one token left a cycle yields no more than AR does; a long block pays only where there
    is room for it.
    """
    policy = AdaptivePolicy(CPU, is_confident=True)
    for _ in range(20):
        step(policy, 32)
    assert [policy.choose(64, left) for left in (1, 8, 1000)] == [1, 8, 32]


def test_a_table_of_unequal_rows_is_refused() -> None:
    for past, ar in (((), ()), ((5, 3), (1.0, 1.0)), ((5,), (1.0, 2.0))):
        with pytest.raises(ValueError):
            StepCosts(past, ar, {}, {})
    with pytest.raises(ValueError):
        StepCosts((5,), (1.0,), {8: (1.0,)}, {4: (1.0,)})


# --- decoding


class Whim:
    """Chooses by lot, and by what the last step yielded."""

    def __init__(self, seed: int, lengths: Sequence[int] = (1, 2, 3, 7, 16)) -> None:
        self._rng, self._lengths, self._last = np.random.default_rng(seed), lengths, 1
        self.steps: list[tuple[int, int]] = []

    def choose(self, past: int, left: int) -> int:
        assert left >= 1
        assert past >= 0
        self._length = (
            1
            if self._last == 1 and self._rng.random() < 0.5
            else int(self._rng.choice(self._lengths))
        )
        self._rows = self._length
        return self._length

    def rows_to_verify(self, num_wanted: int, confidence: np.ndarray | None) -> int:
        assert 1 <= num_wanted <= self._length
        assert confidence is not None
        assert confidence.shape == (self._length,)
        self._rows = int(self._rng.integers(1, self._length + 1))
        return self._rows

    def record(self, num_tokens: int) -> None:
        assert 1 <= num_tokens <= self._rows
        self._last = num_tokens
        self.steps.append((self._length, num_tokens))


RULES = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 40),
        "repetition_penalty": st.sampled_from([1.0, 1.4]),
        "frequency_penalty": st.sampled_from([0.0, 1.3]),
        "logit_bias": st.sampled_from([None, {20: 3.0, 21: -50.0}]),
        "eos_token_ids": st.lists(st.integers(0, 99), max_size=3),
        "min_new_tokens": st.integers(0, 1),
        "logprobs": st.sampled_from([None, 2]),
        "use_drafter": st.booleans(),
    }
)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rules=RULES,
    prompt=st.lists(st.integers(12, 99), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_the_tokens_are_those_of_ar_whatever_is_picked(
    built: Callable[[str], Built],
    monkeypatch: pytest.MonkeyPatch,
    rules: dict[str, Any],
    prompt: list[int],
    seed: int,
) -> None:
    model, whim = built("one_kv_head").model, Whim(seed)
    monkeypatch.setattr(algorithms, "make_policy", lambda *_, **__: whim)
    expected = model.stream([prompt], "ar", **rules).finish()
    sequence = model.new_sequence([prompt])
    result = model.continue_sequence(sequence, "auto", **rules).finish()
    assert (result.token_ids, result.finish_reason) == (expected.token_ids, expected.finish_reason)
    assert result.picks is not None
    cycles = sum(count for length, count in result.picks.items() if length > 1)
    assert result.nfe == 1 + result.picks.get(1, 0) + 2 * cycles
    assert (result.forwards.draft, result.forwards.verify, result.forwards.decode) == (
        cycles,
        cycles,
        result.picks.get(1, 0),
    )
    assert sum(tokens for _, tokens in whim.steps) == len(result.token_ids) - 1
    assert (result.acceptance_length is None) == (cycles == 0)
    if rules["logprobs"] is not None:
        assert [t.token_id for t in result.logprobs or []] == result.token_ids
    after = model.continue_sequence(sequence, "ar", max_new_tokens=3, eos_token_ids=()).finish()
    fresh = model.stream(
        [prompt + result.token_ids], "ar", max_new_tokens=3, eos_token_ids=()
    ).finish()
    assert after.token_ids == fresh.token_ids


def test_without_a_table_it_is_linear_spec_and_says_so(
    built: Callable[[str], Built],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path))
    model = opened(built)
    options: dict[str, Any] = {"max_new_tokens": 30, "block_length": 7, "eos_token_ids": ()}
    with caplog.at_level(logging.WARNING, "trimode.runtime"):
        result = model.stream([[20, 30]], "auto", **options).finish()
    assert "trimode bench" in caplog.text
    expected = model.stream([[20, 30]], "linear_spec", **options).finish()
    assert (result.token_ids, result.nfe, result.acceptance_length) == (
        expected.token_ids,
        expected.nfe,
        expected.acceptance_length,
    )
    assert result.picks == {7: expected.forwards.verify}
    assert expected.picks is None
    assert model.auto_generate([[20, 30]], 30, 7, eos_token_id=())[0].tolist() == [
        [20, 30, *expected.token_ids]
    ]


def test_the_kept_table_decides(
    built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block costs nothing, or everything; longer ones than were asked for do not count."""
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path))
    for ms, picked in ((1e-3, {8}), (1e3, {1})):
        model = opened(built)
        timings = table(model, {8: ms, 16: ms / 1e3})
        save_timings(timings, table_path(timings.subject))
        options: dict[str, Any] = {"max_new_tokens": 20, "block_length": 15, "eos_token_ids": ()}
        result = model.stream([[20, 30]], "auto", **options).finish()
        assert result.picks is not None
        # The last token is AR's unless a cycle costs less even for one.
        assert set(result.picks) == picked
        with pytest.raises(UsageError, match="--rows 1,7"):
            model.stream([[20, 30]], "auto", block_length=7)


def test_a_batch_goes_by_the_times_of_its_size(
    built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks cost next to nothing for a single text and everything for two or more."""
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path))
    model = opened(built)
    single, joint = table(model, {8: 1e-3}), table(model, {8: 1e3})
    together = tuple(one.model_copy(update={"batch": 4}) for one in joint.forwards)
    save_timings(
        single.model_copy(update={"forwards": single.forwards + together}),
        table_path(single.subject),
    )
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_ids": ()}
    prompts = [[20, 30], [40, 41, 42], [77]]
    results = model.generate_batch(prompts, "auto", max_rows=2, **options)
    assert [set(result.picks or ()) for result in results] == [{1}, {1}, {1}]
    assert set(model.stream([prompts[0]], "auto", **options).finish().picks or ()) == {8}
    assert [
        set(result.picks or ())
        for result in model.generate_batch(prompts, "auto", max_rows=1, **options)
    ] == [{8}, {8}, {8}]
    assert [result.token_ids for result in results] == [
        model.stream([ids], "ar", **options).finish().token_ids for ids in prompts
    ]


def test_a_given_table_of_another_machine_is_used_with_a_warning(
    built: Callable[[str], Built], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = opened(built)
    timings = table(model, {8: 1e3})
    file = tmp_path / "timings.json"
    save_timings(
        timings.model_copy(
            update={"subject": timings.subject.model_copy(update={"cpu": "abacus"})}
        ),
        file,
    )
    other = TriModeModel.from_pretrained(model.bundle.path, num_threads=1, timings=file)
    with caplog.at_level(logging.WARNING, "trimode.runtime"):
        assert other.stream([[20]], "auto", max_new_tokens=5, eos_token_ids=()).finish().picks == {
            1: 4
        }
    assert "abacus" in caplog.text


def test_bad_choices(built: Callable[[str], Built], tmp_path: Path) -> None:
    model = built("three_kv_heads").model
    with pytest.raises(UsageError, match="threshold"):
        model.stream([[20]], "auto", threshold=0.9)
    with pytest.raises(UsageError, match="nowhere"):
        TriModeModel.from_pretrained(model.bundle.path, timings=tmp_path / "nowhere.json")
    (tmp_path / "bad.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(UsageError, match="bad"):
        TriModeModel.from_pretrained(model.bundle.path, timings=tmp_path / "bad.json")


def opened(built: Callable[[str], Built]) -> TriModeModel:
    """A model that has not looked for timings yet."""
    model = built("three_kv_heads").model
    return TriModeModel(model.bundle, model.session, model.target, 1)


def table(model: TriModeModel, cycle_ms: dict[int, float]) -> Timings:
    def forward(graph: Any, rows: int, ms: float, drafter: bool = False) -> ForwardTime:
        return ForwardTime(
            graph=graph,
            rows=rows,
            past=9,
            drafter=drafter,
            num_runs=1,
            least_ms=ms,
            lower_quartile_ms=ms,
            median_ms=ms,
            upper_quartile_ms=ms,
        )

    forwards = [forward("ar", 1, 1.0)]
    for length, ms in cycle_ms.items():
        forwards += [
            forward("draft", length, ms / 2, drafter=True),
            forward("verify", length, ms / 2),
        ]
    subject = subject_of(model.bundle, model.target, 1)
    return Timings(
        trimode_version="0",
        command="by hand",
        date="today",
        system="none",
        subject=subject,
        forwards=tuple(forwards),
    )


# --- what is expected before a text has shown its own


@pytest.mark.parametrize("use_drafter", [True, False])
def test_the_acceptance_of_prompts_is_counted(
    built: Callable[[str], Built], use_drafter: bool
) -> None:
    """Against the independent model's drafts for the text that AR writes."""
    it, length, tried, accepted = built("three_kv_heads"), 6, 0, 0
    prompts = [[20, 30], [40, 41, 42], [77]]
    for prompt in prompts:
        text = it.model.ar_generate([prompt], max_new_tokens=128)[0][0].tolist()
        last = len(prompt)  # the last token that is known
        while last < len(text) - 1:
            block = [text[last], *[it.model.model.mask_token_id] * (length - 1)]
            drafts = (
                it.reference.logits(text[:last] + block, block=length, drafter=use_drafter)[
                    1 - length :
                ]
                .argmax(-1)
                .tolist()
            )
            right = 0
            while (
                right < length - 1
                and last + 1 + right < len(text)
                and drafts[right] == text[last + 1 + right]
            ):
                right += 1
            is_over = last + right + 1 >= len(text) - 1
            # The last token of a text may have been drafted or not; it is the one that is not
            # counted.
            right = min(right, len(text) - 2 - last)
            accepted += right
            tried += right + (right < length - 1 and not is_over)
            last += right + 1
    assert tried > 20
    assert acceptance_rate(
        list(write_texts(it.model, prompts, length, use_drafter=use_drafter))
    ) == pytest.approx(accepted / tried)


def test_what_was_measured_of_acceptance_is_expected(built: Callable[[str], Built]) -> None:
    timings = table(opened(built), {8: 3.9, 16: 5.6})
    records = [
        AcceptanceRecord(drafter=drafter, rate=rate, block_length=8, num_prompts=1)
        for drafter, rate in ((False, 0.2), (True, 0.99))
    ]
    assert timings.costs(use_drafter=True).history == AcceptanceHistory(PRIOR_ACCEPTANCE)
    costs = timings.model_copy(update={"acceptance": tuple(records)}).costs(use_drafter=True)
    assert costs.history.rate == 0.99
    assert AdaptivePolicy(costs, is_confident=True).choose(9, 1000) == 16
    assert (
        AdaptivePolicy(replace(costs, history=AcceptanceHistory(0.2)), is_confident=True).choose(
            9, 1000
        )
        == 1
    )

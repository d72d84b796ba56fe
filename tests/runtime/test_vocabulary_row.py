"""Rows over a whole vocabulary: against a slow version in plain Python, transformers' processors,
and draws that the dense definition makes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import FALSE_ALARM, chi_squared_p_value, with_transformers

from trimode.runtime.decode.sampling import SamplingOptions, distribution, draw, generator
from trimode.runtime.decode.token_distribution import TokenDistribution, accept_or_replace, leading
from trimode.runtime.decode.vocabulary_row import Row, best_token, row_distribution

VOCABULARY = 131072
NOTHING = np.empty(0, np.int64), np.empty(0)


def dense(found: TokenDistribution, size: int) -> np.ndarray:
    """Probabilities ``(size,)``."""
    table = np.zeros(size)
    table[slice(None) if found.ids is None else found.ids] = found.weights / found.weights.sum()
    return table


def slowly(scores: list[float], s: SamplingOptions) -> np.ndarray:
    """The processors one by one, a token at a time, sums exact."""
    best = max(scores)
    kth = sorted(scores)[-s.top_k] if 0 < s.top_k < len(scores) else -math.inf
    weights = {
        i: math.exp(max(-1e300, (score - best) / s.temperature))
        for i, score in enumerate(scores)
        if score >= kth
    }
    if s.top_p < 1:
        droppable, dropped = (1 - s.top_p) * math.fsum(weights.values()), []
        for i in sorted(weights, key=lambda i: (weights[i], i))[:-1]:
            if math.fsum([*dropped, weights[i]]) > droppable:
                break
            dropped.append(weights.pop(i))
    if s.min_p > 0:
        least = s.min_p * max(weights.values())
        weights = {i: w for i, w in weights.items() if w >= least}
    total = math.fsum(weights.values())
    table = np.zeros(len(scores))
    for i, weight in weights.items():
        table[i] = weight / total
    return table


def agrees(found: np.ndarray, scores: list[float], s: SamplingOptions) -> bool:
    """Whether these are the probabilities; where a sum meets the edge of ``top_p`` to the last
    digit, rounding decides, and both sides of the edge are right.
    """
    for shift in (0.0, 1e-12, -1e-12):
        near = replace(s, top_p=min(1.0, s.top_p + shift)) if s.top_p < 1 else s
        if np.allclose(found, slowly(scores, near), rtol=1e-9, atol=1e-300):
            return True
    return False


def make_logits(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    normal = rng.normal(size=size)
    return {
        "normal": lambda: normal * 3,
        "flat": lambda: normal * 0.01,
        "wide": lambda: normal * 1e4,
        "beyond": lambda: np.clip(normal, -1, 1) * 3e38,
        "bf16": lambda: (normal.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
        "whole numbers": lambda: rng.integers(-2, 3, size).astype(float),
        "equal": lambda: np.full(size, -7.25),
        "one": lambda: np.where(np.arange(size) == size // 2, -3.0, -np.inf),
        "few": lambda: np.where(rng.random(size) < 0.1, normal, -np.inf),
        "zipf": lambda: -2.0 * np.log(rng.permutation(size) + 1.0),
    }[kind]().astype(np.float32)


KINDS = (
    "normal",
    "flat",
    "wide",
    "beyond",
    "bf16",
    "whole numbers",
    "equal",
    "one",
    "few",
    "zipf",
)
SAMPLING = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([1e-308, 1e-3, 0.05, 0.7, 1.0, 1.9, 1e3, 1e308]),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 511, 4999]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.75, 0.5, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.02, 0.4, 1.0]),
)


@settings(max_examples=400, deadline=None)
@given(
    sampling=SAMPLING,
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 2, 5, 63, 511, 512, 513, 1025]),
    num_replaced=st.sampled_from([0, 0, 1, 7, 200]),
    is_float64=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_row_is_processed_as_a_slow_version_does(
    sampling: SamplingOptions,
    kind: str,
    size: int,
    num_replaced: int,
    is_float64: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    logits = make_logits(kind, size, rng)
    if not np.isfinite(logits).any():
        logits[0] = 1.0
    ids = np.sort(rng.choice(size, min(num_replaced, size), replace=False))
    scores = logits[ids] * 1.0 + rng.choice([0.0, 1.5, -2.0, -np.inf], len(ids))
    row = Row(logits.astype(np.float64) if is_float64 else logits, ids, scores.astype(np.float64))
    whole = logits.astype(np.float64)
    whole[ids] = row.scores
    if not np.isfinite(whole).any():
        return
    before = row.logits.copy()
    found = dense(row_distribution(row, sampling), size)
    assert agrees(found, whole.tolist(), sampling)
    assert best_token(row) == int(whole.argmax())
    np.testing.assert_array_equal(row.logits, before)


@pytest.mark.parametrize("kind", ["normal", "flat", "bf16", "equal", "zipf", "wide"])
@pytest.mark.parametrize("top_p", [0.9999, 0.9, 0.5, 0.1])
def test_top_p_of_a_large_vocabulary(kind: str, top_p: float) -> None:
    """So many tokens that halves are put aside before any are sorted."""
    rng = np.random.default_rng(3)
    for size in (20011, VOCABULARY):
        logits = make_logits(kind, size, rng)
        for more in ({}, {"top_k": 9000}, {"min_p": 0.3}):
            sampling = SamplingOptions(0.8, top_p=top_p, **more)  # type: ignore[arg-type]
            found = dense(row_distribution(Row(logits, *NOTHING), sampling), size)
            expected = distribution(logits, sampling)
            # equal weights add up to another last digit: one of them more or less
            assert abs(np.count_nonzero(found) - np.count_nonzero(expected)) <= 1
            assert np.count_nonzero((found > 0) != (expected > 0)) <= 1
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=2 / size)


@settings(max_examples=100, deadline=None)
@given(
    sampling=SAMPLING.filter(lambda s: 0.01 < s.temperature < 100),
    kind=st.sampled_from(["normal", "flat", "few", "zipf"]),
    seed=st.integers(0, 999),
)
def test_a_row_is_that_of_transformers(sampling: SamplingOptions, kind: str, seed: int) -> None:
    logits = make_logits(kind, 3001, np.random.default_rng(seed))
    expected = with_transformers(logits.astype(np.float64), sampling, np.zeros(3001, bool))
    found = dense(row_distribution(Row(logits, *NOTHING), sampling), 3001)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [7, 512, 1500, VOCABULARY])
def test_seeds_give_the_draws_of_the_dense_definition(size: int) -> None:
    """Whichever tokens were put aside beforehand, and in however many blocks the rest is added."""
    rng, first, second = np.random.default_rng(0), generator(5)[0], generator(5)[0]
    for kind in ("normal", "flat", "zipf", "bf16"):
        logits = make_logits(kind, size, rng)
        for s in (
            SamplingOptions(1.0),
            SamplingOptions(0.7, top_k=40),
            SamplingOptions(1.3, top_p=0.93),
            SamplingOptions(0.9, min_p=0.02),
            SamplingOptions(0.8, 300, 0.9, 0.001),
        ):
            p, found = distribution(logits, s), row_distribution(Row(logits, *NOTHING), s)
            for _ in range(5 if size == VOCABULARY else 40):
                assert found.draw(first) == int(draw(p, second))


@pytest.mark.parametrize("case", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.03}])
def test_draws_from_the_vocabulary_have_their_probabilities(case: dict[str, Any]) -> None:
    logits = make_logits("zipf", VOCABULARY, np.random.default_rng(1))
    sampling = SamplingOptions(1.1, **case)
    found, rng = row_distribution(Row(logits, *NOTHING), sampling), generator(2)[0]
    drawn = [found.draw(rng) for _ in range(20000)]
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert chi_squared_p_value(counts, distribution(logits, sampling)) > FALSE_ALARM
    moved = np.roll(counts, 1)
    assert chi_squared_p_value(moved, distribution(logits, sampling)) < 1e-9


class _Rng:
    """Returns one number, again and again."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


@pytest.mark.parametrize("size", [1, 6, 511, 512, 513, 1024, 5000])
def test_a_draw_inverts_the_cumulative_sum(size: int) -> None:
    rng = np.random.default_rng(size)
    weights = np.where(rng.random(size) < 0.5, 0.0, rng.random(size))
    weights[rng.integers(size)] = 1.0
    ids = np.sort(rng.choice(9999, size, replace=False))
    exact = np.array([math.fsum(weights[: i + 1]) for i in range(size)])
    edges = (exact / exact[-1]).clip(0, 1 - 2.0**-53)
    for number in (0.0, 2.0**-53, 1 - 2.0**-53, *rng.random(200), *edges[:50], *edges[-50:]):
        place = TokenDistribution(None, weights).draw(_Rng(number))  # type: ignore[arg-type]
        assert TokenDistribution(ids, weights).draw(_Rng(number)) == ids[place]  # type: ignore[arg-type]
        assert weights[place] > 0
        slack = 1e-12 * exact[-1]
        aim = number * exact[-1]
        assert (exact[place - 1] if place else 0.0) <= aim + slack
        assert aim < exact[place] + slack


def test_leading_values() -> None:
    for size in (1, 511, 512, 513, 3000):
        values = np.ones(size)
        for most in (-1.0, 0.0, 0.5, 1.0, 510.0, 511.0, 512.0, 512.5, 513.0, 2999.5, 9999.0):
            assert leading(values, most) == min(size, max(0, int(most)))
    assert leading(np.array([0.0, 0.0, 2.0, 1.0]), 0.0) == 2


def test_what_a_draft_leaves() -> None:
    """Among all tokens, or among some, tokens of the draft that are not there included."""
    p = np.array([0.0, 0.3, 0.0, 0.25, 0.2, 0.25, 0.0])
    q_ids, q = np.array([3, 0, 1, 6, 5]), np.array([0.1, 0.3, 0.4, 0.1, 0.1])
    expected = p.copy()
    expected[q_ids] = np.maximum(p[q_ids] - q, 0)
    places = np.flatnonzero(p)
    for whole in (TokenDistribution(None, p * 8), TokenDistribution(places, p[places] * 8)):
        assert [whole[i] for i in range(7)] == pytest.approx(p.tolist())
        rest = whole.less(q_ids, q)
        assert rest is not None
        np.testing.assert_allclose(dense(rest, 7), expected / expected.sum())
        assert whole.less(places, p[places]) is None
        rng, counts = generator(3)[0], np.zeros(7, int)
        for slot in draw(np.broadcast_to(q, (20000, 5)), rng):
            counts[accept_or_replace(int(q_ids[slot]), whole, q_ids, q, rng)[0]] += 1
        assert chi_squared_p_value(counts, p) > FALSE_ALARM

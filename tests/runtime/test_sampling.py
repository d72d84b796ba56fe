"""Distributions against transformers' own processors; draws and the acceptance rule against exact
probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import (
    FALSE_ALARM,
    WRONG_RULES,
    chi_squared_p_value,
    exact_match,
    with_transformers,
)

from trimode.errors import UsageError
from trimode.runtime.decode.penalties import Penalties
from trimode.runtime.decode.sampling import (
    SamplingOptions,
    check_sampling,
    distribution,
    draw,
    generator,
    log_softmax,
)
from trimode.runtime.decode.token_distribution import TokenDistribution, accept_or_replace

P = np.array([0.3, 0.05, 0.25, 0.1, 0.0, 0.2, 0.1])
Q_IDS = np.array([1, 0, 4, 2, 6])
Q = np.array([0.4, 0.1, 0.2, 0.25, 0.05])


SAMPLING = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 3, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.97, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)


def penalised(logits: np.ndarray, sampling: SamplingOptions, seen: np.ndarray) -> np.ndarray:
    """Probabilities ``(..., n)`` of logits whose tokens were in the prompt where ``seen``."""
    scores = np.empty(logits.shape)
    for row in np.ndindex(logits.shape[:-1]):
        prompt = np.flatnonzero(seen[row]).tolist()
        penalties = Penalties(sampling, logits.shape[-1], prompt)
        scores[row] = penalties.changed(np.arange(logits.shape[-1]), logits[row])
    return distribution(scores, sampling)


@settings(max_examples=200, deadline=None)
@given(
    sampling=SAMPLING,
    size=st.sampled_from([1, 2, 5, 109, 3001]),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    seed=st.integers(0, 999),
)
def test_distributions_are_those_of_transformers(
    sampling: SamplingOptions, size: int, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits, seen = rng.normal(size=size) * spread, rng.random(size) < 0.2
    if size > 1 and seed % 3 == 0:
        logits[rng.integers(1, size)] = -np.inf  # forbidden
    np.testing.assert_allclose(
        penalised(logits, sampling, seen),
        with_transformers(logits, sampling, seen),
        rtol=1e-9,
        atol=1e-12,
    )


def test_rows_are_processed_one_by_one() -> None:
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(size=(4, 3, 5)) * 2, rng.random((4, 3, 5)) < 0.3
    for sampling in (
        SamplingOptions(0.8, 3, 0.8, 0.1, 1.2),
        SamplingOptions(0.0, repetition_penalty=2.0),
    ):
        together = penalised(logits, sampling, seen)
        for i in np.ndindex(4, 3):
            np.testing.assert_array_equal(together[i], penalised(logits[i], sampling, seen[i]))


def test_temperature_zero_and_the_limit_towards_it() -> None:
    logits = np.array([2.0, 5.0, 4.999, -1e4])
    np.testing.assert_array_equal(distribution(logits, SamplingOptions()), [0, 1, 0, 0])
    np.testing.assert_allclose(
        distribution(logits, SamplingOptions(1e-308)), [0, 1, 0, 0], atol=1e-12
    )
    found = penalised(
        logits, SamplingOptions(repetition_penalty=2.0), np.array([False, True, False, True])
    )
    np.testing.assert_array_equal(found, [0, 0, 1, 0])
    np.testing.assert_allclose(
        log_softmax(logits), torch.from_numpy(logits).log_softmax(-1).numpy(), rtol=1e-12
    )


def test_draws_have_their_probabilities() -> None:
    rng, _ = generator(1)
    table = np.stack([P, P[::-1]])
    drawn = draw(np.broadcast_to(table, (20000, 2, 7)), rng)
    for row in (0, 1):
        assert (
            chi_squared_p_value(np.bincount(drawn[:, row], minlength=7), table[row]) > FALSE_ALARM
        )
    assert not np.isin(drawn[:, 0], 4).any()  # probability 0


class _Rng:
    """Returns the largest number that a generator can."""

    def random(self, size: Any = None) -> Any:
        return np.full(size or (), 1 - 2.0**-53)[()]


def test_a_draw_never_takes_what_has_probability_zero() -> None:
    for weights in ([0.1, 0.9, 0.0], [0.0, 0.3, 0.0, 0.0], [1e-300, 0.0]):
        assert weights[int(draw(np.array(weights), _Rng()))] > 0  # type: ignore[arg-type]


def test_seeds() -> None:
    first, again, other = (generator(seed)[0].random(4).tolist() for seed in (7, 7, 8))
    assert first == again != other
    drawn = {generator(None)[1] for _ in range(8)}
    assert len(drawn) > 1
    rng, seed = generator(None)
    assert rng.random() == generator(seed)[0].random()


def outcomes(rule: Any, trials: int = 30000) -> tuple[np.ndarray, float]:
    """Tokens that come out of a rule, as counts, and the share of accepted drafts."""
    rng, _ = generator(5)
    counts, accepted = np.zeros(7, int), 0
    for slot in draw(np.broadcast_to(Q, (trials, 5)), rng):
        token, is_accepted = rule(int(Q_IDS[slot]), TokenDistribution(None, P), Q_IDS, Q, rng)
        counts[token] += 1
        accepted += is_accepted
    return counts, accepted / trials


def test_the_acceptance_rule_keeps_p_and_accepts_what_can_be() -> None:
    counts, accepted = outcomes(accept_or_replace)
    assert chi_squared_p_value(counts, P) > FALSE_ALARM
    q = np.zeros(7)
    q[Q_IDS] = Q
    overlap, match = np.minimum(P, q).sum(), (P * q).sum()
    for rate, expected in ((accepted, overlap), (outcomes(exact_match)[1], match)):
        assert abs(rate - expected) < 4 * np.sqrt(expected * (1 - expected) / 30000)
    assert overlap > 3 * match


@pytest.mark.parametrize("rule", WRONG_RULES)
def test_the_test_tells_a_wrong_rule(rule: Any) -> None:
    assert chi_squared_p_value(outcomes(rule)[0], P) < 1e-9


def test_filling_out_of_order_would_bias() -> None:
    """Two slots, two tokens, all sums exact: the rule keeps AR's distribution if the left slot is
    drawn first, and not if the right one is.
    """
    p1, p2 = np.array([0.5, 0.5]), np.array([[0.7, 0.3], [0.4, 0.6]])  # p2[first]
    # q_second[what was drawn before]
    q_first, q_second = np.array([0.5, 0.5]), np.array([[0.9, 0.1], [0.2, 0.8]])

    def accepted_pairs(is_left_first: bool) -> np.ndarray:
        pairs = np.zeros((2, 2))
        for a, b in np.ndindex(2, 2):  # drafts left, right
            before, after = (a, b) if is_left_first else (b, a)
            drawn = q_first[before] * q_second[before, after]
            q1, q2 = (q_first[a], q_second[a, b]) if is_left_first else (q_second[b, a], q_first[b])
            accept1 = min(1, p1[a] / q1)
            accept2 = min(1, p2[a, b] / q2)
            pairs[a, b] += drawn * accept1 * accept2
            rest2 = np.maximum(p2[a] - (q_second[a] if is_left_first else q_first), 0)
            if rest2.any():
                pairs[a] += drawn * accept1 * (1 - accept2) * rest2 / rest2.sum()
            rest1 = np.maximum(p1 - (q_first if is_left_first else q_second[b]), 0)
            if rest1.any():
                pairs += drawn * (1 - accept1) * (rest1 / rest1.sum())[:, None] * p2
        return pairs

    exact = p1[:, None] * p2
    np.testing.assert_allclose(accepted_pairs(True), exact, atol=1e-12)
    assert np.abs(accepted_pairs(False) - exact).max() > 0.02


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"seed": -1},
    ],
)
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as raised:
        check_sampling(SamplingOptions(**wrong))
    assert raised.value.hint


@pytest.mark.parametrize("penalty", [1e-308, 1e-320, 1e308])
@pytest.mark.parametrize("temperature", [0.0, 1e-308, 1.0, 1e308])
def test_a_penalty_beyond_all_measure_leaves_a_distribution(
    penalty: float, temperature: float
) -> None:
    """Whatever overflows; what must not be drawn is not, even among tokens that are all
    penalised.
    """
    sampling = SamplingOptions(temperature, repetition_penalty=penalty)
    for seen in ([1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0]):
        for logits in ([3.0, 2.0, -np.inf, -1.0], [-3.0, -2.0, -np.inf, -1.0]):
            found = penalised(np.array(logits), sampling, np.array(seen, bool))
            assert found.sum() == pytest.approx(1)
            assert found[2] == 0

"""Sampling by others, wrong rules, and Pearson's chi-squared test that tells right from wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimode.runtime.decode.sampling import SamplingOptions
from trimode.runtime.decode.token_distribution import TokenDistribution, accept_or_replace

FALSE_ALARM = 1e-3
"""A right sampler fails a test with this probability; seeds are fixed, so that a test which has
passed goes on passing.
"""


def chi_squared_p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Probability of a deviation at least as large. Cells of fewer than 5 expected draws are
    pooled; a draw of probability 0 gives 0.
    """
    counts, expected = (
        np.asarray(counts, float).ravel(),
        np.asarray(probabilities, float).ravel() * np.sum(counts),
    )
    if counts[expected == 0].any():
        return 0.0
    small = expected < 5
    seen = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(
        torch.special.gammaincc(
            torch.tensor((len(wanted) - 1) / 2.0, dtype=torch.float64), torch.tensor(statistic / 2)
        )
    )


def with_transformers(logits: np.ndarray, s: SamplingOptions, seen: np.ndarray) -> np.ndarray:
    """Probabilities ``(n,)`` of logits in float64, by transformers' processors."""
    scores = torch.from_numpy(logits.copy())[None]
    ids = torch.from_numpy(np.flatnonzero(seen))[None]
    processors = (
        (
            RepetitionPenaltyLogitsProcessor(s.repetition_penalty),
            s.repetition_penalty != 1 and bool(seen.any()),
        ),
        (TemperatureLogitsWarper(s.temperature), s.temperature != 1),
        (TopKLogitsWarper(max(1, s.top_k)), s.top_k > 0),
        (TopPLogitsWarper(s.top_p), s.top_p < 1),
        (MinPLogitsWarper(s.min_p), s.min_p > 0),
    )
    for process, is_on in processors:
        if is_on:
            scores = process(ids, scores)
    return scores.softmax(-1)[0].numpy()


def with_penalties(
    logits: np.ndarray, s: SamplingOptions, prompt: Sequence[int], answer: Sequence[int]
) -> np.ndarray:
    """Logits ``(n,)`` in float64: transformers' bias and repetition penalty, then OpenAI's
    formula, ``mu[j] - c[j] * frequency - float(c[j] > 0) * presence``, token by token.
    """
    scores, ids = torch.from_numpy(logits.astype(np.float64))[None], [*prompt, *answer]
    if s.logit_bias:
        biases = {(token,): bias for token, bias in s.logit_bias}
        scores = SequenceBiasLogitsProcessor(biases)(torch.tensor([ids]), scores)
    if s.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(torch.tensor([ids]), scores)
    changed = scores[0].numpy().copy()
    for j in set(answer):
        count = list(answer).count(j)
        changed[j] -= count * s.frequency_penalty + float(count > 0) * s.presence_penalty
    return changed


def without_penalties(s: SamplingOptions) -> SamplingOptions:
    """What is left to do after :func:`with_penalties`."""
    return replace(
        s, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias=()
    )


def exact_match(
    draft: int, p: TokenDistribution, q_ids: np.ndarray, q: np.ndarray, rng: Any
) -> tuple[int, bool]:
    """The rule of the model's reference implementation: an independent draw, and the draft is right
    if it is the same.
    """
    token = p.draw(rng)
    return token, token == draft


def always(
    draft: int, p: TokenDistribution, q_ids: np.ndarray, q: np.ndarray, rng: Any
) -> tuple[int, bool]:
    return draft, True


def by_p_alone(
    draft: int, p: TokenDistribution, q_ids: np.ndarray, q: np.ndarray, rng: Any
) -> tuple[int, bool]:
    if rng.random() < p[draft]:
        return draft, True
    others = p.less(np.array([draft]), np.array([p[draft]])) or p
    return accept_or_replace(draft, others, q_ids, q, rng)


def no_residual(
    draft: int, p: TokenDistribution, q_ids: np.ndarray, q: np.ndarray, rng: Any
) -> tuple[int, bool]:
    token, is_accepted = accept_or_replace(draft, p, q_ids, q, rng)
    return (token, True) if is_accepted else (p.draw(rng), False)


WRONG_RULES = (always, by_p_alone, no_residual)

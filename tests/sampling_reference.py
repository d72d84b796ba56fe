"""Sampling by others, wrong rules, and Pearson's chi-squared test that tells right from wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimode.runtime.decode.sampling import SamplingOptions, accept_or_replace, draw

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


def exact_match(
    draft: int, p: np.ndarray, q_ids: np.ndarray, q: np.ndarray, rng: Any
) -> tuple[int, bool]:
    """The rule of the model's reference implementation: an independent draw, and the draft is right
    if it is the same.
    """
    token = int(draw(p, rng))
    return token, token == draft


def always(
    draft: int, p: np.ndarray, q_ids: np.ndarray, q: np.ndarray, rng: Any
) -> tuple[int, bool]:
    return draft, True


def by_p_alone(
    draft: int, p: np.ndarray, q_ids: np.ndarray, q: np.ndarray, rng: Any
) -> tuple[int, bool]:
    if rng.random() < p[draft]:
        return draft, True
    return accept_or_replace(draft, np.where(np.arange(len(p)) == draft, 0.0, p), q_ids, q, rng)


def no_residual(
    draft: int, p: np.ndarray, q_ids: np.ndarray, q: np.ndarray, rng: Any
) -> tuple[int, bool]:
    token, is_accepted = accept_or_replace(draft, p, q_ids, q, rng)
    return (token, True) if is_accepted else (int(draw(p, rng)), False)


WRONG_RULES = (always, by_p_alone, no_residual)

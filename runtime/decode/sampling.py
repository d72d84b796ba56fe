"""Makes a distribution from logits, and draws a token from it.

These are the processors of transformers' ``generate``, in its order and meaning, on numpy arrays.

Temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). What
comes before these, penalties and biases, is in :mod:`trimode.runtime.decode.penalties`. Pure
functions; probabilities are float64. They are the definition, made for the few candidates of a
slot; :mod:`trimode.runtime.decode.vocabulary_row` does the same to a whole vocabulary.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimode.errors import UsageError
from trimode.runtime.sessions.base import Ids

Probabilities = NDArray[np.float64]

MOST_PENALTY = 2.0
"""Largest presence or frequency penalty, in either direction: OpenAI's range."""
MOST_BIAS = 100.0
"""Largest bias of a token, in either direction: OpenAI's range."""


@dataclass(frozen=True)
class SamplingOptions:
    """Says how the next token is drawn.

    Attributes:
        temperature: Divisor of the logits; 0 = the most probable token (greedy).
        top_k: Number of most probable tokens that are kept; 0 = all.
        top_p: Probability that the most probable tokens, which are kept, have together; 1 = all.
        min_p: Least share of the highest probability with which tokens are kept; 0 = all.
        repetition_penalty: Divisor of the positive logits, and factor of the negative ones, of
            tokens that the prompt or the text has; 1 = none.
        seed: Seed of the draws; None = one that is drawn itself, and reported.
        presence_penalty: Amount taken from the logits of tokens that the answer has; 0 = none.
        frequency_penalty: Amount taken from these logits as often as the answer has the token; 0 =
            none.
        logit_bias: Pairs of token id and bias, which is added to the token's logit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def changes_logits(self) -> bool:
        """Whether some token's logit is not left as the model gives it."""
        return self.repetition_penalty != 1 or self.counts_tokens or bool(self.logit_bias)

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how often the answer has a token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def is_random(self) -> bool:
        """Whether tokens are drawn; otherwise the most probable one is taken."""
        return self.temperature > 0


def check_sampling(sampling: SamplingOptions) -> None:
    """Raise :class:`UsageError` for an option out of its range."""
    s, all_kept = sampling, "leave it out to keep every token"
    if not (0 <= s.temperature < math.inf):
        raise UsageError(
            f"expected a temperature of 0 or more, found {s.temperature}",
            "0 takes the most probable token, 1 draws as the model has it",
        )
    if s.top_k < 0:
        raise UsageError(f"expected a top_k of 0 or more, found {s.top_k}", all_kept)
    if not 0 < s.top_p <= 1:
        raise UsageError(f"expected a top_p above 0 and up to 1, found {s.top_p}", all_kept)
    if not 0 <= s.min_p <= 1:
        raise UsageError(f"expected a min_p from 0 to 1, found {s.min_p}", all_kept)
    if not (0 < s.repetition_penalty < math.inf):
        raise UsageError(
            f"expected a repetition_penalty above 0, found {s.repetition_penalty}",
            "1 is none; 1.1 is usual",
        )
    for name in ("presence_penalty", "frequency_penalty"):
        _check_span(f"a {name}", getattr(s, name), MOST_PENALTY, "0 is none")
    for token, bias in s.logit_bias:
        _check_span(f"a logit_bias of token {token}", bias, MOST_BIAS, "-100 forbids a token")
    if s.seed is not None and s.seed < 0:
        raise UsageError(
            f"expected a seed of 0 or more, found {s.seed}", "leave it out to have one drawn"
        )


def _check_span(what: str, value: float, most: float, hint: str) -> None:
    if not -most <= value <= most:
        raise UsageError(f"expected {what} from {-most:g} to {most:g}, found {value}", hint)


def generator(seed: int | None) -> tuple[np.random.Generator, int]:
    """Make a generator of the draws, and return its seed.

    The seed is itself drawn if None. Same seed, same draws, on every machine (Philox).
    """
    chosen = secrets.randbits(32) if seed is None else seed
    return np.random.Generator(np.random.Philox(chosen)), chosen


def distribution(logits: ArrayLike, sampling: SamplingOptions) -> Probabilities:
    """Compute what a token is drawn from.

    Args:
        logits: Logits ``(..., n)``, or log-probabilities; -inf for what must not be drawn, at least
            one finite.
        sampling: Processors. At temperature 0 all the probability is on the highest logit.

    Returns:
        Probabilities ``(..., n)``, each row of sum 1.
    """
    scores = np.array(logits, np.float64)
    if not sampling.is_random:
        best = np.zeros_like(scores)
        np.put_along_axis(best, scores.argmax(-1)[..., None], 1.0, -1)
        return best
    # the highest score is now 0, and others may overflow to -inf, which is what they come to
    with np.errstate(over="ignore"):
        scores = (scores - scores.max(-1, keepdims=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        kth = np.partition(scores, -sampling.top_k, -1)[..., -sampling.top_k, None]
        scores[scores < kth] = -np.inf
    probabilities = _softmax(scores)
    if sampling.top_p < 1:
        probabilities = _normalised(
            np.where(_outside_top_p(probabilities, sampling.top_p), 0.0, probabilities)
        )
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.max(-1, keepdims=True)
        probabilities = _normalised(np.where(probabilities < least, 0.0, probabilities))
    return probabilities


def log_softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """Return log-probabilities ``(..., n)`` of logits ``(..., n)``."""
    scores = np.array(logits, np.float64)
    scores -= scores.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return scores


def draw(probabilities: Probabilities, rng: np.random.Generator) -> Ids:
    """Draw an index for each row of ``(..., n)``.

    It inverts the cumulative sum: one random number a row, ``(...)``. Rows need not sum to 1.
    """
    cumulative = probabilities.cumsum(-1)
    # `random` is below 1, but the product may round up to the total: never an index past the last
    # positive one.
    aim = np.minimum(
        rng.random(cumulative.shape[:-1]) * cumulative[..., -1],
        np.nextafter(cumulative[..., -1], 0),
    )
    return np.asarray((cumulative <= aim[..., None]).sum(-1), np.int64)


def _softmax(scores: NDArray[np.float64]) -> Probabilities:
    """Compute the softmax of scores whose highest is 0."""
    return _normalised(np.exp(scores))


def _normalised(weights: NDArray[np.float64]) -> Probabilities:
    return np.asarray(weights / weights.sum(-1, keepdims=True), np.float64)


def _outside_top_p(probabilities: Probabilities, top_p: float) -> NDArray[np.bool_]:
    """Find the least probable tokens, which are outside ``top_p``.

    Together they have at most ``1 - top_p``. The most probable one is never among them.
    """
    outside = np.zeros(probabilities.shape, bool)
    for row in np.ndindex(probabilities.shape[:-1]):
        outside[row] = _row_outside_top_p(probabilities[row], top_p)
    return outside


def _row_outside_top_p(row: Probabilities, top_p: float) -> NDArray[np.bool_]:
    # Tokens below (1 - top_p) / n cannot reach 1 - top_p together: a vocabulary need not be sorted
    # for its long tail.
    outside = row < (1 - top_p) / row.size
    rest = np.flatnonzero(~outside)
    ascending = rest[row[rest].argsort(kind="stable")]
    below = row[outside].sum() + row[ascending].cumsum()
    outside[ascending[below <= 1 - top_p]] = True
    outside[ascending[-1]] = False
    return outside

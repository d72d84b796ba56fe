"""Holds probabilities over a vocabulary, and draws from them.

Drawing inverts the cumulative sum over the tokens in their order. The sum is taken in blocks, so
that a draw from 131,072 tokens adds each of them once and looks at one block.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimode.runtime.sessions.base import Ids

Weights = NDArray[np.float64]

_BLOCK = 512
"""Values that are added before the sum is kept."""


class TokenDistribution:
    """Holds probabilities of some tokens of a vocabulary.

    All others have none.

    Args:
        ids: Tokens ``(n,)`` in ascending order; None = token i has weight i.
        weights: Weights ``(n,)`` in proportion to the probabilities; at least one is positive.
    """

    def __init__(self, ids: Ids | None, weights: ArrayLike) -> None:
        self.ids = ids
        self.weights: Weights = np.asarray(weights, np.float64)

    @cached_property
    def total(self) -> float:
        """Sum of the weights."""
        return float(self.weights.sum())

    def __getitem__(self, token: int) -> float:
        """Return the probability of a token."""
        places, found = self._places(np.array([token], np.int64))
        return float(self.weights[places[0]]) / self.total if found[0] else 0.0

    def draw(self, rng: np.random.Generator) -> int:
        """Draw a token; takes one random number."""
        # The product may round up to the total, and sums differ by rounding: what comes out has a
        # weight all the same.
        aim = min(rng.random() * self.total, math.nextafter(self.total, 0))
        place = min(leading(self.weights, aim), len(self.weights) - 1)
        if not self.weights[place]:
            place = _nearest_positive(self.weights, place)
        return place if self.ids is None else int(self.ids[place])

    def select(self, places: NDArray[np.int64]) -> TokenDistribution:
        """Keep the tokens at these places, and their proportions.

        The places are ``(m,)`` in ascending order.
        """
        ids = places if self.ids is None else self.ids[places]
        return TokenDistribution(ids, self.weights[places])

    def less(self, ids: Ids, probabilities: Weights) -> TokenDistribution | None:
        """Take away probabilities, down to 0; None where nothing is left.

        Args:
            ids: Distinct tokens ``(m,)``.
            probabilities: Probabilities ``(m,)`` to take from these.
        """
        places, found = self._places(ids)
        places = places[found]
        weights = self.weights.copy()
        taken = probabilities[found] * self.total
        weights[places] = np.maximum(weights[places] - taken, 0.0)
        return TokenDistribution(self.ids, weights) if weights.any() else None

    def _places(self, ids: Ids) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Find where tokens are among the weights, and whether they are."""
        if self.ids is None:
            return ids, np.ones(ids.shape, bool)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return places, self.ids[places] == ids


def accept_or_replace(
    draft: int, p: TokenDistribution, q_ids: Ids, q: Weights, rng: np.random.Generator
) -> tuple[int, bool]:
    """Draw a token from ``p`` with the help of a draft.

    It is speculative sampling's rule, for a draft from ``q``.

    The draft is accepted with probability min(1, p/q); otherwise the token comes from max(0, p -
    q), normalised. Every other rule that keeps ``p`` accepts less often (Leviathan et al. 2023,
    theorem 3.5 and appendix A.3).

    Args:
        draft: Token that was drawn from ``q``.
        p: Distribution of the token.
        q_ids: Distinct tokens ``(k,)``; ``q`` is 0 for all others.
        q: Probabilities ``(k,)`` of these.
        rng: Generator that is independent of the draft's draw.

    Returns:
        The token, and whether it is the accepted draft.
    """
    if rng.random() * q[q_ids == draft].sum() < p[draft]:
        return draft, True
    # Rejecting has probability 0 where p = q; rounding may still lead here with nothing left.
    return (p.less(q_ids, q) or p).draw(rng), False


def leading(values: Weights, most: float) -> int:
    """Count the leading values that add up to at most ``most``.

    The values ``(n,)`` are never negative.
    """
    whole = len(values) - len(values) % _BLOCK
    sums = values[:whole].reshape(-1, _BLOCK).sum(-1).cumsum()
    block = int(sums.searchsorted(most, side="right"))
    before = sums[block - 1] if block else 0.0
    inside = before + values[block * _BLOCK :][:_BLOCK].cumsum()
    return block * _BLOCK + int(inside.searchsorted(most, side="right"))


def _nearest_positive(weights: Weights, place: int) -> int:
    """Find the place of a positive weight.

    It is the last one before ``place``, else the first.
    """
    positive = np.flatnonzero(weights)
    return int(positive[max(0, int(positive.searchsorted(place)) - 1)])

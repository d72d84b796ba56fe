"""Turns a row of logits into what a token is drawn from.

The row is over the whole vocabulary. The result is that of
:func:`trimode.runtime.decode.sampling.distribution`, in float64, without computing what no option
asks for:

- Few tokens are penalised or forbidden. They are kept beside the row, which stays float32.
- ``top_k`` and ``min_p`` are bounds on the logits. Where one is given, the exponential is taken of
  the tokens above the bound alone.
- ``top_p`` sorts weights, not tokens, and only those that could matter.

Bounds are decided on the logits before the temperature divides them: order is the same, and a
temperature that rounds two logits to one score makes no tie.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.decode.sampling import SamplingOptions
from trimode.runtime.decode.token_distribution import TokenDistribution, Weights, leading
from trimode.runtime.sessions.base import Ids

_SLACK = 1e-9
"""How far, relatively, a bound made of logarithms is lowered; what passes is looked at again."""
_FARTHEST = 708.0
"""A token whose score is further below the highest has a weight that float64 no longer holds in
full. No draw hits it, since random numbers have 53 bits, and computing it is slow.
"""
_SORTED = 4096
"""Weights that are sorted; of more, halves are put aside first."""


class _Scratch(threading.local):
    """Keeps memory in each thread from row to row.

    New pages cost more than their use.
    """

    values: Weights = np.empty(0)


_scratch = _Scratch()


class Row(NamedTuple):
    """Holds logits of which some have been replaced.

    Attributes:
        logits: Logits ``(V,)``, floating point.
        ids: Tokens ``(m,)`` in ascending order whose logits are replaced.
        scores: Scores ``(m,)`` in their place; -inf = never this token. At least one token has a
            finite logit.
    """

    logits: NDArray[Any]
    ids: Ids
    scores: NDArray[np.float64]

    def without_replaced(self) -> NDArray[Any]:
        """Return the logits, -inf for those that are replaced."""
        if not self.ids.size:
            return self.logits
        others = self.logits.copy()
        others[self.ids] = -np.inf
        return others


def best_token(row: Row) -> int:
    """Return the token of the highest logit, the first one among equals."""
    others = row.without_replaced()
    best = int(others.argmax())
    if not row.ids.size:
        return best
    place = int(row.scores.argmax())
    token, lead = int(row.ids[place]), row.scores[place] - np.float64(others[best])
    return token if lead > 0 or (lead == 0 and token < best) else best


def row_distribution(row: Row, sampling: SamplingOptions) -> TokenDistribution:
    """Compute what a token is drawn from, at a temperature above 0.

    Args:
        row: Logits, penalised and forbidden tokens replaced.
        sampling: Temperature, ``top_k``, ``top_p`` and ``min_p``.
    """
    others = row.without_replaced()
    highest = max(float(others.max()), float(row.scores.max(initial=-np.inf)))
    bound = _bound(others, row.scores, highest, sampling)
    ids, scores = _above(others, row, bound)
    kept = TokenDistribution(ids, _weights(scores, highest, sampling.temperature))
    if sampling.top_p < 1:
        kept = _keep_top_p(kept, sampling.top_p)
    if sampling.min_p > 0:
        kept = _keep(kept, kept.weights >= sampling.min_p * kept.weights.max())
    return kept


def _bound(
    others: NDArray[Any], scores: NDArray[np.float64], highest: float, sampling: SamplingOptions
) -> float:
    """Find the logit below which no token can be drawn."""
    bound = highest - _FARTHEST * sampling.temperature
    if 0 < sampling.top_k < len(others):
        bound = max(bound, _kth_highest(others, scores, sampling.top_k))
    # top_p needs the sum over all that top_k leaves
    if sampling.min_p > 0 and sampling.top_p == 1:
        span = sampling.temperature * math.log(sampling.min_p)
        slack = _SLACK * (abs(highest) - span + sampling.temperature)
        bound = max(bound, highest + span - slack)
    return bound


def _kth_highest(others: NDArray[Any], scores: NDArray[np.float64], k: int) -> float:
    """Find the k-th highest of the other and the replaced logits."""
    size = len(others)
    best = np.partition(others, size - k)[size - k :].astype(np.float64)
    if not scores.size:
        return float(best[0])
    return float(np.partition(np.concatenate([best, scores]), len(scores))[len(scores)])


def _above(others: NDArray[Any], row: Row, bound: float) -> tuple[Ids | None, NDArray[np.float64]]:
    """Find tokens whose logit is at least ``bound``, with these logits.

    The logits are float64. Where these tokens are most, all tokens are returned (None),
    with -inf for those below.
    """
    is_above, is_in = others >= _rounded_up(bound, others.dtype), row.scores >= bound
    count = np.count_nonzero(is_above)
    if 2 * count > len(others):
        scores = others.astype(np.float64)
        if count < len(others) - len(row.ids):
            scores[np.flatnonzero(~is_above)] = -np.inf
        scores[row.ids] = np.where(is_in, row.scores, -np.inf)
        return None, scores
    ids = np.flatnonzero(is_above)
    scores = others[ids].astype(np.float64)
    if is_in.any():
        places = np.searchsorted(ids, row.ids[is_in])
        ids = np.insert(ids, places, row.ids[is_in])
        scores = np.insert(scores, places, row.scores[is_in])
    return ids, scores


def _rounded_up(bound: float, dtype: np.dtype[Any]) -> Any:
    """Return the least value of a type not below ``bound``.

    Comparing within the type is quicker.
    """
    with np.errstate(over="ignore"):
        value = np.array(bound).astype(dtype)[()]
    return value if np.float64(value) >= bound else np.nextafter(value, dtype.type(np.inf))


def _weights(scores: NDArray[np.float64], highest: float, temperature: float) -> Weights:
    """Compute probabilities but for a factor, in place; the highest is 1."""
    # What overflows to -inf, by a low temperature or far below the highest, is as good as that.
    with np.errstate(over="ignore"):
        scores -= highest
        if temperature != 1:
            scores /= temperature
    return np.exp(scores, out=scores)


def _keep_top_p(kept: TokenDistribution, top_p: float) -> TokenDistribution:
    """Drop the least probable tokens, which are outside ``top_p``.

    Together they have at most ``1 - top_p``. Of equal tokens at the edge the first ones are
    dropped; the last most probable one never is.
    """
    weights, droppable = kept.weights, (1 - top_p) * kept.total
    # Tokens below this share cannot reach `droppable` together: the long tail is not sorted.
    rest = _where(weights, weights >= droppable / len(weights))
    edge, equals = _edge(rest, droppable - (kept.total - float(rest.sum())))
    stays = weights >= edge
    if equals:
        stays[np.flatnonzero(weights == edge)[:equals]] = False
    return _keep(kept, stays)


def _edge(weights: Weights, most: float) -> tuple[float, int]:
    """Find the least weight that stays when the smallest are dropped.

    Args:
        weights: Weights ``(n,)``; their order is changed.
        most: Most that the dropped ones may add up to; one weight stays in any case.

    Returns:
        That weight, and how many equal ones are dropped.
    """
    low, high = 0, len(weights)
    while high - low > _SORTED:  # the smallest `low` weights are dropped, those from `high` on stay
        middle = (low + high) // 2
        weights[low:high].partition(middle - low)
        lower = float(weights[low:middle].sum())
        if lower <= most:
            low, most = middle, most - lower
        else:
            high = middle
    weights[low:high].sort()
    dropped = min(low + leading(weights[low:high], most), len(weights) - 1)
    edge = float(weights[dropped])
    return edge, int(np.count_nonzero(weights[:dropped] == edge))


def _where(weights: Weights, stays: NDArray[np.bool_]) -> Weights:
    """Return the weights that stay, in memory to be written to.

    Where most stay, the others are among them.
    """
    if 2 * np.count_nonzero(stays) <= len(weights):
        return weights[np.flatnonzero(stays)]
    if _scratch.values.size < len(weights):
        _scratch.values = np.empty(len(weights))
    copied = _scratch.values[: len(weights)]
    copied[:] = weights
    return copied


def _keep(kept: TokenDistribution, stays: NDArray[np.bool_]) -> TokenDistribution:
    """Keep the tokens that stay.

    Where most do, the others' weights become 0, in place.
    """
    count = np.count_nonzero(stays)
    if count == len(stays):
        return kept
    if 2 * count > len(stays):
        np.multiply(kept.weights, stays, out=kept.weights)
        return TokenDistribution(kept.ids, kept.weights)
    return kept.select(np.flatnonzero(stays))

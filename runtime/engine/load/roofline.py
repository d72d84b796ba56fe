"""Fits a forward's time: it waits for memory, or it computes.

Whichever takes longer counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
MOST_TURNS = 12
"""Fits after which no better one is looked for."""


@dataclass(frozen=True, slots=True)
class Forwards:
    """Holds forwards side by side, in arrays ``(n,)``.

    Each forward is one entry of every array.

    Attributes:
        rows: Texts in a forward.
        tokens: New tokens of each text.
        cached: Tokens cached before them.
        ms: Time of the forward, in milliseconds.
    """

    rows: Numbers
    tokens: Numbers
    cached: Numbers
    ms: Numbers


@dataclass(frozen=True, slots=True)
class Roofline:
    """Predicts a forward as ``max(memory, compute)``, each a sum of non-negative terms.

    Attributes:
        memory: Milliseconds of a forward (launch and weights), of a row, and of a cached token.
        compute: Milliseconds of a forward, of a new token, and of a new token over a cached one.
    """

    memory: tuple[float, float, float]
    compute: tuple[float, float, float]

    def ms(self, rows: Any, tokens: Any, cached: Any) -> Any:
        """Predict the milliseconds of forwards; numbers or arrays of one shape."""
        new = rows * tokens
        memory = self.memory[0] + self.memory[1] * rows + self.memory[2] * rows * cached
        compute = self.compute[0] + self.compute[1] * new + self.compute[2] * new * cached
        return np.maximum(memory, compute)


def fit_roofline(found: Forwards) -> Roofline:
    """Fit the two sums to measured forwards, relative errors counting alike.

    Which forwards wait for memory is not known. It is first taken to be those of at most so many
    new tokens, for each number there is, and then found by taking turns: fit both sums, and ask
    them. The best result counts.
    """
    new = found.rows * found.tokens
    tries = [_refined(new <= most, found) for most in np.unique(new)]
    return min(tries, key=lambda one: _error(one, found))


def _refined(is_memory: NDArray[np.bool_], found: Forwards) -> Roofline:
    """Fit until each forward turns out to be on its side.

    There are :data:`MOST_TURNS` fits at most.
    """
    new = found.rows * found.tokens
    memory = np.stack([np.ones_like(new), found.rows, found.rows * found.cached], 1)
    compute = np.stack([np.ones_like(new), new, new * found.cached], 1)
    for _ in range(MOST_TURNS):
        fitted = Roofline(
            _non_negative(memory[is_memory], found.ms[is_memory]),
            _non_negative(compute[~is_memory], found.ms[~is_memory]),
        )
        following = memory @ np.array(fitted.memory) >= compute @ np.array(fitted.compute)
        if (following == is_memory).all():
            break
        is_memory = following
    return fitted


def _error(roofline: Roofline, found: Forwards) -> float:
    predicted = roofline.ms(found.rows, found.tokens, found.cached)
    return float(np.square(predicted / found.ms - 1).sum())


def _non_negative(terms: Numbers, ms: Numbers) -> tuple[float, float, float]:
    """Fit by least squares of relative errors.

    A term that would be negative is left out.
    """
    solved = np.zeros(terms.shape[1])
    kept = _independent(terms) if len(ms) else []
    while kept:
        scaled = terms[:, kept] / ms[:, None]
        values = np.linalg.lstsq(scaled, np.ones(len(ms)), rcond=None)[0]
        if (values >= 0).all():
            solved[kept] = values
            break
        del kept[int(values.argmin())]
    return float(solved[0]), float(solved[1]), float(solved[2])


def _independent(terms: Numbers) -> list[int]:
    """Find the columns that are no combination of earlier ones.

    Where all forwards have equally many cached tokens, one column is a multiple of another.
    """
    kept: list[int] = []
    for column in range(terms.shape[1]):
        if len(terms) and np.linalg.matrix_rank(terms[:, [*kept, column]]) > len(kept):
            kept.append(column)
    return kept

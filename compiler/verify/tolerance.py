"""Bounds what a target may differ by, from its unit roundoff.

A hidden state is a sum of ``2 L + 1`` terms, the embedding and what each of L layers adds twice,
and each is rounded once or a few times to the compute type. Such errors add up like a random walk,
so relative to the largest logit

    largest error  <=  c * u * sqrt(2 L + 1)

where u is the unit roundoff, half the distance from 1 to the next number.

With float16 and bfloat16, products accumulate in float32 and only what is stored is rounded: c = 6.
In float32 the sums over thousands of terms round in the same type: c = 168, which makes 1e-5 of c *
u. Torch's own eager forwards in these types, against float64, stay below a third of the bound on
the demo checkpoint (6 layers) and on random ones of 26 and 34 layers (docs/reference/verify.md).
The mean error may be a sixth of the largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimode.formats.contract import DType

UNIT_ROUNDOFFS: dict[DType, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_FACTORS: dict[DType, float] = {"float32": 168.0, "float16": 6.0, "bfloat16": 6.0}


@dataclass(frozen=True)
class Tolerance:
    """Holds the bounds for one compute type and depth.

    Attributes:
        dtype: Compute type.
        relative: Largest error of a logit, or of a key or value, over the largest reference value.
    """

    dtype: DType
    relative: float

    @property
    def relative_mean(self) -> float:
        """Mean error over the largest reference value."""
        return self.relative / 6

    @property
    def must_equal(self) -> bool:
        """Whether tokens must be the reference's.

        In 16-bit types they may part where the reference itself hardly prefers one.
        """
        return self.dtype == "float32"

    def logits(self, scale: float) -> float:
        """Largest error of a logit where the largest reference logit is ``scale``."""
        return self.relative * scale

    def probabilities(self, scale: float) -> float:
        """Largest error of a probability where the largest reference logit is ``scale``.

        ``dp/dz = p (1 - p) <= 1/4``, and of the thousands of logit errors the largest is rarely one
        of the few candidates whose probability is not nearly 0: half of it is taken.
        """
        bound = self.logits(scale) / 8
        return 1.0 if bound > 1 else bound  # not `min`, which would make 1 of NaN

    def near_tie(self, scale: float) -> float:
        """How much the reference may prefer its own token.

        Each of two logits may be off by the bound.
        """
        return 2 * self.logits(scale)


def tolerance_for(dtype: DType, num_layers: int) -> Tolerance:
    """The bounds of a model of ``num_layers`` layers computed in ``dtype``."""
    return Tolerance(dtype, _FACTORS[dtype] * UNIT_ROUNDOFFS[dtype] * math.sqrt(2 * num_layers + 1))

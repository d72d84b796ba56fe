"""Which masked slots of a block to fill after a denoise forward: the policies of block diffusion,
one function each.

=============
====================================================================================================
``threshold`` every slot whose token has at least this probability; the most probable one in any
case (the reference) ``schedule``  ``ceil(masks left / steps left)`` slots, the most probable ones;
a step a slot is serial denoising ``margin``    every slot whose token is at least so much more
probable than the next; the clearest one in any case ``leftmost``  the first masked slot ``learned``
every slot that a trained network scores at least so high; the one it scores highest in any case
=============
====================================================================================================

A filled slot is never masked again. ``threshold`` is the reference's rule to the letter, and may
choose a slot whose token is the mask token, which then stays masked; the others leave such slots
out, and choose none where there are no others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.sessions.base import Array, Ids

SamplerName = Literal["threshold", "schedule", "margin", "leftmost", "learned"]
Slots = NDArray[np.bool_]


@dataclass(frozen=True)
class Denoised:
    """A block of L slots after a denoise forward.

    Attributes:
        block: ``(L,)``, what the forward saw.
        masked: ``(L,)``, slots that are not filled yet.
        ids, probabilities: ``(L, n)``, candidates of each slot, best first.
        tokens: ``(L,)``, what each slot would be filled with: the best candidate, unless it was
        drawn or a rule forbade that.
        confidence: ``(L,)``, the probability that the model gives it.
        mask_token_id: marks a masked slot.
        step: denoise forwards that the block has had before this one.
    """

    block: Ids
    masked: Slots
    ids: Array
    probabilities: Array
    tokens: Array
    confidence: NDArray[Any]
    mask_token_id: int
    step: int

    @property
    def fillable(self) -> Slots:
        """Masked slots with a token other than the mask token."""
        slots: Slots = self.masked & (self.tokens != self.mask_token_id)
        return slots


FillPolicy = Callable[[Denoised], Slots]
"""The slots to fill, ``(L,)``: masked ones only."""


@runtime_checkable
class Scorer(Protocol):
    """How sure it is that the best candidate of a masked slot is right.

    What the learned policy asks.
    """

    def score(
        self, block: Ids, masked: Slots, ids: Array, probabilities: Array
    ) -> NDArray[np.float32]:
        """From 0 to 1 for each slot ``(L,)``; the arguments are those of :class:`Denoised`."""
        ...


def fill_policy(
    name: SamplerName, threshold: float, steps: int, scorer: Scorer | None
) -> FillPolicy:
    """The policy of this name.

    Args:
        name: which.
        threshold: of ``threshold``, ``margin`` and ``learned``.
        steps: of ``schedule``.
        scorer: of ``learned``.
    """
    if name == "learned":
        assert scorer is not None, "checked where the options are"
        return partial(fill_learned, threshold=threshold, scorer=scorer)
    policies: dict[str, FillPolicy] = {
        "threshold": partial(fill_threshold, threshold=threshold),
        "schedule": partial(fill_schedule, steps=steps),
        "margin": partial(fill_margin, threshold=threshold),
        "leftmost": fill_leftmost,
    }
    return policies[name]


def fill_threshold(denoised: Denoised, threshold: float) -> Slots:
    """See the module: by the probability of the token."""
    return reaching(denoised.masked, denoised.confidence, threshold)


def fill_schedule(denoised: Denoised, steps: int) -> Slots:
    """See the module: so many a step that no slot is masked after ``steps`` of them.

    The slot further left among equals.
    """
    count = -(-int(denoised.masked.sum()) // max(1, steps - denoised.step))
    ranked = np.argsort(-np.where(denoised.fillable, denoised.confidence, -np.inf), kind="stable")
    chosen = np.zeros_like(denoised.masked)
    chosen[ranked[:count]] = True
    return chosen & denoised.fillable


def fill_margin(denoised: Denoised, threshold: float) -> Slots:
    """See the module: by the probability of the token less that of the best other candidate."""
    is_other = denoised.ids != denoised.tokens[:, None]
    others = np.where(is_other, denoised.probabilities, 0).max(-1)
    return reaching(denoised.fillable, denoised.confidence - others, threshold)


def fill_leftmost(denoised: Denoised) -> Slots:
    """See the module: strictly from left to right."""
    chosen = np.zeros_like(denoised.masked)
    if denoised.masked.any():
        chosen[denoised.masked.argmax()] = True
    return chosen & denoised.fillable


def fill_learned(denoised: Denoised, threshold: float, scorer: Scorer) -> Slots:
    """See the module. A score is about the best candidate.

    A slot with another token has that token's probability in its place.
    """
    scores = scorer.score(denoised.block, denoised.masked, denoised.ids, denoised.probabilities)
    scores = np.where(denoised.tokens == denoised.ids[:, 0], scores, denoised.confidence)
    return reaching(denoised.fillable, scores, threshold)


def reaching(slots: Slots, values: NDArray[Any], threshold: float) -> Slots:
    """Those of ``slots`` whose value reaches the threshold, and the one with the highest in any
    case.
    """
    values = np.where(slots, values, -np.inf)
    chosen: Slots = slots & (values >= threshold)
    if slots.any():
        chosen[values.argmax()] = True
    return chosen

"""Chooses which masked slots of a block a denoise forward fills.

These are the policies of block diffusion, one function each:

- ``threshold``: every slot whose token has at least this probability; the most probable one in any
  case (the reference)
- ``schedule``: ``ceil(masks left / steps left)`` slots, the most probable ones; a step a slot is
  serial denoising
- ``margin``: every slot whose token is at least so much more probable than the next; the clearest
  one in any case
- ``leftmost``: the first masked slot
- ``learned``: every slot that a trained network scores at least so high; the one it scores highest
  in any case

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
    """Describes a block of L slots after a denoise forward.

    Attributes:
        block: Block that the forward saw, ``(L,)``.
        masked: Slots that are not filled yet, ``(L,)``.
        ids, probabilities: Candidates of each slot, ``(L, n)``, best first.
        tokens: Tokens that the slots would be filled with, ``(L,)``: the best candidate, unless it
            was drawn or a rule forbade that.
        confidence: Probability that the model gives each, ``(L,)``.
        mask_token_id: Id that marks a masked slot.
        step: Number of denoise forwards that the block has had before this one.
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
    """Scores how surely a masked slot's best candidate is right.

    The learned policy asks it.
    """

    def score(
        self, block: Ids, masked: Slots, ids: Array, probabilities: Array
    ) -> NDArray[np.float32]:
        """Return a score from 0 to 1 for each slot, ``(L,)``.

        The arguments are those of :class:`Denoised`.
        """
        ...


def fill_policy(
    name: SamplerName, threshold: float, steps: int, scorer: Scorer | None
) -> FillPolicy:
    """Return the policy of this name.

    Args:
        name: Name of the policy.
        threshold: Threshold of ``threshold``, ``margin`` and ``learned``.
        steps: Number of steps of ``schedule``.
        scorer: Scorer of ``learned``.
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
    """Choose slots by the probability of the token, as the module says."""
    return reaching(denoised.masked, denoised.confidence, threshold)


def fill_schedule(denoised: Denoised, steps: int) -> Slots:
    """Choose so many slots that ``steps`` steps leave none masked.

    They are the most probable ones; the slot further left among equals.
    """
    count = -(-int(denoised.masked.sum()) // max(1, steps - denoised.step))
    ranked = np.argsort(-np.where(denoised.fillable, denoised.confidence, -np.inf), kind="stable")
    chosen = np.zeros_like(denoised.masked)
    chosen[ranked[:count]] = True
    return chosen & denoised.fillable


def fill_margin(denoised: Denoised, threshold: float) -> Slots:
    """Choose slots by the lead of the token, as the module says.

    The lead is its probability less that of the best other candidate.
    """
    is_other = denoised.ids != denoised.tokens[:, None]
    others = np.where(is_other, denoised.probabilities, 0).max(-1)
    return reaching(denoised.fillable, denoised.confidence - others, threshold)


def fill_leftmost(denoised: Denoised) -> Slots:
    """Choose the first masked slot: strictly from left to right."""
    chosen = np.zeros_like(denoised.masked)
    if denoised.masked.any():
        chosen[denoised.masked.argmax()] = True
    return chosen & denoised.fillable


def fill_learned(denoised: Denoised, threshold: float, scorer: Scorer) -> Slots:
    """Choose slots by their scores, as the module says.

    A score is about the best candidate. A slot with another token has that token's probability in
    its place.
    """
    scores = scorer.score(denoised.block, denoised.masked, denoised.ids, denoised.probabilities)
    scores = np.where(denoised.tokens == denoised.ids[:, 0], scores, denoised.confidence)
    return reaching(denoised.fillable, scores, threshold)


def reaching(slots: Slots, values: NDArray[Any], threshold: float) -> Slots:
    """Choose those of ``slots`` whose value reaches the threshold.

    The one with the highest value is chosen in any case.
    """
    values = np.where(slots, values, -np.inf)
    chosen: Slots = slots & (values >= threshold)
    if slots.any():
        chosen[values.argmax()] = True
    return chosen

"""Searches the fewest forwards that denoise a block as serial denoising does.

*Serial* denoising fills one slot a forward, the most probable of the masked ones: what a threshold
that nothing reaches does. It takes as many forwards as there are masked slots, and its tokens are
the *target*. An oracle that knows the target fills several slots a forward, each with what is at
that moment its most probable token, and only where that is the target's. Such a step is *safe* if
from what it leaves the target can still be reached in such steps.

Two oracles, which differ in what they may fill together:

- ``prefix``: the slots in the order of their confidence, up to the first whose token is not the
  target's. No confidence threshold, set for each forward by somebody who knows the target, can fill
  others. It is what the Nemotron-Labs-Diffusion report (arXiv 2607.05722, section 4) calls the
  speed of light.
- ``any``: whichever slots have the target's token, also behind one that has not. What a learned
  sampler that judges every slot by itself could do at best.

Both take the largest safe step: all the slots they may fill, else all but the least confident of
these, and so on, found by depth-first search over sets of filled slots, each denoised once. It
never takes more forwards than serial denoising. That the largest first step leads to the fewest
forwards of all is likely, and not proven: every step fills as much as it can, and more that is
known seldom makes a right token wrong.

A slot whose token is the mask token itself counts as filled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.sessions.base import Array, Ids

Oracle = Literal["prefix", "any"]
ORACLES: tuple[Oracle, ...] = ("prefix", "any")
MAX_FORWARDS = 5000
"""Most forwards of one search, as in the report."""

Denoise = Callable[[Ids], tuple[Array, Array]]
"""Ids and probabilities ``(L, n)`` of each slot's candidates, best first, for a block ``(L,)``."""


@dataclass(frozen=True)
class Path:
    """Records the steps that filled a block.

    Attributes:
        steps: Slots filled by each forward.
        is_exhausted: Whether the search ended at its limit of forwards; the steps are then those of
            serial denoising.
    """

    steps: tuple[tuple[int, ...], ...]
    is_exhausted: bool = False


class BlockOracle:
    """Searches paths to the target of one block, after one text.

    Args:
        denoise: Forward over the block; must give the same for the same block.
        block: Block ``(L,)``, some slots masked.
        mask_token_id: Token that marks these.
        eos: Tokens that end a text. A block is done when no slot up to the first of them is masked:
            what follows cannot matter.
    """

    def __init__(
        self, denoise: Denoise, block: Ids, mask_token_id: int, eos: tuple[int, ...]
    ) -> None:
        self._denoise, self._block, self._mask, self._eos = denoise, block, mask_token_id, eos
        self._masked = tuple(np.flatnonzero(block == mask_token_id).tolist())
        self._seen: dict[frozenset[int], tuple[Ids, NDArray[np.float64]]] = {}
        self.target, self.serial = self._fill_serially()

    def fewest(self, oracle: Oracle, max_forwards: int = MAX_FORWARDS) -> Path:
        """Find the oracle's path to the target.

        Forwards that were done before are not counted towards the limit.
        """
        search = _Search(self, oracle, len(self._seen) + max_forwards)
        try:
            steps = search.run(frozenset())
        except _OutOfForwardsError:
            return Path(self.serial.steps, is_exhausted=True)
        assert steps is not None, "serial denoising is a path"
        return Path(steps)

    def is_done(self, filled: frozenset[int]) -> bool:
        """Tell whether every slot that matters is filled."""
        ends = np.isin(self.target, self._eos) & (
            self._is_given() | _members(filled, len(self.target))
        )
        last = int(ends.argmax()) if ends.any() else len(self.target)
        return not any(slot < last and slot not in filled for slot in self._masked)

    def candidates(self, filled: frozenset[int], oracle: Oracle) -> list[int]:
        """List the slots that an oracle may fill next, most confident first."""
        tokens, confidence = self.predict_filled(filled)
        ranked = sorted(
            (slot for slot in self._masked if slot not in filled),
            key=lambda slot: (-confidence[slot], slot),
        )
        right = [slot for slot in ranked if tokens[slot] == self.target[slot]]
        if oracle == "any":
            return right
        first_wrong = next(
            (i for i, slot in enumerate(ranked) if tokens[slot] != self.target[slot]), len(ranked)
        )
        return ranked[:first_wrong]

    def predict_filled(
        self, filled: frozenset[int], target: Ids | None = None
    ) -> tuple[Ids, NDArray[np.float64]]:
        """Predict every slot's best token and its probability, ``(L,)`` each.

        ``filled`` slots have the target's token. Each set is run once.
        """
        if filled not in self._seen:
            block, slots = self._block.copy(), list(filled)
            block[slots] = (self.target if target is None else target)[slots]
            ids, probabilities = self._denoise(block)
            self._seen[filled] = (
                ids[:, 0].astype(np.int64),
                probabilities[:, 0].astype(np.float64),
            )
        return self._seen[filled]

    @property
    def num_forwards(self) -> int:
        """Different blocks that were denoised."""
        return len(self._seen)

    def _is_given(self) -> NDArray[np.bool_]:
        given: NDArray[np.bool_] = self._block != self._mask
        return given

    def _fill_serially(self) -> tuple[Ids, Path]:
        """Fill the block one slot a forward.

        The path ends where the runtime would stop.
        """
        target = self._block.copy()
        order: list[int] = []
        for _ in self._masked:
            tokens, confidence = self.predict_filled(frozenset(order), target)
            slot = min(
                (s for s in self._masked if s not in order), key=lambda s: (-confidence[s], s)
            )
            target[slot] = tokens[slot]
            order.append(slot)
        self.target = target
        count = next(n for n in range(len(order) + 1) if self.is_done(frozenset(order[:n])))
        return target, Path(tuple((slot,) for slot in order[:count]))


class _OutOfForwardsError(Exception):
    """Ends a search that has done as many forwards as it may."""


class _Search:
    """Searches depth-first, the largest step first.

    A set of filled slots from which the target cannot be reached is not visited twice.
    """

    def __init__(self, block: BlockOracle, oracle: Oracle, max_forwards: int) -> None:
        self._block, self._oracle, self._max = block, oracle, max_forwards
        self._dead: set[frozenset[int]] = set()

    def run(self, filled: frozenset[int]) -> tuple[tuple[int, ...], ...] | None:
        """Return the steps from here to the end, or None."""
        if self._block.is_done(filled):
            return ()
        if filled in self._dead:
            return None
        if self._block.num_forwards >= self._max:
            raise _OutOfForwardsError
        slots = self._block.candidates(filled, self._oracle)
        for size in range(len(slots), 0, -1):
            rest = self.run(filled | set(slots[:size]))
            if rest is not None:
                return (tuple(slots[:size]), *rest)
        self._dead.add(filled)
        return None


def _members(slots: frozenset[int], length: int) -> NDArray[np.bool_]:
    members = np.zeros(length, bool)
    members[list(slots)] = True
    return members

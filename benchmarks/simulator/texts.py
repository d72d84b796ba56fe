"""Texts whose drafts are accepted as published measurements say.

A text is a row of stretches, easy and hard ones in turn. Within a stretch each draft is accepted
with one probability. So acceptance persists, as it does in the published rounds: after a long cycle
the next one is mostly long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Profile:
    """Says how drafts of a kind of text are accepted.

    Attributes:
        easy: Probability of acceptance in an easy stretch.
        hard: Probability of acceptance in a hard stretch.
        share: Share of the tokens that lie in easy stretches.
        stretch: Tokens of an easy stretch, on average.
    """

    easy: float
    hard: float
    share: float
    stretch: float = 100.0

    def accepted_from(self, rng: np.random.Generator, length: int) -> list[int]:
        """Drafts that would be accepted in a row from each position of a text on, ``(length,)``."""
        is_easy = self._stretches(rng, length)
        accepts = rng.random(length) < np.where(is_easy, self.easy, self.hard)
        rejections = np.append(np.flatnonzero(~accepts), length)
        positions = np.arange(length)
        return (rejections[np.searchsorted(rejections, positions)] - positions).tolist()

    def _stretches(self, rng: np.random.Generator, length: int) -> np.ndarray:
        state = rng.random() < self.share
        leave = {True: 1 / self.stretch, False: self.share / (1 - self.share) / self.stretch}
        states: list[bool] = []
        while len(states) < length:
            states += [state] * int(rng.geometric(min(leave[state], 1.0)))
            state = not state
        return np.array(states[:length])


def mean_cycle(profile: Profile, block_length: int, num_tokens: int = 200_000) -> float:
    """Tokens a cycle of a block length in one long text of a profile."""
    accepted = profile.accepted_from(np.random.default_rng(1), num_tokens)
    position = cycles = 0
    while position < num_tokens:
        position += min(accepted[position], block_length - 1) + 1
        cycles += 1
    return position / cycles


REASONING = Profile(0.9967, 0.50, 0.92, 60)
"""Mathematics and code: 3.67, 6.36, 10.22 and 15.50 tokens a cycle at 4, 8, 16 and 32 (published,
181,257 rounds of the 8B model).
"""
SPEED_BENCH = Profile(0.9612, 0.50, 0.7756, 60)
"""Mixed questions: 6.72 tokens a cycle at block length 32, 6.88 at 64 (published, 8B)."""
HARD = Profile(0.75, 0.30, 0.40, 60)
"""An assumption: texts whose drafts are seldom right."""
PROFILES = {"reasoning": REASONING, "speed-bench": SPEED_BENCH, "hard": HARD}

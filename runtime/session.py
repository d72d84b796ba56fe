"""What decoding needs from an inference engine: forwards of the three graphs over one K/V cache."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trimode.graphs.contract import Role

Ids = NDArray[np.int64]
Array = NDArray[np.generic]

SMALLEST_BUCKET = 256


class KVCache(Protocol):
    """Keys and values of one sequence in slots of fixed capacity. What is valid is known by whoever holds the length, not here."""

    @property
    def capacity(self) -> int:
        """Slots."""
        ...

    def reserve(self, length: int) -> None:
        """Grow to the next bucket that holds ``length`` slots, keeping the contents. Never shrinks."""
        ...


class Session(Protocol):
    """The three graphs of a bundle, loaded once, with weights shared."""

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence."""
        ...

    def run(self, role: Role, cache: KVCache, input_ids: Ids, past_length: int, drafter_scale: float = 0.0) -> tuple[Array, ...]:
        """One forward; writes K/V of ``input_ids (1, T)`` into slots ``past_length ..`` of the cache, growing it where needed.

        Returns the outputs of the role's contract as views that the next run of the same role and T on this cache overwrites.
        """
        ...


def bucket(length: int) -> int:
    """Smallest capacity of the series 256, 512, 1024, ... that holds ``length`` slots."""
    capacity = SMALLEST_BUCKET
    while capacity < length:
        capacity *= 2
    return capacity

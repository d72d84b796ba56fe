"""Groups rows by capacity: texts of like length share a cache.

So short texts do not pay for long ones. Attention costs by the slots that a cache has, whether they
are used or not. A row begins in the smallest capacity that holds its next forward, and moves up by
one copy of what is valid.
"""

from __future__ import annotations

from collections.abc import Iterator

from trimode.runtime.engine.row import CacheGroup, EngineRow
from trimode.runtime.sessions.base import BatchCache, BatchSession


class CacheGroups:
    """Holds the groups of an engine, made as they are needed.

    Args:
        session: Loaded graphs.
        max_rows: Most texts at a time, in all groups together.

    Attributes:
        num_copied: Slots that were copied within the caches.
    """

    def __init__(self, session: BatchSession, max_rows: int) -> None:
        self._session, self._max_rows = session, max_rows
        self._groups: dict[int, CacheGroup] = {}
        self.num_copied = 0

    def __iter__(self) -> Iterator[CacheGroup]:
        yield from self._groups.values()

    @property
    def rows(self) -> list[EngineRow]:
        """Rows that lie in a group."""
        return [row for group in self for row in group.texts]

    def place(self, row: EngineRow) -> None:
        """Let a row lie where its forward has room.

        What is valid goes along. A failure leaves the row where it was.
        """
        if row.group is not None and row.end <= row.group.capacity:
            return
        group = self._with_room(row.end)
        place, old = group.rows.index(None), row.group
        if old is not None:
            group.cache.copy_from(old.cache, row.place, place, row.valid_length)
            self.num_copied += row.valid_length
            old.free(row)
        group.take(row, place)

    def compact(self) -> None:
        """Let rows be neighbours in each group."""
        for group in self:
            self.num_copied += group.compact()

    def close(self) -> None:
        """Give the caches back."""
        self._groups.clear()

    def _with_room(self, length: int) -> CacheGroup:
        """Find the group of least capacity for ``length``, with a free place.

        It is made, or grows, where that is needed.
        """
        capacity = self._session.capacity_for(length)
        if capacity not in self._groups:
            self._groups[capacity] = self._new_group(length, 1)
        group = self._groups[capacity]
        if None not in group.rows:
            self._grow(group, length)
        return group

    def _new_group(self, length: int, num_rows: int) -> CacheGroup:
        return CacheGroup(self._new_cache(length, num_rows), num_rows)

    def _new_cache(self, length: int, num_rows: int) -> BatchCache:
        cache = self._session.new_batch_cache(num_rows)
        cache.reserve(length)
        return cache

    def _grow(self, group: CacheGroup, length: int) -> None:
        """Double the places of a group.

        Memory for all rows at the longest capacity may be much more than is ever used.
        """
        num_rows = min(2 * len(group.rows), self._max_rows)
        assert num_rows > len(group.rows), "more rows than the engine has"
        cache = self._new_cache(length, num_rows)
        for place, row in enumerate(group.rows):
            if row is not None and row.valid_length:
                cache.copy_from(group.cache, place, place, row.valid_length)
                self.num_copied += row.valid_length
        group.cache = cache
        group.rows += [None] * (num_rows - len(group.rows))

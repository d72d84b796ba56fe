"""Finds K/V that were computed before, and keeps them for later.

What a text needs may lie in a row that is at work, or in host memory, where texts that have ended
leave theirs. K/V of this family are causal in every mode, so a prefix serves all modes. Kept is
what causal graphs wrote for committed tokens, never what a draft wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimode.runtime.engine.prefix_cache import Match, PrefixCache, common_prefix
from trimode.runtime.engine.request import Request
from trimode.runtime.engine.row import EngineRow
from trimode.runtime.sessions.base import Array

WORTH_WAITING = 32
"""Tokens that another row is about to read, from which on it is better to wait for them."""

logger = logging.getLogger("trimode.runtime")


@dataclass(frozen=True)
class KVSegment:
    """K/V of a run of tokens, in host memory.

    Attributes:
        arrays: Arrays as ``BatchCache.export_prefix`` returns them, each
            ``(heads, tokens, head size)``.
    """

    arrays: tuple[Array, ...]

    def split(self, length: int) -> tuple[KVSegment, KVSegment]:
        """Copy both parts, so that either can be forgotten alone."""
        first = tuple(np.ascontiguousarray(one[:, :length]) for one in self.arrays)
        rest = tuple(np.ascontiguousarray(one[:, length:]) for one in self.arrays)
        return KVSegment(first), KVSegment(rest)

    def first(self, length: int) -> tuple[Array, ...]:
        """Return the first tokens' part, as views."""
        return tuple(one[:, :length] for one in self.arrays)


@dataclass(frozen=True)
class Hit:
    """Tells where the beginning of a prompt was computed.

    Attributes:
        length: Tokens that need not be computed; fewer than the prompt has.
        row: Row that has them; None where they are in host memory, or nowhere.
        match: Segments in host memory.
    """

    length: int
    row: EngineRow | None
    match: Match[KVSegment]


NOWHERE: Match[KVSegment] = Match(0, ())


class PrefixReuse:
    """Finds and keeps prefixes.

    Args:
        max_bytes: Most bytes of host memory; 0 = nothing is kept beyond the rows at work.

    Attributes:
        num_bytes: Bytes that are kept.
        num_hits: Requests that had something computed before.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: PrefixCache[KVSegment] = PrefixCache(0)
        self._bytes_per_token = 0
        self.num_hits = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return self._kept.num_tokens * self._bytes_per_token

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return self._kept.num_tokens

    @property
    def num_evicted(self) -> int:
        """Tokens that made room for others."""
        return self._kept.num_evicted

    def find(self, request: Request, rows: Sequence[EngineRow]) -> Hit:
        """Find the longest beginning of a prompt that is computed.

        The last token never counts as computed.
        """
        most = len(request.ids) - 1
        kept = self._kept.match(request.namespace, request.ids[:most])
        length, row = max(
            ((_shared(row, request, row.stored_length), row) for row in rows),
            key=lambda found: found[0],
            default=(0, None),
        )
        if row is not None and min(length, most) >= kept.length:
            return Hit(min(length, most), row, NOWHERE)
        return Hit(kept.length, None, kept)

    def is_on_its_way(self, request: Request, rows: Sequence[EngineRow]) -> bool:
        """Whether a row will soon read much of the prompt's beginning."""
        coming = max((_shared(row, request) for row in rows if row.is_reading), default=0)
        coming = min(coming, len(request.ids) - 1)
        if coming < WORTH_WAITING:
            return False
        return coming - self.find(request, rows).length >= WORTH_WAITING

    def bring(self, hit: Hit, row: EngineRow) -> None:
        """Copy what was found into a row that has its place."""
        group, donor, start = row.group, hit.row, 0
        assert group is not None
        if not hit.length:
            return
        if donor is not None:
            assert donor.group is not None
            if donor.group is group:
                group.cache.copy_prefix(donor.place, row.place, hit.length)
            else:
                group.cache.copy_from(donor.group.cache, donor.place, row.place, hit.length)
        for segment, length in hit.match.pieces:
            group.cache.import_prefix(row.place, start, segment.first(length))
            start += length
        self.num_hits += 1

    def keep(self, row: EngineRow) -> None:
        """Keep what a row that ends has computed.

        A failure loses it, and nothing else.
        """
        group, length = row.group, row.stored_length
        if group is None or not length or not self._max_bytes or not row.request.is_kept:
            return
        cache, tokens = group.cache, row.sequence.tokens[:length]
        self._measure(cache.bytes_per_token)
        try:
            self._kept.insert(
                row.request.namespace,
                tokens,
                row.request.ends,
                lambda start, stop: KVSegment(
                    tuple(cache.export_prefix(row.place, start, stop - start))
                ),
            )
        except Exception:
            logger.exception("a computed prefix could not be kept")

    def _measure(self, bytes_per_token: int) -> None:
        """Learn from the first cache how many tokens the budget holds."""
        if not self._bytes_per_token:
            self._bytes_per_token = bytes_per_token
            self._kept.max_tokens = self._max_bytes // bytes_per_token


def _shared(row: EngineRow, request: Request, length: int | None = None) -> int:
    """Count the first tokens that a row and a prompt share.

    Of the row, its first ``length`` tokens count; None = its prompt.
    """
    if row.request.namespace != request.namespace:
        return 0
    tokens = row.request.ids if length is None else row.sequence.tokens[:length]
    return common_prefix(tokens, request.ids[: len(tokens)])

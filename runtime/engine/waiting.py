"""Orders the requests that wait for a row.

They come by priority, then fair by key where asked, then by arrival.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterator

from trimode.runtime.engine.handle import Handle
from trimode.runtime.engine.request import Request

_FEW = 64
"""Ended requests that may stay in a heap of deadlines."""


class WaitingQueue:
    """Orders requests.

    Args:
        is_fair: Whether requests of one priority take turns by their keys; else they come as they
            arrived.
    """

    def __init__(self, *, is_fair: bool = False) -> None:
        self._is_fair = is_fair
        self._levels: dict[int, dict[Hashable, deque[Request]]] = {}
        self._where: dict[Handle, Request] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._where)

    def push(self, request: Request) -> None:
        """Let a request wait."""
        self._count += 1
        request.number = self._count
        level = self._levels.setdefault(request.priority, {})
        level.setdefault(self._key(request), deque()).append(request)
        self._where[request.handle] = request

    def pop(self, may_begin: Callable[[Request], bool]) -> Request | None:
        """Take the first request that may begin; None where there is none."""
        found = next(filter(may_begin, self), None)
        if found is not None:
            self._remove(found)
            level, key = self._levels.get(found.priority, {}), self._key(found)
            if key in level:  # whose turn it was comes last now
                level[key] = level.pop(key)
        return found

    def discard(self, handle: Handle) -> bool:
        """Take a request out, if it waits."""
        request = self._where.get(handle)
        if request is not None:
            self._remove(request)
        return request is not None

    def __iter__(self) -> Iterator[Request]:
        """Yield the requests in the order in which they would be taken."""
        for priority in sorted(self._levels, reverse=True):
            keys = list(self._levels[priority].values())
            for turn in range(max(map(len, keys), default=0)):
                for requests in keys:
                    if turn < len(requests):
                        yield requests[turn]

    def _key(self, request: Request) -> Hashable:
        return request.fair_key if self._is_fair else None

    def _remove(self, request: Request) -> None:
        level, key = self._levels[request.priority], self._key(request)
        level[key].remove(request)
        del self._where[request.handle]
        if not level[key]:
            del level[key]
        if not level:
            del self._levels[request.priority]


class Deadlines:
    """Knows whose time runs out first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Handle]] = []
        self._count = self._num_live = 0

    def add(self, deadline: float, handle: Handle) -> None:
        """Watch a request."""
        self._count += 1
        heapq.heappush(self._heap, (deadline, self._count, handle))
        if len(self._heap) > 2 * self._num_live + _FEW:
            self._heap = [entry for entry in self._heap if not entry[2].done]
            heapq.heapify(self._heap)
            self._num_live = len(self._heap)

    @property
    def next(self) -> float | None:
        """The first deadline of a request that has not ended."""
        while self._heap and self._heap[0][2].done:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def passed(self, now: float) -> Iterator[Handle]:
        """Take the requests whose time has run out."""
        while (first := self.next) is not None and first <= now:
            yield heapq.heappop(self._heap)[2]

"""Holds the texts at work in an engine.

Each has its sequence and stream, and knows where its K/V lie.
"""

from __future__ import annotations

import time
from typing import Any

from trimode.errors import UsageError
from trimode.formats.contract import GraphName
from trimode.runtime.decode.forward import Forward, Outputs
from trimode.runtime.decode.sequence import Sequence
from trimode.runtime.decode.stream import Chunk, Stream
from trimode.runtime.engine.load.rows import RowPolicy
from trimode.runtime.engine.neighbours import make_neighbours
from trimode.runtime.engine.request import Request
from trimode.runtime.sessions.base import BatchCache, Ids, KVCache, SessionView

CAUSAL: tuple[GraphName, ...] = ("ar", "verify")
"""Graphs whose K/V are worth keeping. ``commit`` runs the first."""


class EngineSession(SessionView):
    """Shows the session to a sequence of an engine.

    Its forwards are run by the engine alone.
    """

    def new_cache(self) -> KVCache:
        """Return a cache without slots: the engine has its own."""
        return _NoCache()

    def run(
        self,
        graph_name: GraphName,  # noqa: ARG002
        cache: KVCache,  # noqa: ARG002
        input_ids: Ids,  # noqa: ARG002
        past_length: int,  # noqa: ARG002
        drafter_scale: float = 0.0,  # noqa: ARG002
    ) -> tuple[Any, ...]:
        raise UsageError(
            "expected the engine to run this forward, found somebody else", "submit it"
        )


class _NoCache:
    capacity = 0

    def reserve(self, length: int) -> None:
        """Nothing to reserve."""


class EngineRow:
    """Holds a text at work.

    Attributes:
        request: Request of the text.
        sequence: Its tokens.
        stream: Stream of what it commits.
        policy: Policy that follows the plan of all rows; None where it keeps its own way.
        group: Rows with as many slots, of which it is one; None before its first forward.
        place: Its number in the group.
        forward: Forward that it waits for; None after a commit.
        num_read: Tokens of that forward that have run: a prompt is read in parts.
        since: Step of its group in which it asked for the forward.
        held_ms: Milliseconds that the forward waits for other rows' forwards, as predicted.
        attempts: Times that the forward has failed.
        causal_length: First slots that hold what causal graphs wrote.
        is_broken: Whether it has failed, so that nothing of it is kept.
    """

    def __init__(
        self,
        request: Request,
        sequence: Sequence,
        stream: Stream,
        policy: RowPolicy | None = None,
    ) -> None:
        self.request, self.handle = request, request.handle
        self.sequence, self.stream, self.policy = sequence, stream, policy
        self.group: CacheGroup | None = None
        self.place = -1
        self.forward: Forward | None = None
        self.num_read = self.since = self.attempts = self.causal_length = 0
        self.held_ms, self.is_broken = 0.0, False
        self._begun = time.perf_counter()

    @property
    def valid_length(self) -> int:
        """Slots that a copy must keep."""
        if self.num_read and self.forward is not None:
            return self.forward.past_length + self.num_read
        return self.sequence.cached_length

    @property
    def stored_length(self) -> int:
        """Tokens whose K/V others may have."""
        if self.num_read and self.forward is not None:
            return self.forward.past_length + self.num_read
        return min(self.causal_length, self.sequence.cached_length)

    @property
    def is_ready(self) -> bool:
        """Whether it waits for a forward, and has room for it."""
        return (
            self.forward is not None
            and self.group is not None
            and self.end <= self.group.capacity
            and not self.handle.done
        )

    @property
    def is_reading(self) -> bool:
        """Whether its forward reads a prompt with more than one token left."""
        forward = self.forward
        return (
            forward is not None
            and forward.graph_name == "ar"
            and len(forward.token_ids) - self.num_read > 1
            and forward.past_length + len(forward.token_ids) <= len(self.sequence.tokens)
        )

    @property
    def num_left(self) -> int:
        """Tokens of its forward that have not run."""
        assert self.forward is not None
        return len(self.forward.token_ids) - self.num_read

    @property
    def end(self) -> int:
        """Slots that its forward needs."""
        assert self.forward is not None
        return self.forward.end

    def part(self, most_tokens: int) -> Forward:
        """Return the next part of its forward, of at most ``most_tokens``."""
        forward = self.forward
        assert forward is not None
        if not self.num_read and len(forward.token_ids) <= most_tokens:
            return forward
        ids = forward.token_ids[self.num_read : self.num_read + most_tokens]
        return Forward(forward.graph_name, ids, forward.past_length + self.num_read)

    def read(self, num_tokens: int) -> bool:
        """Take note that a part has run; return whether it was last."""
        assert self.forward is not None
        self.attempts = 0
        if num_tokens < self.num_left:
            self.num_read += num_tokens
            self.sequence.forwards.prefill += 1
            return False
        return True

    def advance(self, outputs: Outputs | None = None) -> Chunk | None:
        """Let the algorithm go on until it commits or needs a forward.

        Returns:
            Chunk that it has committed; None where it waits for a forward.
        """
        answered = self.forward
        self.forward, self.num_read, self.held_ms = None, 0, 0.0
        step = self.stream.advance(outputs)
        if outputs is not None and answered is not None and answered.graph_name in CAUSAL:
            self.causal_length = self.sequence.cached_length
        if isinstance(step, Forward):
            self.forward, self.since = step, self.group.num_steps if self.group else 0
            return None
        return step or Chunk([], self.stream.finish_reason)

    def spend(self) -> None:
        """Count its time in the engine as its own."""
        self.stream.spend(time.perf_counter() - self._begun)


class CacheGroup:
    """Holds rows of one capacity, over one cache.

    Attributes:
        cache: K/V of the rows.
        rows: Row at each place; None = free.
        spent: Seconds that a row of it has had on average, for taking turns with other groups.
        num_steps: Steps that its rows have run.
    """

    def __init__(self, cache: BatchCache, num_rows: int) -> None:
        self.cache = cache
        self.rows: list[EngineRow | None] = [None] * num_rows
        self.spent, self.num_steps = 0.0, 0
        self._has_gaps = False

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.cache.capacity

    @property
    def texts(self) -> list[EngineRow]:
        """Rows that are taken."""
        return [row for row in self.rows if row is not None]

    def at(self, place: int) -> EngineRow:
        """Return the row at a place that is taken."""
        row = self.rows[place]
        assert row is not None
        return row

    def valid_length(self, place: int) -> int:
        """Return the number of valid slots at a place that is taken."""
        return self.at(place).valid_length

    def take(self, row: EngineRow, place: int) -> None:
        """Give a free place to a row."""
        assert self.rows[place] is None
        self.rows[place], row.group, row.place = row, self, place
        row.since = self.num_steps

    def free(self, row: EngineRow) -> None:
        """Take a row out of its place; nothing else does."""
        assert self.rows[row.place] is row
        self.rows[row.place], row.group = None, None
        self._has_gaps = True

    def compact(self) -> int:
        """Move rows from the end into free places.

        So the rows in use are neighbours.

        Returns:
            Slots that were copied.
        """
        if not self._has_gaps:
            return 0
        copied = 0

        def move(row: EngineRow, place: int, free: int) -> None:
            nonlocal copied
            if row.valid_length:
                self.cache.move(place, free, row.valid_length)
            row.place, copied = free, copied + row.valid_length

        make_neighbours(self.rows, move)
        self._has_gaps = False
        return copied

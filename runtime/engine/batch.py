"""Runs several texts side by side, with their forwards together.

Each text is as if it were alone.

A row of a batch is a :class:`~trimode.runtime.decode.sequence.Sequence` in any mode, which may
begin and end at any time. Its algorithm runs until it needs a forward
(:mod:`trimode.runtime.decode.forward`), and waits. A step chooses a kind of forward
(:mod:`trimode.runtime.engine.grouping`), runs it once for the rows that wait for it, and lets these
go on. The keys and values of all rows are in one buffer, each row's in its own part; a row that has
not asked for a forward may lie between two that have, and is then given padding, which ends up
behind its length, where its own next forward overwrites it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from trimode.errors import UsageError
from trimode.formats.contract import GraphName, Mode, ModelInfo, slots_written
from trimode.runtime.decode.arguments import checks_arguments
from trimode.runtime.decode.forward import Forward, Outputs
from trimode.runtime.decode.options import KINDS, MODE
from trimode.runtime.decode.sequence import Sequence
from trimode.runtime.decode.stream import Chunk, Generation, Stream
from trimode.runtime.engine.grouping import JointForward, Waiting, choose_group, join_forwards
from trimode.runtime.engine.joint_forward import has_room, keep, run_joint
from trimode.runtime.engine.neighbours import make_neighbours
from trimode.runtime.sessions.base import (
    BatchCache,
    BatchSession,
    Ids,
    KVCache,
    SessionView,
    check_open,
    of_row,
)

OpenStream = Callable[..., Stream]
"""A stream over a sequence: ``(sequence, mode, **options)``, as
:meth:`trimode.runtime.model.TriModeModel.continue_sequence`.
"""


class BatchRequest(NamedTuple):
    """Describes a text to begin.

    Attributes:
        ids: Prompt, ``(n,)``.
        mode: Mode of the text.
        options: Options, as for :meth:`Batch.add`.
    """

    ids: Any
    mode: Mode
    options: dict[str, Any]


class BatchRow:
    """Holds a text in a batch, from :meth:`Batch.add` to :meth:`Batch.finish`.

    Attributes:
        sequence: Its tokens. While the row is not at work it may be truncated, appended to, and go
            on with :meth:`Batch.resume`.
        stream: Stream of what it is doing, or did last; the batch iterates it.
    """

    def __init__(self, session: RowSession, sequence: Sequence, stream: Stream) -> None:
        self.session, self.sequence, self.stream = session, sequence, stream
        self.waiting: Waiting | None = None
        self.is_at_work = True

    @property
    def result(self) -> Generation:
        """Generation of the stream so far.

        Without a ``finish_reason`` where the text has not ended.

        Its ``elapsed_s`` is the time of the steps that the row was at work in, for whomever they
        were.
        """
        return self.stream.so_far


class RowSession(SessionView):
    """Shows one row of a batch as a :class:`~trimode.runtime.sessions.base.Session`.

    So its text is a sequence like any other.

    Attributes:
        row: Place of the text at the moment; None once it has left.
    """

    def __init__(self, session: BatchSession, cache: BatchCache, row: int) -> None:
        super().__init__(session)
        self._batch, self._cache = session, cache
        self.row: int | None = row

    def new_cache(self) -> KVCache:
        """Return the batch's cache, of which this row has one part."""
        return self._cache

    def run(
        self,
        graph_name: GraphName,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Any, ...]:
        """Run a forward of this row alone."""
        if self.row is None:
            raise UsageError(
                "expected a row that is in its batch, found one that has left",
                "add its tokens to the batch again",
            )
        num_tokens = input_ids.shape[1]
        cache.reserve(past_length + slots_written(graph_name, num_tokens))
        rows = range(self.row, self.row + 1)
        return keep(
            graph_name,
            self._batch.run_rows(
                graph_name,
                cache,
                rows,
                input_ids,
                np.array([past_length]),
                np.array([num_tokens]),
                drafter_scale,
            ),
        )


class Batch:
    """Texts that run side by side.

    Rows join, go on and leave at any time between two steps. For one thread.

    Args:
        session: Loaded graphs.
        model: Facts about the model, from the contract.
        open_stream: Function that checks a mode and its options, and opens a stream.
        check_prompt: Function that gives token ids ``(n,)`` as a list; it raises
            :class:`UsageError` where they are none.
        max_rows: Most texts at a time.
    """

    def __init__(
        self,
        session: BatchSession,
        model: ModelInfo,
        open_stream: OpenStream,
        check_prompt: Callable[[Any], list[int]],
        max_rows: int,
    ) -> None:
        self._session, self._model, self._open_stream, self._check_prompt = (
            session,
            model,
            open_stream,
            check_prompt,
        )
        self._cache = session.new_batch_cache(max_rows)
        self._rows: list[BatchRow | None] = [None] * max_rows
        self._chunks: list[tuple[BatchRow, Chunk]] = []
        self._now = 0

    @property
    def rows(self) -> list[BatchRow]:
        """Rows that have joined and not left."""
        return [row for row in self._rows if row is not None]

    @property
    def num_free(self) -> int:
        """Number of texts that may still join."""
        return self._rows.count(None)

    @property
    def is_at_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._chunks) or any(row.is_at_work for row in self.rows)

    @checks_arguments(MODE, options=KINDS)
    def add(self, ids: Any, mode: Mode = "linear_spec", **options: Any) -> BatchRow:
        """Begin a text in a free row.

        The next step reads its prompt.

        Args:
            ids: Prompt, array-like ``(n,)``.
            mode: Mode in which it goes on.
            options: Options, as for :meth:`~trimode.runtime.model.TriModeModel.stream`.

        Raises:
            UsageError: no row is free, or a value is out of its range.
        """
        check_open(self._session)
        if None not in self._rows:
            raise UsageError(
                f"expected a free row, found all {len(self._rows)} taken",
                "let one leave, or make a batch of more rows",
            )
        session = RowSession(self._session, self._cache, self._rows.index(None))
        sequence = Sequence(session, self._model, self._check_prompt(ids))
        row = BatchRow(session, sequence, self._open_stream(sequence, mode, **options))
        self._rows[self._index(row)] = row
        return row

    @checks_arguments(MODE, options=KINDS)
    def resume(self, row: BatchRow, mode: Mode, **options: Any) -> None:
        """Go on from where the row's sequence stands, in any mode.

        What is cached is not read again. What it was doing is given up.

        Raises:
            UsageError: the row has left, or a value is out of its range.
        """
        self._index(row)
        row.stream = self._open_stream(row.sequence, mode, **options)
        row.waiting, row.is_at_work = None, True

    def pause(self, row: BatchRow) -> None:
        """Give up what the row is doing.

        Its sequence stays as it is.
        """
        self._index(row)
        row.waiting, row.is_at_work = None, False

    def finish(self, row: BatchRow) -> None:
        """Free a row, at work or not.

        Its result stays. Its sequence runs no more.
        """
        self.pause(row)
        self._rows[self._index(row)] = None
        row.session.row = None

    def step(self) -> list[tuple[BatchRow, Chunk]]:
        """Run one kind of forward for all rows that wait for it.

        Returns:
            Chunks committed since the last step. A row's last chunk has a ``finish_reason``, and
                no tokens where there was no room for any.

        Raises:
            UsageError: a text is longer than the cache of the target holds; its row is no longer at
                work, and the others go on with the next step.
        """
        check_open(self._session)
        start = time.perf_counter()
        working = [row for row in self.rows if row.is_at_work]
        try:
            self._step(working)
        finally:
            elapsed = time.perf_counter() - start
            for row in working:
                row.stream.spend(elapsed)
        chunks, self._chunks = self._chunks, []
        return chunks

    def __iter__(self) -> Iterator[tuple[BatchRow, Chunk]]:
        """Yield chunks, step by step, until no row is at work.

        Rows may join and leave meanwhile.
        """
        while self.is_at_work:
            yield from self.step()

    def answer_all(self, requests: Iterable[BatchRequest]) -> Iterator[tuple[int, BatchRow, Chunk]]:
        """Answer texts one after the other, in the rows that are free.

        As many run at a time as there are free rows. Each leaves when it is finished.

        Yields:
            The number of the request, its row and a chunk, as they come.
        """
        numbers: dict[BatchRow, int] = {}
        todo = enumerate(requests)
        while True:
            while self.num_free and (following := next(todo, None)):
                number, request = following
                numbers[self.add(request.ids, request.mode, **request.options)] = number
            if not numbers:
                return
            for row, chunk in self.step():
                if row in numbers:
                    yield numbers[row], row, chunk
                    if not row.is_at_work:
                        self.finish(row)
                        del numbers[row]

    def _step(self, working: list[BatchRow]) -> None:
        make_neighbours(self._rows, self._move)
        for row in working:
            if row.waiting is None:
                self._advance(row)
        waiting = [row.waiting for row in working if row.waiting is not None]
        if waiting:
            group = choose_group(waiting, self._now)
            fits = partial(has_room, self._cache, self._model, group[0].forward.graph_name)
            self._now += 1
            for joint in join_forwards(group, self._length, fits, self._session.free_tokens):
                self._run(joint)

    def _advance(self, row: BatchRow, outputs: Outputs | None = None) -> None:
        """Let a row go on until it commits or needs a forward."""
        row.waiting, is_going_on = None, False
        try:
            step = row.stream.advance(outputs)
            if isinstance(step, Forward):
                self._cache.reserve(step.end)
                row.waiting, is_going_on = Waiting(self._index(row), step, self._now), True
                return
            chunk = step or Chunk([], row.stream.finish_reason)
            is_going_on = chunk.finish_reason is None
            self._chunks.append((row, chunk))
        finally:
            row.is_at_work = is_going_on

    def _run(self, joint: JointForward) -> None:
        """Run a forward, and let its members go on with the outputs."""
        outputs = run_joint(self._session, self._cache, joint, self._length)
        for member in joint.members:
            row, place = self._rows[member.row], joint.rows.index(member.row)
            assert row is not None
            self._advance(row, tuple(of_row(output, place) for output in outputs))

    def _length(self, row: int) -> int:
        """Return the number of cached tokens of a row.

        The row is in use, since rows in use are neighbours.
        """
        text = self._rows[row]
        assert text is not None
        return text.sequence.cached_length

    def _move(self, row: BatchRow, place: int, free: int) -> None:
        """Let a row lie elsewhere."""
        self._cache.move(place, free, row.sequence.cached_length)
        row.session.row = free
        if row.waiting is not None:
            row.waiting = Waiting(free, row.waiting.forward, row.waiting.since)

    def _index(self, row: BatchRow) -> int:
        """Return where a row lies; :class:`UsageError` once it has left."""
        if row.session.row is None:
            raise UsageError(
                "expected a row that is in the batch, found one that has left",
                "add its tokens to the batch again",
            )
        return row.session.row

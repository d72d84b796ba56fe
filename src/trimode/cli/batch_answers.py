"""Answers several prompts side by side, in their order.

One that fails does not stop the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from trimode.errors import UsageError
from trimode.formats.contract import Mode
from trimode.runtime.decode.stream import Chunk, Generation
from trimode.runtime.engine.batch import Batch, BatchRow
from trimode.runtime.text.stream import TextStream

if TYPE_CHECKING:
    from trimode.cli.trace_output import TraceFile
    from trimode.runtime.measure.trace import RunTrace


class BatchQuestion(NamedTuple):
    """Holds a prompt's token ids, and whether text is wanted."""

    token_ids: list[int]
    wants_text: bool


class BatchAnswer(NamedTuple):
    """Holds a result, and its text if it was asked for."""

    result: Generation
    text: str | None


@dataclass
class _Text:
    """Collects an answer as it is written."""

    number: int
    stream: TextStream | None
    run: RunTrace | None
    pieces: list[str] = field(default_factory=list)

    def push(self, token_ids: list[int]) -> None:
        if self.stream is not None:
            self.pieces.append(self.stream.push(token_ids))

    def end(self, result: Generation, error: UsageError | None = None) -> None:
        if self.run is not None:
            self.run.end(result, error)

    def whole(self) -> str | None:
        return None if self.stream is None else "".join([*self.pieces, self.stream.finish()])


def answer_side_by_side(
    batch: Batch,
    questions: Sequence[BatchQuestion],
    mode: Mode,
    options: dict[str, Any],
    trace: TraceFile | None = None,
) -> Iterator[BatchAnswer | UsageError]:
    """Yield the answers in the questions' order, as soon as possible.

    A text that the target cannot go on with comes out as its error, and the others go on.

    Raises:
        UsageError: an option is out of its range.
    """
    finished: dict[int, BatchAnswer | UsageError] = {}
    following = 0
    for number, outcome in _as_they_come(batch, questions, mode, options, trace):
        finished[number] = outcome
        while following in finished:
            yield finished.pop(following)
            following += 1


def _as_they_come(
    batch: Batch,
    questions: Sequence[BatchQuestion],
    mode: Mode,
    options: dict[str, Any],
    trace: TraceFile | None,
) -> Iterator[tuple[int, BatchAnswer | UsageError]]:
    todo = enumerate(questions)
    texts: dict[BatchRow, _Text] = {}
    while True:
        while batch.num_free and (one := next(todo, None)) is not None:
            number, question = one
            row = batch.add(question.token_ids, mode, **options)
            run = None if trace is None else trace.begin(row.stream, mode, question.token_ids)
            texts[row] = _Text(number, row.stream.new_text() if question.wants_text else None, run)
        if not texts:
            return
        yield from _step(batch, texts)


def _step(
    batch: Batch, texts: dict[BatchRow, _Text]
) -> Iterator[tuple[int, BatchAnswer | UsageError]]:
    """Go on by one step.

    A row that fails leaves the batch. What the others commit comes with the next step.
    """
    chunks, failure = _next_chunks(batch)
    for row, chunk in chunks:
        texts[row].push(chunk.token_ids)
        if chunk.finish_reason is not None:
            text = texts.pop(row)
            batch.finish(row)
            text.end(row.result)
            yield text.number, BatchAnswer(row.result, text.whole())
    if failure is not None:  # what is at work no more and has not finished
        for row in [row for row in texts if not row.is_at_work]:
            batch.finish(row)
            text = texts.pop(row)
            text.end(row.result, failure)
            yield text.number, failure


def _next_chunks(batch: Batch) -> tuple[list[tuple[BatchRow, Chunk]], UsageError | None]:
    """Return what the next step commits, and why rows failed."""
    failure: UsageError | None = None
    while True:
        num_working = sum(row.is_at_work for row in batch.rows)
        try:
            return batch.step(), failure
        except UsageError as error:
            if sum(row.is_at_work for row in batch.rows) == num_working:
                raise  # it concerns no row, and would come again
            failure = error

"""Does the work of an engine, step by step, in one thread.

A step is: plan, reserve, run, commit. What fails before the commit leaves every row at its last
committed token, with the forward that it waits for, so the next step runs it again. Other threads
do nothing here but :meth:`EngineCore.post`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from trimode.errors import DeviceError, EngineError, RequestTimeoutError
from trimode.formats.contract import ModelInfo
from trimode.formats.texts import reason_of
from trimode.runtime.decode.forward import Outputs
from trimode.runtime.decode.sequence import Sequence as Text
from trimode.runtime.decode.stream import Chunk, Stream
from trimode.runtime.engine.groups import CacheGroups
from trimode.runtime.engine.handle import Handle
from trimode.runtime.engine.modes import Modes
from trimode.runtime.engine.request import Request
from trimode.runtime.engine.reuse import PrefixReuse
from trimode.runtime.engine.row import EngineRow, EngineSession
from trimode.runtime.engine.settings import Settings
from trimode.runtime.engine.stats import Counts
from trimode.runtime.engine.steps import Outcome, Steps
from trimode.runtime.engine.turns import Turns, group_of
from trimode.runtime.engine.waiting import Deadlines, WaitingQueue
from trimode.runtime.sessions.base import BatchSession

MOST_ATTEMPTS = 3
"""Times that a forward may fail before its text is given up."""
MOST_FAILURES = 12
"""Steps that may fail one after the other before the engine is given up."""

OpenStream = Callable[[Text, Request], Stream]
logger = logging.getLogger("trimode.runtime")
Message = Request | Handle | None
"""Something to begin, something that was cancelled, or only a reason to look."""


class EngineCore:
    """Answers requests side by side.

    Args:
        session: Loaded graphs.
        model: Facts about the model.
        open_stream: Function that opens the stream of a request over a sequence.
        settings: Settings of the engine; None = the defaults.

    Attributes:
        error: Error for which it cannot go on; None while it can.
        rows: Texts at work.
        waiting: Requests without a row.
        groups: Caches of the rows.
        reuse: Store of what was computed before.
    """

    def __init__(
        self,
        session: BatchSession,
        model: ModelInfo,
        open_stream: OpenStream,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self._session, self._model, self._open_stream = session, model, open_stream
        self._view = EngineSession(session)
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._deadlines = Deadlines()
        self._turns = Turns(
            self.settings.latency_target_s, self.settings.prefill_share, self.settings.table
        )
        self.modes = Modes(self.settings.mode_policy, self.settings.make_row_policy)
        self._num_failures = 0
        self.counts = Counts()
        self._steps = Steps(session, model, self.counts, self._committed, self._failed)
        self._steps.clock, self._steps.observe = self.settings.clock, self.settings.observe
        self.error: EngineError | None = None
        self.rows: list[EngineRow] = []
        self.waiting = WaitingQueue(is_fair=self.settings.is_fair)
        self.groups = CacheGroups(session, self.settings.max_rows)
        self.reuse = PrefixReuse(self.settings.kv_bytes)

    def post(self, message: Message) -> None:
        """Tell the engine something, from any thread."""
        self._inbox.put(message)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do, as far as the engine knows."""
        return not self.rows and not self.waiting

    def wait(self) -> None:
        """Sleep until something is posted or a deadline passes."""
        deadline = self._deadlines.next
        left = None if deadline is None else max(0.0, deadline - self.settings.clock())
        try:
            self._take(self._inbox.get(timeout=left))
        except Empty:
            return

    @property
    def has_mail(self) -> bool:
        """Whether something was posted that nobody has looked at."""
        return not self._inbox.empty()

    @property
    def num_detours(self) -> int:
        """Times that a forward waited for rows that were one forward behind."""
        return self._turns.detours.num_taken

    def take_in(self) -> None:
        """Look at what was posted."""
        while self.has_mail:
            self._take(self._inbox.get())

    def close(self) -> None:
        """Let go of all rows, and give the caches back."""
        self._let_go()
        self.groups.close()

    def turn(self) -> Outcome:
        """Take in what was posted, and run one step.

        What has ended is let go before the step.
        """
        self.take_in()
        self._expire()
        self._let_go()
        if self.error is not None:
            return Outcome.FATAL
        self._admit()
        return self._step()

    def give_up(self, error: Exception) -> None:
        """Take no more requests: the engine cannot go on."""
        text = f"expected an engine that runs, found one that has stopped: {reason_of(error)}"
        self.error = EngineError(text, "close it, and make a new one")
        self.error.__cause__ = error
        logger.error("the engine has stopped", exc_info=error)
        self.end_all(self.error)

    def end_all(self, error: EngineError) -> None:
        """End every request with an error."""
        for row in self.rows:
            row.handle.fail(error)
        for request in list(self.waiting):
            request.handle.fail(error)
            self.waiting.discard(request.handle)

    # --- requests come and go

    def _take(self, message: Message) -> None:
        if isinstance(message, Request):
            message.handle.add_closer(self.counts.ended)
            if self.error is not None:
                message.handle.fail(self.error)
                return
            self.waiting.push(message)
            if message.deadline is not None:
                self._deadlines.add(message.deadline, message.handle)
        elif message is not None:
            self.waiting.discard(message)

    def _expire(self) -> None:
        for handle in self._deadlines.passed(self.settings.clock()):
            text = f"expected a text within its time, found {len(handle.token_ids)} tokens of it"
            hint = "allow more time with timeout_s, or ask for fewer tokens"
            handle.fail(RequestTimeoutError(text, hint))
            self.waiting.discard(handle)

    def _let_go(self) -> None:
        """Free the rows of requests that have ended.

        They ended with their texts, or because somebody ended them. This is the only way out of the
        rows.
        """
        for row in [row for row in self.rows if row.handle.done]:
            if not row.is_broken:
                self.reuse.keep(row)
            group_of(row).free(row)
            self.rows.remove(row)

    def _admit(self) -> None:
        """Give free rows to requests that wait.

        A row is room for prompt and answer.
        """
        while self.waiting and len(self.rows) < self.settings.max_rows:
            request = self.waiting.pop(
                lambda request: not self.reuse.is_on_its_way(request, self.rows)
            )
            if request is None:
                return
            if not request.handle.done:
                self._begin(request)

    def _begin(self, request: Request) -> None:
        """Let a text begin behind what is computed of it.

        After a failure it waits again.
        """
        hit = self.reuse.find(request, self.rows)
        row = self._new_row(request, hit.length)
        chunks: list[Chunk] = []
        # What a grammar decides may come before the first forward, or be the whole text
        while (chunk := self._going_on(row)) is not None:
            chunks.append(chunk)
            if chunk.finish_reason is not None:
                break
        if row.forward is not None:
            try:
                self.groups.place(row)
                self.reuse.bring(hit, row)
            except Exception as error:
                self._not_begun(row, error)
                return
            self.rows.append(row)
            request.handle.begin(hit.length)
            self.counts.prompt_tokens += len(request.ids)
            self.counts.cached_tokens += hit.length
        for chunk in chunks:
            self._deliver(row, chunk)

    def _new_row(self, request: Request, cached_length: int) -> EngineRow:
        sequence = Text(self._view, self._model, request.ids)
        sequence.cached_length = cached_length
        sequence.policy = policy = self.modes.row_policy(request)
        row = EngineRow(request, sequence, self._open_stream(sequence, request), policy)
        row.causal_length = cached_length
        request.handle.logprobs = row.stream.logprobs
        return row

    def _not_begun(self, row: EngineRow, error: Exception) -> None:
        if row.group is not None:
            row.group.free(row)
        row.request.attempts += 1
        if row.request.attempts < MOST_ATTEMPTS:
            self.waiting.push(row.request)
        else:
            row.handle.fail(given_up(error))
        self._note_failure(error)

    # --- one step

    def _step(self) -> Outcome:
        self.modes.refresh(self.rows, 1000 * self.settings.clock(), len(self.waiting))
        for row in self.rows:
            if row.forward is None:
                self._advance(row)
        outcome = self._reserve()
        ready = [row for row in self.rows if row.is_ready]
        plan = self._turns.plan(ready) if outcome is Outcome.NOTHING else None
        if plan is None:
            return outcome
        outcome = self._steps.run(plan)
        if outcome is Outcome.COMMITTED:
            self._turns.record(plan, self._steps.seconds)
        return outcome

    def _reserve(self) -> Outcome:
        """Have room for every forward, and rows that are neighbours."""
        for row in self.rows:
            try:
                if row.forward is not None:
                    self.groups.place(row)
            except Exception as error:
                return self._failed([row], error)
        try:
            self.groups.compact()
        except Exception as error:
            return self._note_failure(error)
        return Outcome.NOTHING

    def _failed(self, members: Sequence[EngineRow], error: Exception) -> Outcome:
        """Count a failure of rows; nothing was committed.

        A row that has failed too often is given up.
        """
        for row in members:
            row.attempts += 1
            if row.attempts >= MOST_ATTEMPTS:
                row.is_broken = True
                row.handle.fail(given_up(error))
        return self._note_failure(error)

    def _note_failure(self, error: Exception) -> Outcome:
        self.counts.failed_steps += 1
        self._num_failures += 1
        logger.warning("a step has failed: %s", reason_of(error))
        is_closed = getattr(self._session, "is_closed", False)
        if isinstance(error, DeviceError) or is_closed or self._num_failures >= MOST_FAILURES:
            self.give_up(error)
            return Outcome.FATAL
        return Outcome.RETRYABLE

    def _advance(self, row: EngineRow, outputs: Outputs | None = None) -> bool:
        """Let a row go on; return whether it waits for a forward."""
        chunk = self._going_on(row, outputs)
        if chunk is not None:
            self._deliver(row, chunk)
        return row.forward is not None

    def _going_on(self, row: EngineRow, outputs: Outputs | None = None) -> Chunk | None:
        """Let a row go on to what it commits.

        The result is None where it waits, or has failed. Its errors are its own.
        """
        try:
            return row.advance(outputs)
        except Exception as error:
            row.is_broken = True
            row.handle.fail(error)
            return None

    def _deliver(self, row: EngineRow, chunk: Chunk) -> None:
        if row.handle.deliver(chunk.token_ids):
            self.counts.completion_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            row.spend()
            row.handle.finish(row.stream.result)

    def _committed(self, row: EngineRow, outputs: Outputs) -> None:
        self._num_failures = 0
        self._advance(row, outputs)


def given_up(error: Exception) -> EngineError:
    """Return the error of a text whose forward has failed too often."""
    found = f"expected a forward to run, found it failing {MOST_ATTEMPTS} times: {reason_of(error)}"
    given = EngineError(found, "submit it again, or see the log for the first failure")
    given.__cause__ = error
    return given

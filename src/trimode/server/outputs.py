"""Turns a text's tokens into what a client reads, in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trimode.runtime.decode.token_choice import TokenLogprob
from trimode.runtime.engine.handle import Handle
from trimode.runtime.text.stream import TextStream


@dataclass
class Delta:
    """Holds what became certain of an answer.

    Attributes:
        content: Text.
        reasoning_content: Text of the thinking before it.
        tool_calls: Calls, or parts of them, in OpenAI's form with ``index``.
    """

    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning_content or self.tool_calls)

    def add(self, other: Delta) -> None:
        """Append what came later."""
        self.content += other.content
        self.reasoning_content += other.reasoning_content
        self.tool_calls += other.tool_calls


class OutputProcessor(Protocol):
    """Declares a step from text to answer.

    It may move, hold back or drop text.
    """

    def push(self, delta: Delta) -> Delta:
        """Take what the step before gave; return what is certain."""
        ...

    def finish(self) -> Delta:
        """Return what was held back."""
        ...

    def finish_reason(self, reason: str) -> str:
        """Return the reason that a client is told, such as ``tool_calls``."""
        ...


@dataclass
class Update:
    """Holds news of one text.

    Attributes:
        index: Number of the choice.
        delta: Text that became certain.
        token_ids: Tokens that came.
        logprobs: Their log-probabilities, where they were asked for.
        finish_reason: Reason of the end; set on the last one.
    """

    index: int
    delta: Delta
    token_ids: list[int]
    logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: str | None = None


class ChoiceText:
    """Reads one text as it comes.

    Args:
        index: Number of the choice.
        handle: Handle of the text.
        text: Stream that turns its tokens into text.
        processors: Steps from text to answer.
    """

    def __init__(
        self,
        index: int,
        handle: Handle,
        text: TextStream,
        processors: Sequence[OutputProcessor] = (),
    ) -> None:
        self.index, self.handle = index, handle
        self._text, self._processors = text, processors
        self._num_pieces = self._num_tokens = 0
        self.is_finished = False

    def read(self) -> Update | None:
        """Take what has come since; None where nothing has.

        Raises:
            TrimodeError: the text has ended without a result.
        """
        if self.is_finished:
            return None
        is_done = self.handle.done  # asked first: all pieces are there then
        pieces = self.handle.pieces_from(self._num_pieces)
        if not pieces and not is_done:
            return None
        self._num_pieces += len(pieces)
        token_ids = [token for piece in pieces for token in piece]
        update = Update(self.index, self._push(token_ids), token_ids, self._logprobs(token_ids))
        self._num_tokens += len(token_ids)
        if is_done:
            self._finish(update)
        return update

    def _push(self, token_ids: list[int]) -> Delta:
        return self._through(Delta(self._text.push(token_ids)), self._processors)

    def _logprobs(self, token_ids: list[int]) -> Sequence[TokenLogprob] | None:
        if self.handle.logprobs is None:
            return None
        return list(self.handle.logprobs[self._num_tokens : self._num_tokens + len(token_ids)])

    def _finish(self, update: Update) -> None:
        reason = self.handle.result(0).finish_reason or "stop"
        delta = self._through(Delta(self._text.finish()), self._processors)
        update.delta.add(delta)
        for place, processor in enumerate(self._processors):
            rest = processor.finish()
            update.delta.add(self._through(rest, self._processors[place + 1 :]))
        for processor in self._processors:
            reason = processor.finish_reason(reason)
        self.is_finished, update.finish_reason = True, reason

    @staticmethod
    def _through(delta: Delta, processors: Sequence[OutputProcessor]) -> Delta:
        for processor in processors:
            delta = processor.push(delta)
        return delta

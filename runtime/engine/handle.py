"""Gives a caller a request's tokens as they come, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from trimode.errors import EngineError, RequestCancelledError, TrimodeError
from trimode.formats.texts import reason_of
from trimode.runtime.decode.stream import Generation
from trimode.runtime.decode.token_choice import TokenLogprob

logger = logging.getLogger("trimode.runtime")


@dataclass(frozen=True)
class Usage:
    """Counts the tokens of a request.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Tokens of the prompt that were not computed again; fewer than all.
        completion_tokens: Tokens that were delivered.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass
class Times:
    """Tells when things happened to a request, by ``time.perf_counter``, in seconds.

    Attributes:
        submitted: Time of its submission.
        begun: Time at which it got a row; None while it waits.
        first_token: Time at which its first tokens were delivered; None before.
        ended: Time at which it ended, for whatever reason; None before.
        pieces: Times at which its pieces of tokens were delivered.
    """

    submitted: float
    begun: float | None = None
    first_token: float | None = None
    ended: float | None = None
    pieces: list[float] = field(default_factory=list)


class Handle:
    """Stands for a request to an engine.

    Every method may be called from any thread.

    Iterating gives lists of committed token ids, from the first one on, however often it is
    iterated. ``async for`` and ``await`` do the same on an event loop, without a thread; where
    their task is cancelled, so is the request.

    Args:
        prompt: Token ids of the prompt.
        wake: Function that tells the engine that the request has been given up.

    Attributes:
        prompt: Token ids of the prompt.
        choices: Handles of all texts that were asked for with this one (``n``), itself included.
        times: Times of its submission, its beginning, its pieces and its end.
        on_piece: Function called with each piece, on the engine's thread.
        logprobs: Log-probabilities of the tokens so far, where they were asked for. It grows;
            only as many entries count as tokens were delivered.
    """

    logprobs: Sequence[TokenLogprob] | None = None

    def __init__(self, prompt: list[int], wake: Callable[[Handle], None]) -> None:
        self.prompt = prompt
        self.choices: tuple[Handle, ...] = (self,)
        self.times = Times(time.perf_counter())
        self._wake = wake
        lock = threading.Lock()
        self._changed, self._over = threading.Condition(lock), threading.Condition(lock)
        self._pieces: list[list[int]] = []
        self._result: Generation | None = None
        self._error: BaseException | None = None
        self._is_done = False
        self._cached_tokens = 0
        self._listeners: list[Callable[[], None]] = []
        self._callbacks: list[Callable[[Handle], Any]] = []
        self._closers: list[Callable[[Handle], Any]] = []
        self.on_piece: Callable[[list[int]], Any] | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended: with a result, an error, or cancelled."""
        return self._is_done

    @property
    def token_ids(self) -> list[int]:
        """Tokens delivered so far."""
        return [token for piece in list(self._pieces) for token in piece]

    @property
    def usage(self) -> Usage:
        """Tokens of the prompt and of the answer so far."""
        return Usage(len(self.prompt), self._cached_tokens, len(self.token_ids))

    @property
    def error(self) -> BaseException | None:
        """Error that ended it, if any."""
        return self._error

    def pieces_from(self, position: int) -> list[list[int]]:
        """Return the pieces delivered from this one on, without waiting."""
        return self._pieces[position:]

    def cancel(self) -> bool:
        """Give the request up.

        Nothing is delivered afterwards, and its row is free after the step that runs.

        Returns:
            Whether it had not ended before.
        """
        error = RequestCancelledError(
            f"expected a text to its end, found one cancelled after token {len(self.token_ids)}",
            "submit it again if it is wanted after all",
        )
        is_first = self._end(error=error)
        if is_first:
            self._wake(self)
        return is_first

    def result(self, timeout_s: float | None = None) -> Generation:
        """Wait for the end.

        Args:
            timeout_s: Most seconds to wait; None = any number. The request itself goes on.

        Raises:
            TimeoutError: the text has not ended by then.
            RequestCancelledError: the request was cancelled.
            RequestTimeoutError: its own time ran out.
            EngineError: the engine could not go on.
        """
        with self._over:
            if not self._over.wait_for(lambda: self._is_done, timeout_s):
                raise TimeoutError(
                    f"expected the text's end within {timeout_s} s, found it running"
                )
        return self._outcome()

    def __iter__(self) -> Iterator[list[int]]:
        for position in count():
            with self._changed:
                self._changed.wait_for(partial(self._has, position))
            if position >= len(self._pieces):
                self._outcome()
                return
            yield self._pieces[position]

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        async with self._listening() as changed:
            for position in count():
                await _until(changed, partial(self._has, position))
                if position >= len(self._pieces):
                    self._outcome()
                    return
                yield self._pieces[position]

    def __await__(self) -> Generator[Any, None, Generation]:
        return self._ended().__await__()

    async def _ended(self) -> Generation:
        async with self._listening() as changed:
            await _until(changed, lambda: self._is_done)
        return self._outcome()

    def add_done_callback(self, callback: Callable[[Handle], Any]) -> None:
        """Call ``callback(handle)`` once it has ended; at once where it has.

        It runs on the thread that ends the request, mostly the engine's, so it should be short.
        """
        with self._changed:
            if not self._is_done:
                self._callbacks.append(callback)
                return
        _call(callback, self)

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[asyncio.Event]:
        """Have an event set at each change.

        Where the task is cancelled, so is the request.
        """
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.append(notify)
        try:
            yield changed
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            with self._changed:
                self._listeners.remove(notify)

    def _has(self, position: int) -> bool:
        """Whether a reader at this position need not wait."""
        return self._is_done or len(self._pieces) > position

    def _outcome(self) -> Generation:
        if self._error is not None:
            raise _again(self._error)
        assert self._result is not None
        return self._result

    # --- what the engine calls

    def begin(self, cached_tokens: int) -> None:
        """Take note that it has a row.

        The first ``cached_tokens`` of the prompt need not be computed.
        """
        self.times.begun, self._cached_tokens = time.perf_counter(), cached_tokens

    def add_closer(self, closer: Callable[[Handle], Any]) -> None:
        """Have something short done at the end, before anybody learns of it."""
        with self._changed:
            if not self._is_done:
                self._closers.append(closer)
                return
        closer(self)

    def deliver(self, token_ids: list[int]) -> bool:
        """Hand tokens to whoever reads.

        The result is False where nothing was handed over: there were none, or it had ended.
        """
        with self._changed:
            if self._is_done or not token_ids:
                return False
            self.times.pieces.append(time.perf_counter())
            if not self._pieces:
                self.times.first_token = self.times.pieces[0]
            self._pieces.append(token_ids)
            self._notify()
        if self.on_piece is not None:
            _call(self.on_piece, token_ids)
        return True

    def finish(self, result: Generation) -> bool:
        """End with a result; False where it had ended before."""
        return self._end(result=result)

    def fail(self, error: BaseException) -> bool:
        """End with an error; False where it had ended before."""
        return self._end(error=error)

    def _end(self, *, result: Generation | None = None, error: BaseException | None = None) -> bool:
        """End with a result or an error; whoever comes first decides.

        This is the only way to end. The result is False where it had ended before.
        """
        with self._changed:
            if self._is_done:
                return False
            self.times.ended = time.perf_counter()  # before anybody may see that it is done
            self._result, self._error, self._is_done = result, error, True
            for closer in self._closers:
                closer(self)
            callbacks, self._callbacks = self._callbacks, []
            self._notify()
            self._over.notify_all()
        for callback in callbacks:
            _call(callback, self)
        return True

    def _notify(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()


async def _until(changed: asyncio.Event, is_true: Callable[[], bool]) -> None:
    while not is_true():
        changed.clear()
        if is_true():  # it may have come between the two
            return
        await changed.wait()


def _call(callback: Callable[[Any], Any], argument: Any) -> None:
    """Call what a caller gave, and log what it raises.

    Its errors are its own, and never stop an engine.
    """
    try:
        callback(argument)
    except Exception:
        logger.exception("a callback of a request has failed")


def _again(error: BaseException) -> BaseException:
    """Return the error to raise: a fresh copy.

    Several threads may raise it.
    """
    copy: TrimodeError
    if isinstance(error, TrimodeError):
        copy = type(error)(error.message, error.hint)
        copy.__cause__ = error.__cause__
        return copy
    copy = EngineError(f"expected a text to its end, found an error: {reason_of(error)}")
    copy.__cause__ = error
    return copy

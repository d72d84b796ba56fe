"""Answers many requests over one bundle: from any thread, and from asyncio."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from trimode.errors import EngineError, QueueFullError, UsageError
from trimode.formats.contract import Mode
from trimode.runtime.decode.arguments import (
    FLAG,
    NUMBER,
    TEXT,
    WHOLE,
    Kind,
    checks_arguments,
    instance_of,
)
from trimode.runtime.decode.options import KINDS, MODE
from trimode.runtime.engine.compiling import Compiling
from trimode.runtime.engine.core import EngineCore
from trimode.runtime.engine.handle import Handle
from trimode.runtime.engine.load.state import ModePolicy
from trimode.runtime.engine.request import Request
from trimode.runtime.engine.settings import Settings
from trimode.runtime.engine.snapshot import snapshot
from trimode.runtime.engine.stats import EngineStats
from trimode.runtime.engine.worker import Worker
from trimode.runtime.measure.trace import TraceWriter
from trimode.runtime.model import TriModeModel
from trimode.runtime.request.batches import check_batches, check_max_rows
from trimode.runtime.request.prompts import check_row
from trimode.runtime.service_parts import (
    check_fits,
    check_least,
    check_share,
    check_within,
    open_model,
    open_stream,
    shut,
    timed,
    trace_request,
    with_seed,
)

DEFAULT_KV_BYTES = 1 << 30
DEFAULT_NEW_TOKENS = 128

_MAKING = {
    "max_rows": WHOLE,
    "kv_bytes": WHOLE.or_none(),
    "max_queue": WHOLE,
    "mode": TEXT,
    "latency_target_ms": NUMBER,
    "prefill_share": NUMBER,
    "is_fair": FLAG,
    "by_load": FLAG,
    "freeze_timings": FLAG,
}
_SUBMITTING: dict[str, Kind] = {
    "mode": MODE["mode"].or_none(),
    "max_new_tokens": WHOLE.or_none(),
    "priority": WHOLE,
    "timeout_s": NUMBER.or_none(),
    "cache_salt": TEXT.or_none(),
    "n": WHOLE,
    "system_length": WHOLE,
}
_FOLLOWING = {"handle": instance_of(Handle, "a handle of this engine")}


class Engine:
    """Answers requests side by side, and computes no prefix twice.

    One thread runs the model. All methods may be called from any thread. A request's tokens are
    those of its own single run, whatever else runs.

    Args:
        model: Bundle folder, or an opened model, which then stays open when the engine closes.
        max_rows: Most texts that run at a time.
        kv_bytes: Most bytes of host memory for K/V of texts that have ended; None = 1 GiB, 0 =
            none. Rows at work have their own memory.
        max_queue: Most requests that wait for a row.
        mode: Mode of requests that name none.
        latency_target_ms: Most milliseconds that reading another prompt may keep a decoding text
            waiting, as far as a chunk of 16 tokens allows.
        prefill_share: Share of the time that reading prompts has while others decode, above 0 and
            below 1.
        is_fair: Whether waiting requests of one priority take turns by their ``fair_key``.
        by_load: Whether the table of ``trimode bench --batch`` is used, where there is one. By it
            rows wait for others that are one forward behind, where that pays. And where the
            engine's mode is ``auto``, one plan is made for all rows in that mode without a seed;
            else each row has its own.
        freeze_timings: Whether that table stays as it was measured; else it learns.
        mode_policy: Plans to use in place of these.
        opening: Keywords of :meth:`TriModeModel.from_pretrained`, for a bundle folder.

    Attributes:
        model: Opened model that runs.

    Raises:
        UsageError: a value is out of its range, or the session runs single texts only.
        BundleError: the bundle cannot be opened.
    """

    @checks_arguments(
        _MAKING,
        options=("precision", "target", "num_threads", "verify", "runtime_cache", "timings"),
    )
    def __init__(
        self,
        model: str | Path | TriModeModel,
        max_rows: int = 8,
        kv_bytes: int | None = None,
        max_queue: int = 256,
        mode: Mode = "auto",
        *,
        latency_target_ms: float = 50.0,
        prefill_share: float = 0.5,
        is_fair: bool = False,
        by_load: bool = True,
        freeze_timings: bool = False,
        mode_policy: ModePolicy | None = None,
        **opening: Any,
    ) -> None:
        kv_bytes = DEFAULT_KV_BYTES if kv_bytes is None else kv_bytes
        check_least("max_queue", max_queue, 0)
        check_least("kv_bytes", kv_bytes, 0)
        check_share(prefill_share, latency_target_ms)
        settings = Settings(
            max_rows=max_rows,
            kv_bytes=kv_bytes,
            latency_target_s=latency_target_ms / 1000,
            prefill_share=prefill_share,
            is_fair=is_fair,
            mode_policy=mode_policy,
        )
        is_own = not isinstance(model, TriModeModel)
        opened = open_model(model, opening)
        self.model: TriModeModel = opened
        self._mode = mode
        try:
            session = check_batches(opened.session)
            check_max_rows(max_rows, session.max_batch, opened.target)
            opened.read_options(mode, {}, max_rows)
            if by_load:
                has_plans = mode == "auto" and mode_policy is None
                settings = timed(settings, opened, has_plans=has_plans, is_frozen=freeze_timings)
        except BaseException:
            if is_own:
                opened.close()
            raise
        self._core = EngineCore(session, opened.model, partial(open_stream, opened), settings)
        self._compiling = Compiling(opened.with_grammar, self._core.post)
        self._places = threading.BoundedSemaphore(max_rows + max_queue)
        self._most = max_rows + max_queue
        self._gate = threading.Lock()
        self._is_closed = False
        self._worker = Worker(self._core)
        own = opened if is_own else None
        self._finalizer = weakref.finalize(self, shut, self._compiling, self._worker, own)

    @checks_arguments(_SUBMITTING, options=(*KINDS, "on_piece", "fair_key", "trace"))
    def submit(
        self,
        ids: Any,
        *,
        mode: Mode | None = None,
        max_new_tokens: int | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        cache_salt: str | None = "",
        fair_key: Hashable = None,
        n: int = 1,
        system_length: int = 0,
        on_piece: Callable[[list[int]], Any] | None = None,
        trace: TraceWriter | None = None,
        **choices: Any,
    ) -> Handle:
        """Ask for a text.

        Args:
            ids: Prompt, array-like ``(tokens,)``.
            mode: Mode of the text; None = the engine's.
            max_new_tokens: Most tokens of the answer; None = 128, or what the model has room for.
            priority: Larger comes first.
            timeout_s: Seconds from now after which the request fails.
            cache_salt: Computed prefixes are shared among requests of one salt only; None =
                with none, and nothing is kept.
            fair_key: Whom the request counts for in a fair engine; None = its salt.
            n: Number of texts. Their prompt is read once. Where a seed is given, the next text
                has the next seed. See :attr:`Handle.choices`.
            system_length: Tokens at the beginning of the prompt that are the system prompt; kept
                longest.
            on_piece: Called with each list of tokens, on the engine's thread; should be short.
            trace: Gets a run for each text, mostly on the engine's thread.
            choices: Keywords as for :meth:`TriModeModel.stream`. A grammar of
                ``structured_outputs`` is compiled beside the engine's thread. Where it is wrong,
                the handle ends with a :class:`UsageError`.

        Raises:
            UsageError: a value is out of its range; or prompt and answer can never fit; or the
                engine is closed.
            QueueFullError: as many requests wait as may.
            EngineError: the engine has stopped after an error.
        """
        check_least("n", n, 1)
        prompt = check_row(ids, self.model.model)
        mode = mode or self._mode
        room = self.model.model.max_length - len(prompt)
        if max_new_tokens is None:
            max_new_tokens = min(DEFAULT_NEW_TOKENS, room)
        check_fits(max_new_tokens, len(prompt), room)
        check_within("system_length", system_length, len(prompt))
        choices["max_new_tokens"] = max_new_tokens
        options = self.model.read_options(mode, choices, self._core.settings.max_rows)
        now = time.perf_counter()
        namespace = ("salt", cache_salt) if cache_salt is not None else ("own", object())
        requests = [
            Request(
                handle=Handle(prompt, self._core.post),
                ids=prompt,
                mode=mode,
                options=with_seed(options, number),
                namespace=namespace,
                fair_key=("salt", cache_salt) if fair_key is None else ("key", fair_key),
                is_kept=cache_salt is not None,
                priority=priority,
                deadline=None if timeout_s is None else now + timeout_s,
                system_length=system_length,
            )
            for number in range(n)
        ]
        handles = tuple(request.handle for request in requests)
        for handle in handles:
            handle.choices = handles
            handle.on_piece = on_piece
        if trace is not None:
            for request in requests:
                trace_request(request, trace, self._core.modes)
        self._post(requests)
        return handles[0]

    @checks_arguments(_FOLLOWING, options=(*_SUBMITTING, *KINDS, "on_piece", "fair_key", "trace"))
    def follow_up(self, handle: Handle, ids: Any, **choices: Any) -> Handle:
        """Go on after a text that has ended.

        Its prompt, its answer and ``ids`` are the new prompt. What it has computed is not computed
        again while it is kept. Everything is as in :meth:`submit`; pass the same ``cache_salt``.

        Raises:
            UsageError: the text has not ended.
        """
        if not handle.done:
            raise UsageError(
                "expected a handle whose text has ended, found one that is at work",
                "wait for its result first",
            )
        turn = check_row(ids, self.model.model)
        return self.submit([*handle.prompt, *handle.token_ids, *turn], **choices)

    def stats(self) -> EngineStats:
        """Report what the engine has done, and what it is doing."""
        return snapshot(self._core)

    @property
    def error(self) -> EngineError | None:
        """Why the engine takes no more requests; None while it is healthy."""
        return self._core.error

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests, and stop. Closing twice is fine.

        Args:
            drain: Whether what was submitted is finished first; else it is cancelled.
            timeout_s: Most seconds for that; what runs then is cancelled.
        """
        with self._gate:
            self._is_closed = True
        self._compiling.close(drain=drain and not self._worker.is_current)
        self._worker.stop(drain=drain)
        if self._worker.is_current:  # a callback closes its engine: the rest is done later
            return
        if not self._worker.join(timeout_s):
            self._worker.stop(drain=False)
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def _post(self, requests: list[Request]) -> None:
        """Hand requests to the engine's thread: all of them, or none."""
        with self._gate:
            self._check_open()
            taken = sum(self._places.acquire(blocking=False) for _ in requests)
            if taken < len(requests):
                for _ in range(taken):
                    self._places.release()
                raise QueueFullError(
                    f"expected at most {self._most} requests at a time, found as many already",
                    "try again later, or make the engine with a larger max_queue",
                )
            for request in requests:
                request.handle.add_closer(lambda _: self._places.release())
            if requests[0].options.structured_outputs is not None:
                self._compiling.add(requests)
                return
            for request in requests:
                self._core.post(request)

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError("expected an open engine, found it closed", "make a new one")
        if (error := self._core.error) is not None:
            raise EngineError(error.message, error.hint) from error.__cause__

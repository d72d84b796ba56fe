"""Compiles the grammars of requests beside the engine's thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from trimode.errors import RequestCancelledError
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.engine.request import Request

NUM_THREADS = 2


class Compiling:
    """Compiles grammars, and then hands the requests on.

    For any thread.

    Args:
        compile_options: Function that compiles the grammar of options.
        post: Function that takes a request that is ready.
    """

    def __init__(
        self,
        compile_options: Callable[[DecodeOptions], DecodeOptions],
        post: Callable[[Request], None],
    ) -> None:
        self._compile, self._post = compile_options, post
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._waiting: set[Request] = set()
        self._is_closed = False

    def add(self, requests: Sequence[Request]) -> None:
        """Compile the grammar that these requests have in common."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(NUM_THREADS, "trimode-grammar")
            self._waiting.update(requests)
            self._pool.submit(self._run, requests)

    def close(self, *, drain: bool) -> None:
        """Take no more; finish what was added (``drain``), or fail it."""
        if drain and self._pool is not None:
            self._pool.shutdown()
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        for request in waiting:
            request.handle.fail(
                RequestCancelledError(
                    "expected a text to its end, found its engine closed",
                    "close it with drain=True",
                )
            )

    def _run(self, requests: Sequence[Request]) -> None:
        wanted = [request for request in requests if not request.handle.done]
        error = self._compiled(wanted) if wanted else None
        with self._lock:
            self._waiting.difference_update(requests)
            if self._is_closed:
                return
            if error is None:
                for request in wanted:
                    self._post(request)
        if error is not None:
            for request in wanted:
                request.handle.fail(error)

    def _compiled(self, requests: Sequence[Request]) -> Exception | None:
        """Compile for requests of one submission; return why that failed."""
        deadline = requests[0].deadline
        if deadline is not None and deadline <= time.perf_counter():
            return None  # the engine says so
        try:
            compiled = self._compile(requests[0].options)
        except Exception as error:
            return error
        for request in requests:
            request.take_grammar(compiled)
        return None

"""Compiles the engines of a build, several at a time.

Each is compiled in a process of its own, through the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.compiler.store.cache import ContentCache
from trimode.compiler.targets import DENSE_PRECISIONS, Precision, Target
from trimode.compiler.tensorrt.builder import EngineJob
from trimode.errors import BuildError

PROGRESS_STEPS = 100
"""Progress steps that one engine is worth."""

_STOP_SECONDS = 3.0


@dataclass(frozen=True)
class EngineTask:
    """Holds an engine's job, target, precision and cache key."""

    target: Target
    precision: Precision
    key: str
    job: EngineJob

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.target.name}/{self.job.output.name}"


def build_engines(
    tasks: Sequence[EngineTask],
    cache: ContentCache | None,
    num_workers: int,
    advance: Callable[[int], None],
) -> int:
    """Compile every task's engine; return how many the cache had.

    Each engine is written to its task's ``job.output``.

    Args:
        tasks: Engines to have.
        cache: Cache of engines; None compiles all.
        num_workers: Compiling processes at a time.
        advance: Listener that is told progress, :data:`PROGRESS_STEPS` for each engine; called from
            several threads.

    Raises:
        BuildError: the library refuses one of them; the other processes are stopped.
    """
    workers = _Workers()
    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        futures = [pool.submit(_have_engine, task, cache, workers, advance) for task in tasks]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        _raise_first(done)
        return sum(future.result() for future in futures)
    finally:
        # Also when the user interrupts: nothing waits for an engine that nobody wants any more.
        workers.stop()
        pool.shutdown(cancel_futures=True)


def default_num_workers() -> int:
    """One process for each core that this process may use."""
    return len(os.sched_getaffinity(0))


def _raise_first(done: set[Future[bool]]) -> None:
    for future in done:
        error = future.exception()
        if error is not None:
            raise error


def _have_engine(
    task: EngineTask, cache: ContentCache | None, workers: _Workers, advance: Callable[[int], None]
) -> bool:
    sent = 0

    def report(fraction: float) -> None:
        nonlocal sent
        steps = int(fraction * PROGRESS_STEPS) - sent
        if steps > 0:
            sent += steps
            advance(steps)

    def make(path: Path) -> None:
        workers.compile(task, path, report)

    found = False
    if cache is None:
        make(task.job.output)
    else:
        found = cache.fetch(task.key, task.job.output, make)
    report(1.0)
    return found


class _Workers:
    """Keeps track of the compiling processes, to stop them all."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def compile(self, task: EngineTask, output: Path, report: Callable[[float], None]) -> None:
        job = task.job.model_copy(update={"output": output})
        with self._started() as process:
            assert process.stdin is not None
            assert process.stdout is not None
            # it died at once; the missing answer says so
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(job.model_dump_json() + "\n")
                process.stdin.flush()
            last: dict[str, Any] = {}
            for line in process.stdout:
                last = json.loads(line)
                if "progress" in last:
                    report(last["progress"])
            process.wait()
        if "done" not in last:
            raise _failure(task, last, process.returncode, stopped=self._stopped)

    @contextlib.contextmanager
    def _started(self) -> Iterator[subprocess.Popen[str]]:
        with self._lock:
            if self._stopped:
                raise BuildError("expected to build all engines, found the build stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "trimode.compiler.tensorrt.worker"],
                text=True,
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._running.add(process)
        try:
            yield process
        finally:
            _end(process)
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def _failure(
    task: EngineTask, last: dict[str, Any], returncode: int, *, stopped: bool
) -> Exception:
    if "refused" in last:
        return explain_refusal(task, last["refused"])
    if "disk" in last:
        return OSError(last["disk"]["errno"], last["disk"]["message"])
    if stopped:
        return BuildError(f"{task.name}: expected to finish, found the build stopped")
    return BuildError(
        f"{task.name}: expected an engine,"
        f" found that the compiling process ended with {returncode}",
        "check free memory (about 1 GB for each process), or pass `num_jobs` 1",
    )


def explain_refusal(task: EngineTask, messages: list[str]) -> BuildError:
    """What the library's messages mean for the user."""
    text = " ".join(messages)
    where = f"{task.target.name} ({task.target.compute_capability})"
    types = re.search(r"HW-specific datatypes: (\w+)", text)
    if types:
        able = " or ".join(
            p for p in task.target.precisions if p in DENSE_PRECISIONS and p != task.precision
        )
        return BuildError(
            f"{where}: expected types the GPU can compute in, found {types[1]} ({task.precision})",
            f"pass `precision` {able}",
        )
    if "workspace limit" in text:
        found = f"{(task.job.workspace_bytes or 0) >> 20} MiB"
        return BuildError(
            f"{task.name}: expected enough workspace for at least one kernel of each layer,"
            f" found {found}",
            "pass a larger `workspace_mib`",
        )
    first = messages[0].splitlines()[0] if messages else "no message"
    return BuildError(
        f"{task.name}: {task.job.library} refuses the graph: {first}",
        f"update {task.job.library.replace('_', '-')},"
        " or report it with the checkpoint's config.json",
    )

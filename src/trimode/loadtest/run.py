"""Measures one mode at one load."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimode.formats.load import RequestRecord, RunRecord, ServedRecord
from trimode.loadtest import figures
from trimode.loadtest.bodies import Composer
from trimode.loadtest.client import Connections
from trimode.loadtest.options import Load, Span
from trimode.loadtest.plan import LoadTest
from trimode.loadtest.play import Played, Player, endless, run_loop
from trimode.loadtest.process import watched
from trimode.loadtest.questions import Question
from trimode.loadtest.requests import counted_by, request_records
from trimode.loadtest.served import counters, served_record
from trimode.loadtest.window import Window
from trimode.progress import Advance, Progress


@dataclass
class Run:
    """Holds a run, and what it has found so far.

    Attributes:
        played: Turns that have ended, those of the warm-up too.
        served: Counts of the server.
        cpu_share: Processor seconds per second that this process used.
        is_partial: Whether the run has not come to its end.
    """

    test: LoadTest
    composer: Composer
    load: Load
    questions: Sequence[Question]
    played: list[Played] = field(default_factory=list)
    served: ServedRecord = field(default_factory=ServedRecord)
    cpu_share: float = 0.0
    is_partial: bool = True

    def requests(self, index: int) -> list[RequestRecord]:
        """Return the records of the requests that count."""
        return request_records(self.played, index)

    def record(self, requests: Sequence[RequestRecord]) -> RunRecord:
        """Summarise the run."""
        rates = figures.throughput(requests)
        users = self.load.concurrency or rates["mean_concurrent_requests"]
        return RunRecord(
            mode=self.composer.mode,
            max_concurrency=self.load.concurrency,
            request_rate=self.load.rate,
            burstiness=None if self.load.rate is None else self.load.burstiness,
            partial=self.is_partial,
            **rates,
            **self._goodput(requests, rates["duration"]),
            **figures.times(requests).model_dump(),
            output_throughput_per_user=rates["output_throughput"] / users if users else None,
            output_tokens_counted_by=counted_by(self.played),
            client_cpu_share=self.cpu_share,
            acceptance=figures.acceptance(requests),
            acceptance_by_category=figures.acceptance_by_category(requests),
            served=self.served,
        )

    def _goodput(self, requests: Sequence[RequestRecord], duration: float) -> dict[str, Any]:
        if not self.test.goodput.limits or not requests:
            return {}
        count = figures.good(requests, self.test.goodput)
        rate = count / duration if duration else 0.0
        return {"request_goodput": rate, "good_share": count / len(requests)}


async def measure(run: Run, client: Connections, progress: Progress, name: str) -> None:
    """Put the load on the server, and note what it counts meanwhile.

    Args:
        run: Run to fill.
        client: Lender of clients.
        progress: Receiver of the progress.
        name: Name of the run, for the progress.
    """
    test = run.test
    advance = progress.stage(name, _total(test.span))
    base, before = test.server.base, await counters(client, test.server.base)
    player = Player(client, base, run.composer, _sink(run, advance))
    source = endless(run.questions, test.seed)
    async with watched(test.server) as log:
        window, clock = Window(test.span), _Clock()
        try:
            async with _ticking(test.span, advance):
                await run_loop(player, source, window, run.load, seed=test.seed)
        finally:
            run.cpu_share = clock.share()
    after = await counters(client, base)
    usage = log.measured(window.measure_from)
    run.served = served_record(before, after).model_copy(update=usage)
    run.is_partial = window.is_given_up


class _Clock:
    """Measures the share of the time in which this process computes."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def share(self) -> float:
        wall, cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        return cpu / wall if wall else 0.0


def _sink(run: Run, advance: Advance) -> Callable[[Played], None]:
    """Return a function that keeps each turn, and tells progress.

    It advances a run that ends after a number of prompts.
    """
    by_prompts = run.test.span.num_prompts is not None

    def keep(one: Played) -> None:
        run.played.append(one)
        if by_prompts and one.is_measured and one.turn == 0:
            advance(1)

    return keep


@contextlib.asynccontextmanager
async def _ticking(span: Span, advance: Advance) -> AsyncIterator[None]:
    """Tell the progress of a timed run, a step a second."""
    if span.duration is None:
        yield
        return
    task = asyncio.create_task(_tick(_total(span), advance))
    try:
        yield
    finally:
        task.cancel()


async def _tick(count: int, advance: Advance) -> None:
    for _ in range(count):
        await asyncio.sleep(1)
        advance(1)


def _total(span: Span) -> int:
    if span.num_prompts is not None:
        return span.num_prompts
    return math.ceil(span.warmup + (span.duration or 0.0))

"""Times the forwards of a loaded bundle, the way decoding runs them.

A draft and its verification take turns, as in a cycle, and one AR forward follows another. Each
round measures every case, in an order that is drawn anew, so that whatever else the machine does in
the meantime falls on all alike; before it is timed, a case runs once, so that none pays for the one
before.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trimode.errors import UsageError
from trimode.formats.contract import GraphName, ModelInfo
from trimode.runtime.auto.timings import ForwardTime
from trimode.runtime.decode.sequence import PREFILL_CHUNK
from trimode.runtime.sessions.base import BatchSession, Ids, KVCache, Session, takes_block

DEFAULT_ROWS = (1, 4, 8, 12, 16, 24, 32)
DEFAULT_PAST = (64, 512, 2048)
USUAL_REPEATS, LEAST_REPEATS, PATIENCE_S = 20, 3, 120.0
_TIMED_PER_ROUND = 2


@dataclass(frozen=True)
class TimerSettings:
    """Holds the choices of a caller.

    Attributes:
        rows: Rows of the forwards: 1 and blocks; None = 1, 4, 8, 12, 16, 24, 32 and the model's
            own, as far as the graphs take them. 1 is always measured.
        past: Numbers of tokens cached before a forward; None = 64, 512 and 2048, as far as the
            model takes them.
        batch: Numbers of sequences in a forward. 1 is always measured.
        repeats: Number of rounds; None = 20, or as many as fit into two minutes, but 3 at least.
        seed: Seed of the tokens and of the order.
    """

    rows: tuple[int, ...] | None = None
    past: tuple[int, ...] | None = None
    batch: tuple[int, ...] = (1,)
    repeats: int | None = None
    seed: int = 0


@dataclass
class _Texts:
    """Holds the texts of a batch, with equally many cached tokens."""

    batch: int
    past: int
    cache: KVCache

    def run(
        self, session: Session, graph: GraphName, ids: Ids, past: int, drafter_scale: float = 0.0
    ) -> None:
        """Run a forward of all of them over ``ids (batch, rows)``."""
        if self.batch == 1:
            session.run(graph, self.cache, ids, past, drafter_scale)
            return
        assert isinstance(session, BatchSession)
        each = np.ones(self.batch, np.int64)
        session.run_rows(
            graph,
            self.cache,
            range(self.batch),
            ids,
            each * past,
            each * ids.shape[1],
            drafter_scale,
        )


@dataclass
class _Case:
    graph: GraphName
    texts: _Texts
    ids: Ids
    drafter: bool
    seconds: list[float] = field(default_factory=list)

    def run(self, session: Session) -> float:
        start = time.perf_counter()
        self.texts.run(session, self.graph, self.ids, self.texts.past, 1.0 if self.drafter else 0.0)
        return time.perf_counter() - start


def check_settings(settings: TimerSettings, model: ModelInfo, session: Session) -> TimerSettings:
    """Return the settings with every choice made, sorted.

    Raises:
        UsageError: a value is out of its range, or the graphs were not built for it.
    """
    if settings.repeats is not None and settings.repeats < 1:
        raise UsageError(
            f"expected `repeats` of at least 1, found {settings.repeats}",
            f"{USUAL_REPEATS} is usual",
        )
    rows = _usual_rows(model, session) if settings.rows is None else settings.rows
    _check_rows(rows, model, session)
    longest = model.max_length - max((1, *rows))
    past = settings.past
    if past is None:
        past = tuple(n for n in DEFAULT_PAST if n <= longest) or (max(1, longest),)
    for cached in past:
        if not 1 <= cached <= longest:
            raise UsageError(
                f"expected `past` from 1 to {longest}, found {cached}",
                "past and rows together fit into the model's longest text",
            )
    if not rows or not past:
        raise UsageError(
            "expected at least one number for `rows` and for `past`, found none",
            "leave them out for the usual ones",
        )
    _check_batch(settings.batch, session)
    rows, past, batch = (
        tuple(sorted(set(values))) for values in ((1, *rows), past, (1, *settings.batch))
    )
    return replace(settings, rows=rows, past=past, batch=batch)


def _usual_rows(model: ModelInfo, session: Session) -> tuple[int, ...]:
    usual = sorted({*DEFAULT_ROWS, model.block_size})
    return tuple(
        n for n in usual if n == 1 or (n <= model.max_block_length and takes_block(session, n))
    )


def _check_rows(rows: Sequence[int], model: ModelInfo, session: Session) -> None:
    for length in rows:
        if not 1 <= length <= model.max_block_length:
            raise UsageError(
                f"expected `rows` from 1 to {model.max_block_length}, found {length}",
                "1 is an AR step, the others are blocks",
            )
        if length > 1:
            session.check_block_length(length)


def _check_batch(sizes: Sequence[int], session: Session) -> None:
    most = (session.max_batch or math.inf) if isinstance(session, BatchSession) else 1
    for batch in sizes:
        if not 1 <= batch <= most:
            expected = (
                "of at least 1"
                if most == math.inf
                else f"from 1 to {most}, which the target was built for"
            )
            raise UsageError(
                f"expected `batch` {expected}, found {batch}",
                "leave it out for single sequences, or build with a larger `max_batch`",
            )


def time_forwards(
    session: Session, model: ModelInfo, settings: TimerSettings, advance: Callable[[int], None]
) -> tuple[ForwardTime, ...]:
    """Measure every graph, row count, cached length and batch of checked settings.

    ``advance(1)`` after each round.
    """
    assert settings.rows is not None
    assert settings.past is not None
    rng = np.random.default_rng(settings.seed)
    groups = [
        group
        for batch in settings.batch
        for texts in _cached_texts(session, model, batch, settings.past, max(settings.rows), rng)
        for rows in settings.rows
        for group in _groups(model, rows, texts, rng)
    ]
    order, start = random.Random(settings.seed), time.monotonic()
    for number in range(settings.repeats or USUAL_REPEATS):
        if (
            settings.repeats is None
            and number >= LEAST_REPEATS
            and time.monotonic() - start > PATIENCE_S
        ):
            break
        for group in order.sample(groups, len(groups)):
            for case in group:
                case.run(session)
            for _ in range(_TIMED_PER_ROUND):
                for case in group:
                    case.seconds.append(case.run(session))
        advance(1)
    return tuple(
        sorted(
            _times(groups), key=lambda one: (one.graph, one.drafter, one.batch, one.rows, one.past)
        )
    )


def _groups(
    model: ModelInfo, rows: int, texts: _Texts, rng: np.random.Generator
) -> list[list[_Case]]:
    """Cases that take turns."""

    def case(graph: GraphName, drafter: bool = False) -> _Case:
        return _Case(graph, texts, rng.integers(0, model.vocab_size, (texts.batch, rows)), drafter)

    groups = [[case("ar")]]
    if rows > 1:
        groups.append([case("draft"), case("verify")])
    if rows > 1 and model.has_drafter:
        groups.append([case("draft", True), case("verify")])
    return groups


def _cached_texts(
    session: Session,
    model: ModelInfo,
    batch: int,
    past: Sequence[int],
    most_rows: int,
    rng: np.random.Generator,
) -> list[_Texts]:
    """Make random texts for each number of cached tokens.

    Their caches have the capacity that texts of that length have.
    """
    found: list[_Texts] = []
    chunk = min(PREFILL_CHUNK, session.max_prefill_rows or PREFILL_CHUNK)
    for cached in past:
        # Where capacity is fixed, or does not grow between two lengths, one cache serves both.
        if not found or found[-1].cache.capacity < cached + most_rows:
            cache = (
                session.new_batch_cache(batch)
                if batch > 1 and isinstance(session, BatchSession)
                else session.new_cache()
            )
            cache.reserve(cached + most_rows)
        found.append(_Texts(batch, cached, cache))
        for start in range(0, cached, chunk):
            found[-1].run(
                session,
                "ar",
                rng.integers(0, model.vocab_size, (batch, min(chunk, cached - start))),
                start,
            )
    return found


def _times(groups: Sequence[Sequence[_Case]]) -> list[ForwardTime]:
    seconds: dict[tuple[GraphName, bool, int, int, int], list[float]] = {}
    for case in (case for group in groups for case in group):
        seconds.setdefault(
            (case.graph, case.drafter, case.texts.batch, case.ids.shape[1], case.texts.past), []
        ).extend(case.seconds)
    times = []
    for (graph, drafter, batch, rows, past), values in seconds.items():
        least, lower, median, upper = (
            1e3 * float(v) for v in np.percentile(values, (0, 25, 50, 75))
        )
        times.append(
            ForwardTime(
                graph=graph,
                rows=rows,
                past=past,
                batch=batch,
                drafter=drafter,
                num_runs=len(values),
                least_ms=least,
                lower_quartile_ms=lower,
                median_ms=median,
                upper_quartile_ms=upper,
            )
        )
    return times

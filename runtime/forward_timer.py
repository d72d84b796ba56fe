"""Times the forwards of a loaded bundle, the way decoding runs them.

A draft and its verification take turns, as in a cycle, and one AR forward follows another. Each round measures every case, in an order that is
drawn anew, so that whatever else the machine does in the meantime falls on all alike; before it is timed, a case runs once, so that none pays for
the one before.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trimode.errors import UsageError
from trimode.graphs.contract import ModelInfo, Role
from trimode.runtime.sequence import PREFILL_CHUNK
from trimode.runtime.session import Ids, KVCache, Session, takes_block
from trimode.runtime.timings import ForwardTime

DEFAULT_ROWS = (1, 4, 8, 12, 16, 24, 32)
DEFAULT_PAST = (64, 512, 2048)
USUAL_REPEATS, LEAST_REPEATS, PATIENCE_S = 20, 3, 120.0
_TIMED_PER_ROUND = 2


@dataclass(frozen=True)
class TimerSettings:
    """What a caller can choose.

    Attributes:
        rows: of the forwards: 1 and blocks; None = 1, 4, 8, 12, 16, 24, 32 and the model's own, as far as the graphs take them. 1 is always measured.
        past: tokens cached before a forward; None = 64, 512 and 2048, as far as the model takes them.
        repeats: rounds; None = 20, or as many as fit into two minutes, but 3 at least.
        seed: of the tokens and of the order.
    """

    rows: tuple[int, ...] | None = None
    past: tuple[int, ...] | None = None
    repeats: int | None = None
    seed: int = 0


@dataclass
class _Case:
    graph: Role
    rows: int
    past: int
    drafter: bool
    ids: Ids
    cache: KVCache
    seconds: list[float] = field(default_factory=list)

    def run(self, session: Session) -> float:
        start = time.perf_counter()
        session.run(self.graph, self.cache, self.ids, self.past, 1.0 if self.drafter else 0.0)
        return time.perf_counter() - start


def check_settings(settings: TimerSettings, model: ModelInfo, session: Session) -> TimerSettings:
    """The settings with every choice made, sorted.

    Raises:
        UsageError: a value is out of its range, or the graphs were not built for it.
    """
    rows, past = settings.rows, settings.past
    if settings.repeats is not None and settings.repeats < 1:
        raise UsageError(f"expected --repeats of at least 1, found {settings.repeats}", f"{USUAL_REPEATS} is usual")
    if rows is None:
        usual = sorted({*DEFAULT_ROWS, model.block_size})
        rows = tuple(n for n in usual if n == 1 or (n <= model.max_block_length and takes_block(session, n)))
    for length in rows:
        if not 1 <= length <= model.max_block_length:
            raise UsageError(f"expected --rows from 1 to {model.max_block_length}, found {length}", "1 is an AR step, the others are blocks")
        if length > 1:
            session.check_block_length(length)
    longest = model.max_length - max((1, *rows))
    if past is None:
        past = tuple(n for n in DEFAULT_PAST if n <= longest) or (max(1, longest),)
    for cached in past:
        if not 1 <= cached <= longest:
            raise UsageError(f"expected --past from 1 to {longest}, found {cached}", "past and rows together fit into the model's longest text")
    if not rows or not past:
        raise UsageError("expected at least one number for --rows and for --past, found none", "leave them out for the usual ones")
    return TimerSettings(tuple(sorted({1, *rows})), tuple(sorted(set(past))), settings.repeats, settings.seed)


def time_forwards(session: Session, model: ModelInfo, settings: TimerSettings, advance: Callable[[int], None]) -> tuple[ForwardTime, ...]:
    """Measure every graph, row count and cached length of checked settings; ``advance(1)`` after each round."""
    assert settings.rows is not None
    assert settings.past is not None
    rng = np.random.default_rng(settings.seed)
    groups = [
        group
        for past, cache in _filled_caches(session, model, settings.past, max(settings.rows), rng)
        for rows in settings.rows
        for group in _groups(model, rows, past, cache, rng)
    ]
    order, start = random.Random(settings.seed), time.monotonic()
    for number in range(settings.repeats or USUAL_REPEATS):
        if settings.repeats is None and number >= LEAST_REPEATS and time.monotonic() - start > PATIENCE_S:
            break
        for group in order.sample(groups, len(groups)):
            for case in group:
                case.run(session)
            for _ in range(_TIMED_PER_ROUND):
                for case in group:
                    case.seconds.append(case.run(session))
        advance(1)
    return tuple(sorted(_times(groups), key=lambda one: (one.graph, one.drafter, one.rows, one.past)))


def _groups(model: ModelInfo, rows: int, past: int, cache: KVCache, rng: np.random.Generator) -> list[list[_Case]]:
    """Cases that take turns."""

    def case(graph: Role, drafter: bool = False) -> _Case:
        return _Case(graph, rows, past, drafter, rng.integers(0, model.vocab_size, (1, rows)), cache)

    groups = [[case("ar")]]
    if rows > 1:
        groups.append([case("draft"), case("verify")])
    if rows > 1 and model.has_drafter:
        groups.append([case("draft", True), case("verify")])
    return groups


def _filled_caches(session: Session, model: ModelInfo, past: Sequence[int], most_rows: int, rng: np.random.Generator) -> list[tuple[int, KVCache]]:
    """A cache for each number of cached tokens, with keys and values of random tokens: one of the capacity that a text of that length has."""
    caches: list[tuple[int, KVCache]] = []
    chunk = min(PREFILL_CHUNK, session.max_prefill_rows or PREFILL_CHUNK)
    for cached in past:
        # Where capacity is fixed, or does not grow between two lengths, one serves both.
        if not caches or caches[-1][1].capacity < cached + most_rows:
            cache = session.new_cache()
            cache.reserve(cached + most_rows)
        for start in range(0, cached, chunk):
            session.run("ar", cache, rng.integers(0, model.vocab_size, (1, min(chunk, cached - start))), start)
        caches.append((cached, cache))
    return caches


def _times(groups: Sequence[Sequence[_Case]]) -> list[ForwardTime]:
    seconds: dict[tuple[Role, bool, int, int], list[float]] = {}
    for group in groups:
        for case in group:
            seconds.setdefault((case.graph, case.drafter, case.rows, case.past), []).extend(case.seconds)
    times = []
    for (graph, drafter, rows, past), values in seconds.items():
        least, lower, median, upper = (1e3 * float(v) for v in np.percentile(values, (0, 25, 50, 75)))
        times.append(
            ForwardTime(
                graph=graph, rows=rows, past=past, drafter=drafter, num_runs=len(values), least_ms=least, lower_quartile_ms=lower, median_ms=median,
                upper_quartile_ms=upper,
            )
        )  # fmt: skip
    return times

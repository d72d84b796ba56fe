"""The cost table of modes by load: its shape, its interpolation, and what it learns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.errors import UsageError
from trimode.formats.contract import GraphName
from trimode.runtime.auto.timings import ForwardTime, Subject, Timings
from trimode.runtime.engine.load.cost_table import LEARNED_FORWARDS, Cell, CostTable
from trimode.runtime.engine.load.learning import Corrections
from trimode.runtime.engine.load.roofline import Forwards, fit_roofline
from trimode.runtime.engine.load.waiting import ComingRows, ReadyRows, first_to_run, steps_to_wait

ROWS, TOKENS, CACHED = (1, 2, 4, 8, 16, 32, 64), (1, 4, 8, 16, 32), (64, 512, 2048)


def device_ms(rows: float, tokens: float, cached: float) -> float:
    """A device as one would draw it: launch, then weights and cache, or arithmetic."""
    return 0.3 + max(4 + 0.0004 * rows * cached, 0.03 * rows * tokens)


def cells(tokens: tuple[int, ...] = TOKENS) -> list[Cell]:
    return [Cell(n, k, c, device_ms(n, k, c)) for n in ROWS for k in tokens for c in CACHED]


def table(*, is_frozen: bool = False) -> CostTable:
    blocks = cells((4, 8, 16, 32))
    return CostTable({"ar": cells(), "draft": blocks, "verify": blocks}, is_frozen=is_frozen)


TABLE = table(is_frozen=True)


def test_the_fit_finds_the_device() -> None:
    points = list(itertools.product(ROWS, TOKENS, CACHED))
    rows, tokens, cached = (np.array(column, float) for column in zip(*points, strict=True))
    ms = np.array([device_ms(*point) for point in points])
    roofline = fit_roofline(Forwards(rows, tokens, cached, ms))
    assert roofline.memory == pytest.approx((4.3, 0, 0.0004), abs=1e-6)
    assert roofline.compute == pytest.approx((0.3, 0.03, 0), abs=1e-6)


def test_terms_are_never_negative_and_one_cached_length_says_nothing_of_the_cache() -> None:
    rows = np.array([1.0, 2, 4, 8])
    found = Forwards(rows, np.ones(4), np.full(4, 512.0), np.array([5.0, 4.9, 4.8, 4.7]))
    roofline = fit_roofline(found)
    assert min(*roofline.memory, *roofline.compute) >= 0
    assert roofline.memory[2] == 0


def test_a_measured_forward_is_what_was_measured() -> None:
    rng = np.random.default_rng(0)
    noisy = [cell._replace(ms=cell.ms * rng.uniform(0.7, 1.4)) for cell in cells()]
    found = CostTable({"ar": noisy})
    for cell in noisy:
        assert found.ms("ar", cell.rows, cell.tokens, cell.cached) == pytest.approx(cell.ms)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 32), st.integers(64, 2048))
def test_between_the_points_it_follows_the_device(rows: int, tokens: int, cached: int) -> None:
    cached = 32 * round(cached / 32)
    assert TABLE.ms("ar", rows, tokens, cached) == pytest.approx(
        device_ms(rows, tokens, cached), rel=1e-6
    )


def test_beyond_the_points_it_grows_as_the_device_does() -> None:
    found = table()
    assert found.ms("ar", 64, 512, 512) == pytest.approx(device_ms(64, 512, 512))
    assert found.ms("ar", 128, 1, 4096) == pytest.approx(device_ms(128, 1, 4096))


def test_points_that_are_missing_are_taken_from_the_fit() -> None:
    some = [cell for cell in cells() if (cell.rows, cell.tokens) != (8, 8)]
    found = CostTable({"ar": some})
    assert found.ms("ar", 8, 8, 512) == pytest.approx(device_ms(8, 8, 512))


def test_a_table_needs_ar_steps_and_names_the_graphs_it_has() -> None:
    with pytest.raises(UsageError, match="expected timings of AR steps"):
        CostTable({"draft": cells((4,)), "verify": cells((4,))})
    only_ar = CostTable({"ar": cells((1,))})
    assert only_ar.lengths == ()
    with pytest.raises(UsageError, match="expected timings of draft"):
        only_ar.ms("draft", 1, 4, 64)


def test_lengths_are_those_both_drafted_and_verified() -> None:
    found = CostTable({"ar": cells((1,)), "draft": cells((4, 8)), "verify": cells((8, 16))})
    assert found.lengths == (8,)


def timings() -> Timings:
    def one(graph: str, drafter: bool, factor: float) -> list[ForwardTime]:
        return [
            ForwardTime(
                graph=graph,  # type: ignore[arg-type]
                rows=k,
                past=c,
                batch=n,
                drafter=drafter,
                num_runs=3,
                least_ms=factor * device_ms(n, k, c),
                lower_quartile_ms=9e3,
                median_ms=9e3,
                upper_quartile_ms=9e3,
            )
            for n, k, c in itertools.product((1, 8), (1, 8) if graph == "ar" else (8,), (64, 512))
        ]

    subject = Subject(
        source_name="x",
        precision="fp32",
        files_sha256="0",
        target="cpu",
        library="y",
        num_threads=1,
        cpu="z",
        num_cores=1,
        gpu=None,
    )
    found = [*one("ar", False, 1), *one("draft", False, 2), *one("draft", True, 3)]
    return Timings(
        trimode_version="0",
        command="c",
        date="d",
        system="s",
        subject=subject,
        forwards=(*found, *one("verify", False, 1)),
    )


@pytest.mark.parametrize(("use_drafter", "factor"), [(False, 2), (True, 3)])
def test_the_table_of_bench_is_read_with_or_without_the_drafter(
    use_drafter: bool, factor: float
) -> None:
    found = CostTable.from_timings(timings(), use_drafter=use_drafter)
    assert found.lengths == (8,)
    assert found.ms("ar", 8, 1, 512) == pytest.approx(device_ms(8, 1, 512))
    assert found.ms("draft", 8, 8, 64) == pytest.approx(factor * device_ms(8, 8, 64))


def learn(
    found: CostTable, graph_name: GraphName, forward: tuple[int, int, int], ms: float
) -> None:
    """As many forwards as are needed for one to be learned from."""
    for _ in range(LEARNED_FORWARDS):
        found.observe(graph_name, *forward, ms)


def test_it_learns_what_a_cell_takes_and_not_what_others_do() -> None:
    found = table()
    before = found.ms("draft", 1, 8, 64)
    for _ in range(200):
        learn(found, "ar", (8, 1, 512), 1.5 * device_ms(8, 1, 512))
        learn(found, "draft", (1, 8, 64), device_ms(1, 8, 64))
    assert found.ms("ar", 8, 1, 512) == pytest.approx(1.5 * device_ms(8, 1, 512), rel=0.05)
    assert found.ms("draft", 1, 8, 64) == pytest.approx(before, rel=0.05)


def test_a_machine_that_is_slow_in_all_is_slow_where_it_was_not_seen() -> None:
    """Else what does not run would look better than what does, and modes would swing."""
    found = table()
    for _ in range(200):
        learn(found, "ar", (8, 1, 512), 1.6 * device_ms(8, 1, 512))
    assert found.ms("verify", 8, 32, 512) / device_ms(8, 32, 512) == pytest.approx(1.6, rel=0.1)
    assert found.drift == pytest.approx(1.6, rel=0.1)


def test_what_a_probe_shows_of_drafts_goes_for_larger_ones_too() -> None:
    """While all is AR, a row that drafts now and then must be able to contradict the table."""
    found = table()
    for number in range(400):
        learn(found, "ar", (8, 1, 512), 2 * device_ms(8, 1, 512))
        if number % 10 == 0:
            learn(found, "draft", (1, 4, 512), device_ms(1, 4, 512))
    assert found.ms("draft", 8, 32, 512) < 1.15 * device_ms(8, 32, 512)
    assert found.ms("ar", 16, 1, 512) > 1.8 * device_ms(16, 1, 512)


def test_one_outlier_moves_little_and_nothing_goes_beyond_the_limits() -> None:
    found = table()
    learn(found, "ar", (8, 1, 512), 1e6)
    assert found.ms("ar", 8, 1, 512) <= 1.5 * device_ms(8, 1, 512)
    for _ in range(500):
        learn(found, "ar", (8, 1, 512), 1e6)
    assert found.ms("ar", 8, 1, 512) == pytest.approx(2 * device_ms(8, 1, 512), rel=0.02)
    for _ in range(500):
        learn(found, "ar", (8, 1, 512), 1e-6)
    assert found.ms("ar", 8, 1, 512) == pytest.approx(device_ms(8, 1, 512) / 2, rel=0.05)


def test_a_frozen_table_learns_nothing() -> None:
    found = table(is_frozen=True)
    for _ in range(50):
        learn(found, "ar", (8, 1, 512), 99.0)
    assert found.ms("ar", 8, 1, 512) == pytest.approx(device_ms(8, 1, 512))
    assert found.drift == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60))
def test_factors_stay_within_their_limits(ratios: list[float]) -> None:
    corrections = Corrections()
    for number, ratio in enumerate(ratios):
        corrections.observe(number % 2, number % 3, ratio)
        assert 0.5 <= corrections.factor(number % 2, number % 3) <= 2
        assert 0.5 <= corrections.common <= 2


# --- the rule for waiting


def test_rows_wait_for_others_where_that_saves_a_forward() -> None:
    """A forward of one row costs as much as one of eight, so a short prompt is waited for."""
    found = table()
    ready = ReadyRows("draft", 4, 8, 512)
    assert steps_to_wait(ready, ComingRows(4, 1, 4.3), found) == 1
    assert steps_to_wait(ready, ComingRows(4, 2, 8.6), found) == 2


def test_many_rows_do_not_wait_long_for_one() -> None:
    found = table()
    assert steps_to_wait(ReadyRows("draft", 63, 8, 512), ComingRows(1, 1, 60.0), found) == 0
    assert steps_to_wait(ReadyRows("draft", 4, 8, 512), ComingRows(0, 1, 1.0), found) == 0


def test_nobody_waits_longer_than_the_latency_target() -> None:
    found, ready = table(), ReadyRows("draft", 4, 8, 512)
    assert steps_to_wait(ready, ComingRows(4, 1, 4.3), found, most_ms=4.0) == 0


def test_the_shortest_forward_that_is_worth_it_runs_first() -> None:
    found, ready = table(), ReadyRows("draft", 4, 8, 512)
    long, short = (ComingRows(4, 1, found.ms("ar", 4, tokens, 0)) for tokens in (512, 8))
    endless = ComingRows(1, 1, found.ms("ar", 1, 512, 2048))
    assert first_to_run(ready, [long, short], found) == 1
    assert first_to_run(ready, [endless], found) is None
    assert first_to_run(ready, [], found) is None

"""Timing tables: what is measured, where it is kept, what mode auto reads from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Built

from trimode.errors import UsageError
from trimode.formats.files import replace_text
from trimode.runtime.auto import timings as module
from trimode.runtime.auto.timings import (
    ForwardTime,
    Timings,
    read_timings,
    save_timings,
    subject_of,
    table_path,
)
from trimode.runtime.measure import forwards as forward_timer
from trimode.runtime.measure.forwards import TimerSettings, check_settings, time_forwards


def forward(
    graph: Any, rows: int, past: int, ms: float, drafter: bool = False, batch: int = 1
) -> ForwardTime:
    return ForwardTime(
        graph=graph,
        rows=rows,
        past=past,
        batch=batch,
        drafter=drafter,
        num_runs=3,
        least_ms=ms,
        lower_quartile_ms=2 * ms,
        median_ms=3 * ms,
        upper_quartile_ms=9 * ms,
    )


def table(it: Built, *forwards: ForwardTime) -> Timings:
    subject = subject_of(it.model.bundle, it.model.target, 1)
    return Timings(
        trimode_version="0",
        command="by hand",
        date="today",
        system="none",
        subject=subject,
        forwards=forwards,
    )


class CountingSession:
    """The real session; notes what runs."""

    def __init__(self, session: Any) -> None:
        self._session, self.max_prefill_rows, self.runs = session, 16, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, graph_name: Any, cache: Any, ids: Any, past: int, scale: float = 0.0) -> Any:
        assert past + ids.shape[1] <= cache.capacity
        self.runs.append((graph_name, ids.shape[1], past, scale))
        return self._session.run(graph_name, cache, ids, past, scale)


@pytest.mark.parametrize("name", ["three_kv_heads", "plain"])  # with a drafter and without
def test_every_case_is_timed_equally_often(built: Callable[[str], Built], name: str) -> None:
    model = built(name).model
    session = CountingSession(model.session)
    settings = check_settings(TimerSettings((5, 9), (40, 300, 20), repeats=3), model.model, session)  # type: ignore[arg-type]
    rounds: list[int] = []
    times = time_forwards(session, model.model, settings, rounds.append)  # type: ignore[arg-type]
    drafters = (False, True) if model.model.has_drafter else (False,)
    expected = {("ar", rows, past, False) for rows in (1, 5, 9) for past in (20, 40, 300)}
    expected |= {("verify", rows, past, False) for rows in (5, 9) for past in (20, 40, 300)}
    expected |= {
        ("draft", rows, past, drafter)
        for rows in (5, 9)
        for past in (20, 40, 300)
        for drafter in drafters
    }
    assert {(t.graph, t.rows, t.past, t.drafter) for t in times} == expected
    assert len(times) == len(expected)
    assert rounds == [1, 1, 1]
    for one in times:
        twice = len(drafters) if one.graph == "verify" else 1
        assert one.num_runs == 6 * twice
        # a run to warm up in each round
        assert session.runs.count((one.graph, one.rows, one.past, float(one.drafter))) >= 9 * twice
        assert 0 < one.least_ms <= one.lower_quartile_ms <= one.median_ms <= one.upper_quartile_ms
    filled = [(rows, past) for graph_name, rows, past, _ in session.runs[:24] if graph_name == "ar"]
    assert (16, 0) in filled  # a cache is filled in chunks that the graph takes
    assert max(rows for _, rows, _, _ in session.runs) == 16


def test_batches_are_timed(built: Callable[[str], Built]) -> None:
    """Each case runs over as many texts, and reads as many cached tokens of each."""
    model, runs = built("three_kv_heads").model, []

    class Noting(CountingSession):
        def run_rows(
            self,
            graph_name: Any,
            cache: Any,
            rows: range,
            ids: Any,
            past: Any,
            length: Any,
            scale: float = 0.0,
        ) -> Any:
            assert past.tolist() == [past[0]] * len(rows) == [past[0]] * cache.num_rows
            assert length.tolist() == [ids.shape[1]] * len(rows)
            runs.append((graph_name, len(rows), ids.shape, int(past[0])))
            return self._session.run_rows(graph_name, cache, rows, ids, past, length, scale)

    session = Noting(model.session)
    settings = check_settings(TimerSettings((5,), (40, 20), (3,), repeats=2), model.model, session)  # type: ignore[arg-type]
    assert settings.batch == (1, 3)
    times = time_forwards(session, model.model, settings, lambda _: None)  # type: ignore[arg-type]
    cases = [("ar", 1), ("ar", 5), ("draft", 5), ("draft", 5), ("verify", 5)]
    assert sorted((t.graph, t.rows, t.past, t.batch) for t in times) == sorted(
        (*case, past, n) for case in cases for past in (20, 40) for n in (1, 3)
    )
    for graph, rows in cases:
        assert (graph, 3, (3, rows), 40) in runs
    for batch in (0, -1):
        with pytest.raises(UsageError, match="`batch`"):
            check_settings(TimerSettings(batch=(batch,)), model.model, model.session)


def test_slow_forwards_are_timed_less_often(
    built: Callable[[str], Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built("three_kv_heads").model
    settings = check_settings(TimerSettings((2,), (9,)), model.model, model.session)
    for patience, rounds in ((-1.0, 3), (1e9, 20)):
        monkeypatch.setattr(forward_timer, "PATIENCE_S", patience)
        advances: list[int] = []
        times = time_forwards(model.session, model.model, settings, advances.append)
        assert len(advances) == rounds
        assert {one.num_runs for one in times if one.graph == "ar"} == {2 * rounds}


def test_choices_are_checked_and_filled_in(built: Callable[[str], Built]) -> None:
    model = built("three_kv_heads").model
    usual = check_settings(TimerSettings(), model.model, model.session)
    assert usual.rows == (1, 4, 8, 12, 16, 24, 32)
    assert usual.past == (64, 512)  # the model takes 1024 tokens
    for settings in (
        TimerSettings(rows=(65,)),
        TimerSettings(rows=(0,)),
        TimerSettings(past=(0,)),
        TimerSettings(rows=(32,), past=(1000,)),
        TimerSettings(repeats=0),
        TimerSettings(rows=()),
        TimerSettings(past=()),
    ):
        with pytest.raises(UsageError):
            check_settings(settings, model.model, model.session)
    with pytest.raises(UsageError):
        check_settings(TimerSettings(rows=(8,)), model.model, _OnlyFives(model.session))  # type: ignore[arg-type]
    assert check_settings(TimerSettings(), model.model, _OnlyFives(model.session)).rows == (1,)  # type: ignore[arg-type]


class _OnlyFives(CountingSession):
    def check_block_length(self, block_length: int) -> None:
        if block_length != 5:
            raise UsageError("expected 5", "")


def test_costs_are_drafts_and_verifications(built: Callable[[str], Built]) -> None:
    it = built("three_kv_heads")
    times = [forward("ar", 1, past, past / 100) for past in (300, 100)] + [forward("ar", 8, 100, 9)]
    for past in (100, 300):
        times += [
            forward("draft", 8, past, past + 1),
            forward("draft", 8, past, past + 5, drafter=True),
            forward("verify", 8, past, 0.5),
        ]
    times += [forward("draft", 16, 100, 7), forward("verify", 16, 100, 7)]  # not at 300
    costs = table(it, *times).costs(use_drafter=False)
    assert (costs.past, costs.ar_ms, costs.draft_ms, costs.verify_ms) == (
        (100, 300),
        (1.0, 3.0),
        {8: (101.0, 301.0)},
        {8: (0.5, 0.5)},
    )
    assert table(it, *times).costs(use_drafter=True).draft_ms == {8: (105.0, 305.0)}
    times += [
        forward(one.graph, one.rows, one.past, 10 * one.least_ms, one.drafter, batch)
        for one in times
        for batch in (4,)
    ]
    # the next larger size, or the largest
    for batch, factor in ((1, 1.0), (2, 10.0), (4, 10.0), (9, 10.0)):
        assert table(it, *times).costs(use_drafter=False, batch=batch).ar_ms == (factor, 3 * factor)
    for lacking in (times[:3], times[3:6]):
        with pytest.raises(UsageError):
            table(it, *lacking).costs(use_drafter=False)


def test_a_table_is_found_again_by_what_it_depends_on(
    built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path))
    it, other = built("three_kv_heads"), built("plain")
    timings = table(it, forward("ar", 1, 5, 1.0))
    save_timings(timings, table_path(timings.subject))
    assert read_timings(table_path(subject_of(it.model.bundle, "cpu", 1))) == timings
    subjects = [subject_of(it.model.bundle, "cpu", threads) for threads in (None, 1, 2)]
    subjects += [
        subject_of(it.model.bundle, "portable", 1),
        subject_of(other.model.bundle, "cpu", 1),
    ]
    monkeypatch.setattr(module, "_cpu", lambda: "another")
    subjects.append(subject_of(it.model.bundle, "cpu", 1))
    assert len({subject.key for subject in subjects}) == len(subjects)
    renamed = replace(
        it.model.bundle,
        manifest=it.model.bundle.manifest.model_copy(update={"trimode_version": "9"}),
    )
    assert subject_of(renamed, "cpu", 1).key == subjects[-1].key  # of what runs, nothing differs


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema_version": 99}', '{"schema_version": 1, "forwards": []}']
)
def test_a_file_that_is_no_table(tmp_path: Path, content: str) -> None:
    path = tmp_path / "timings.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"timings\.json"):
        read_timings(path)
    with pytest.raises(UsageError, match="nowhere"):
        read_timings(tmp_path / "nowhere.json")


def test_a_table_is_written_whole_or_not_at_all(
    built: Callable[[str], Built], tmp_path: Path
) -> None:
    timings = table(built("plain"), forward("ar", 1, 5, 1.0))
    path = tmp_path / "new" / "timings.json"
    save_timings(timings, path)
    before = path.read_text()
    assert json.loads(before)["subject"]["source_name"] == "checkpoint"
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "so far, and no further: \ud800")
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["timings.json"]

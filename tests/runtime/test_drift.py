"""The alarm of a table of timings that no longer says what forwards take."""

from __future__ import annotations

import logging

import pytest

from trimode.runtime.auto.prior import AcceptanceHistory
from trimode.runtime.engine.load.cost_table import LEARNED_FORWARDS, Cell, CostTable
from trimode.runtime.engine.load.drift import DriftAlarm
from trimode.runtime.engine.load.policy import LoadPolicy
from trimode.runtime.engine.load.rows import Pools
from trimode.runtime.engine.load.setup import LoadModes


class Engine:
    """Forwards that take so many times as long as the table says, on a clock of their own."""

    def __init__(self, *, is_frozen: bool) -> None:
        self.now = 0.0
        table = CostTable({"ar": [Cell(1, 1, 0, 10.0), Cell(2, 1, 0, 10.0)]}, is_frozen=is_frozen)
        pools = Pools(AcceptanceHistory(), 8)
        alarm = DriftAlarm(lambda: self.now)
        self.modes = LoadModes(LoadPolicy(table), table, pools, alarm)

    def run(self, seconds: float, ratio: float) -> int:
        """Forwards for a while; the warnings so far."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.01 * ratio
            self.modes.observe("ar", 1, 1, 0, 10.0 * ratio)
        return self.modes.alarm.count


@pytest.mark.parametrize("is_frozen", [False, True])
def test_one_warning_after_a_minute_also_where_the_table_learns(
    is_frozen: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(is_frozen=is_frozen)
    with caplog.at_level(logging.WARNING):
        assert engine.run(100, 1.45) == 0
        assert engine.run(50, 1.8) == 0
        assert engine.run(20, 1.8) == 1
        assert engine.run(300, 1.8) == 1
    (record,) = caplog.records
    assert "1.8 times" in record.message
    assert "trimode bench" in record.message


def test_it_warns_again_after_all_was_well() -> None:
    engine = Engine(is_frozen=True)
    assert engine.run(80, 2.5) == 1
    assert engine.run(30, 1.4) == 1
    assert engine.run(200, 1.6) == 1, "it has been above what counts as well all the time"
    assert engine.run(30, 1.0) == 1
    assert engine.run(80, 1.6) == 2


def test_seconds_of_slowness_now_and_then_are_no_alarm() -> None:
    engine = Engine(is_frozen=True)
    for _ in range(20):
        engine.run(30, 2.0)
        assert engine.run(30, 1.0) == 0


def test_an_idle_engine_does_not_count() -> None:
    """Two slow forwards a quarter of an hour apart show no slow quarter of an hour."""
    engine = Engine(is_frozen=True)
    for _ in range(10):
        assert engine.run(LEARNED_FORWARDS * 0.02, 2.0) == 0
        engine.now += 900

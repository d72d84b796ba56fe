"""Rows that wait for others: fewer forwards, the same texts, and nobody is kept long."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine_driver import Driver
from fake_session import BLOCK, FakeSession

from trimode.runtime.engine.detours import next_kind
from trimode.runtime.engine.grouping import PATIENCE
from trimode.runtime.engine.load.cost_table import Cell, CostTable
from trimode.runtime.engine.row import EngineRow
from trimode.runtime.engine.turns import StepPlan, Turns


def table(per_token: float) -> CostTable:
    """Ten milliseconds a forward, and ``per_token`` for each of its tokens."""
    cells = [
        Cell(rows, tokens, 0, 10.0 + per_token * rows * tokens)
        for rows in (1, 2, 4, 8)
        for tokens in (1, BLOCK, 32, 128)
    ]
    return CostTable({"ar": cells, "draft": cells, "verify": cells}, is_frozen=True)


def load(driver: Driver, seed: int, modes: tuple[str, ...] = ("linear_spec",)) -> None:
    """Twenty texts that come while others run."""
    rng = random.Random(seed)
    for _ in range(20):
        ids = [rng.randrange(1, 127) for _ in range(rng.choice((5, 20, 60, 100)))]
        driver.submit(ids, rng.choice(modes), max_new_tokens=rng.randint(5, 60), threshold=0.0)
        for _ in range(rng.choice((0, 0, 1, 7))):
            driver.turn()
    driver.run()
    driver.check_texts()


def forwards(driver: Driver) -> int:
    return sum(driver.core.counts.forwards.values())


def made(costs: CostTable | None, target_s: float = 1.0) -> Driver:
    return Driver(table=costs, latency_target_s=target_s, max_rows=8, kv_bytes=0)


class FlatSession(FakeSession):
    """A session whose forwards all take ten milliseconds, over caches of one size."""

    def capacity_for(self, length: int) -> int:
        return max(128, super().capacity_for(length))

    def run_rows(self, *forward: Any) -> Any:
        start, found = self.now, super().run_rows(*forward)
        self.now = start + 0.01
        return found


def queued(costs: CostTable | None, seed: int) -> Driver:
    """An engine that has answered 32 short texts, eight at a time."""
    rng = random.Random(seed)
    driver = Driver(FlatSession(), table=costs, latency_target_s=1.0, max_rows=8, kv_bytes=0)
    for _ in range(32):
        ids = [rng.randrange(1, 127) for _ in range(rng.randint(10, 58))]
        driver.submit(ids, "linear_spec", max_new_tokens=rng.randint(5, 20), threshold=0.0)
    driver.run()
    driver.check_texts()
    return driver


def test_less_time_where_a_joint_forward_costs_as_much_as_one() -> None:
    waiting = [queued(table(0.0), seed) for seed in range(6)]
    usual = [queued(None, seed) for seed in range(6)]
    for one, other in zip(waiting, usual, strict=True):
        assert one.core.num_detours > other.core.num_detours == 0
        assert one.session.now <= other.session.now
    assert sum(map(forwards, waiting)) < 0.97 * sum(map(forwards, usual))


def test_nobody_waits_where_a_joint_forward_takes_as_long_as_two() -> None:
    driver = made(table(1000.0))
    load(driver, 0)
    assert driver.core.num_detours == 0


@pytest.mark.parametrize("target_s", [0.0, 0.021, 0.2])
def test_nobody_is_kept_longer_than_the_latency_target(
    target_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for more steps than a row waits otherwise, and those of its kind before it."""
    held, steps = [0.0], [0]
    planned = Turns.plan

    def plan(self: Turns, rows: Any) -> StepPlan | None:
        found = planned(self, rows)
        held.extend(row.held_ms for row in rows)
        steps.extend(row.group.num_steps - row.since for row in rows if not row.is_reading)
        return found

    monkeypatch.setattr(Turns, "plan", plan)
    driver = made(table(0.0), target_s)
    load(driver, 1, ("linear_spec", "ar", "auto", "diffusion"))
    assert max(held) <= 1000 * target_s
    assert bool(driver.core.num_detours) == (target_s > 0.02)
    kinds = 5  # draft, verify, AR, prompts, and parts of diffusion
    assert max(steps) <= PATIENCE + kinds


def test_what_comes_next_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward that was foretold is asked for, or the text has ended."""
    foretold: dict[int, tuple[str, int]] = {}
    right, wrong = [0], []
    advanced = EngineRow.advance

    def advance(self: EngineRow, outputs: Any = None) -> Any:
        expected = foretold.get(id(self)) if outputs is None else next_kind(self)
        chunk = advanced(self, outputs)
        if chunk is not None and expected is not None:  # the forward is asked for a turn later
            foretold[id(self)] = expected
            return chunk
        foretold.pop(id(self), None)
        if self.forward is not None and expected is not None:
            found = self.forward.graph_name, len(self.forward.token_ids)
            right[0] += found == expected
            if found != expected:
                wrong.append((found, expected))
        return chunk

    monkeypatch.setattr(EngineRow, "advance", advance)
    load(made(table(0.0)), 2, ("linear_spec", "ar"))
    assert right[0] > 200
    assert not wrong

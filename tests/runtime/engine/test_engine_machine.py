"""Any interleaving of what can happen to an engine: texts stay those of their cold single runs."""

from __future__ import annotations

import random
from typing import Any

from engine_driver import Driver
from fake_session import BLOCK, MASK
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trimode.runtime.engine import core
from trimode.runtime.engine.load.cost_table import Cell, CostTable
from trimode.runtime.engine.load.state import ModePlan, RowState

MODES = ("ar", "diffusion", "linear_spec", "auto")
STEMS = [
    [1, 2, 3],
    [(5 * i) % 120 for i in range(31)],
    [(5 * i) % 120 for i in range(64)],
    [9, MASK, 4, *[MASK] * BLOCK, 8],
    [(3 * i + 1) % 127 for i in range(140)],
]


class RestlessPolicy:
    """Changes its mind whenever it is asked."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def is_due(self, num_rows: int, now_ms: float) -> bool:
        return True

    def plan(self, rows: Any, now_ms: float, *, num_queued: int = 0) -> ModePlan:
        assert all(isinstance(row, RowState) and row.left >= 1 for row in rows)
        lengths = [1, 2, 4, BLOCK]
        own = {row.key: self._rng.choice(lengths) for row in rows}
        return ModePlan(self._rng.choice(lengths), own, "restless")


def flat_table() -> CostTable:
    """Every forward takes as long as any other, so rows wait for one another."""
    cells = [Cell(rows, tokens, 0, 1.0) for rows in (1, 8) for tokens in (1, 128)]
    return CostTable({"ar": cells, "draft": cells, "verify": cells})


class EngineMachine(RuleBasedStateMachine):
    """Moves of an engine; the driver checks the invariants after every turn."""

    def __init__(self) -> None:
        super().__init__()
        self.failing = 0

    @initialize(
        seed=st.integers(0, 1000),
        max_rows=st.sampled_from([1, 2, 3, 5]),
        kept=st.sampled_from([0, 60, 5000]),
        free_tokens=st.sampled_from([0, 8, 1000]),
        is_planned=st.booleans(),
        waits=st.booleans(),
    )
    def start(
        self,
        seed: int,
        max_rows: int,
        kept: int,
        free_tokens: int,
        is_planned: bool,
        waits: bool,
    ) -> None:
        self.rng = random.Random(seed)
        self.driver = Driver(
            max_rows=max_rows,
            kv_bytes=8 * kept,
            latency_target_s=self.rng.choice([1e-9, 1.0]),
            is_fair=self.rng.random() < 0.5,
            mode_policy=RestlessPolicy(self.rng) if is_planned else None,
            table=flat_table() if waits else None,
        )
        self.driver.session.free_tokens = free_tokens
        self.driver.session.on_use = self.use

    def use(self, what: str) -> None:
        if self.failing:
            self.failing -= 1
            raise MemoryError(what)

    @rule(
        stem=st.sampled_from(STEMS),
        cut=st.integers(1, 200),
        turn=st.lists(st.integers(0, 126), max_size=12),
        mode=st.sampled_from(MODES),
        salt=st.sampled_from(["", "a"]),
        n=st.sampled_from([1, 1, 3]),
    )
    def submit(
        self, stem: list[int], cut: int, turn: list[int], mode: str, salt: str, n: int
    ) -> None:
        ids = [*stem[:cut], *turn]
        options = options_of(self.rng, mode)
        for number in range(n):
            if "seed" in options:
                options = {**options, "seed": options["seed"] + number}
            self.driver.submit(
                ids,
                mode,
                salt=salt,
                priority=self.rng.randint(0, 2),
                fair_key=self.rng.choice("xy"),
                system_length=self.rng.randint(0, len(ids)),
                **options,
            )

    @rule(count=st.integers(1, 30))
    def turn(self, count: int) -> None:
        for _ in range(count):
            self.driver.turn()

    @precondition(lambda self: self.driver.asked)
    @rule(which=st.integers(0, 10_000))
    def go_on(self, which: int) -> None:
        """A further turn of a conversation, in another mode; or a fork of a text at work."""
        one = self.driver.asked[which % len(self.driver.asked)]
        ids = [*one.request.ids, *one.handle.token_ids, 5]
        if len(ids) < 200:
            mode = self.rng.choice(MODES)
            salt = one.request.namespace[1]  # type: ignore[index]
            self.driver.submit(ids, mode, salt=salt, **options_of(self.rng, mode))

    @precondition(lambda self: self.driver.asked)
    @rule(which=st.integers(0, 10_000))
    def cancel(self, which: int) -> None:
        self.driver.asked[which % len(self.driver.asked)].handle.cancel()

    @rule(which=st.integers(0, 10_000))
    def run_out(self, which: int) -> None:
        """A text whose time is up."""
        self.driver.submit([1, 2, 3, which % 100], timeout_s=0.0)

    @rule(times=st.integers(1, core.MOST_ATTEMPTS - 1))
    def fail(self, times: int) -> None:
        self.failing = times

    @rule()
    def scribble(self) -> None:
        self.driver.scribble()

    @invariant()
    def checks(self) -> None:
        if hasattr(self, "driver"):
            self.driver.check()

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.failing = 0
        self.driver.run()
        assert self.driver.core.error is None
        assert not self.driver.core.rows
        assert all(row is None for group in self.driver.core.groups for row in group.rows)
        self.driver.check_texts()


def options_of(rng: random.Random, mode: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {"max_new_tokens": rng.randint(1, 40)}
    if mode != "ar":
        chosen["block_length"] = rng.choice([2, BLOCK])
    if mode != "auto" and rng.random() < 0.4:
        chosen |= {"temperature": 1.0, "seed": rng.randint(0, 9)}
    if rng.random() < 0.3:
        chosen["eos_token_ids"] = tuple(rng.sample(range(127), 20))
    return chosen


def run_machine(examples: int, steps: int = 25) -> None:
    case = EngineMachine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    case().runTest()


def test_any_interleaving() -> None:
    run_machine(40)

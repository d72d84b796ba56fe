"""Modes by load in the engine itself: whatever the plan, the tokens are those of single runs."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimode import Engine, TriModeModel
from trimode.runtime.auto.timings import ForwardTime, Subject, Timings
from trimode.runtime.engine.load.policy import LoadPolicy
from trimode.runtime.engine.load.rows import RowPolicy
from trimode.runtime.engine.load.setup import load_modes
from trimode.runtime.engine.load.state import ModePlan, RowState

QUESTIONS = ("Add 478 and 356.", "Count from 3 to 40.", "Spell the word lantern.", "Sort 9 4 7 1.")


def timings_of(ms: Callable[[str, int, int], float], batches: Sequence[int]) -> Timings:
    """A table whose forwards take ``ms(graph, rows, tokens)``."""

    def one(graph: Any, batch: int, tokens: int, past: int) -> ForwardTime:
        least = ms(graph, batch, tokens)
        return ForwardTime(
            graph=graph,
            rows=tokens,
            past=past,
            batch=batch,
            num_runs=3,
            drafter=graph == "draft",
            least_ms=least,
            lower_quartile_ms=least,
            median_ms=least,
            upper_quartile_ms=least,
        )

    kinds = [("ar", 1), *itertools.product(("ar", "draft", "verify"), (4, 8, 16, 32))]
    subject = Subject(
        source_name="nld-tiny",
        precision="fp32",
        files_sha256="0",
        target="portable",
        library="none",
        num_threads=1,
        cpu="none",
        num_cores=1,
        gpu=None,
    )
    forwards = tuple(
        one(graph, batch, tokens, past)
        for (graph, tokens), batch, past in itertools.product(kinds, batches, (64, 512))
    )
    return Timings(
        trimode_version="0", command="", date="", system="", subject=subject, forwards=forwards
    )


def crowded(graph: str, batch: int, tokens: int) -> float:
    """One row may draft for nothing; with more of them each token has its price."""
    return 1.0 + (0.0 if batch == 1 else 0.5) * batch * tokens


@pytest.fixture(scope="module")
def opened(demo: Path) -> Iterator[TriModeModel]:
    with TriModeModel.from_pretrained(demo, num_threads=1, target="portable") as model:
        yield model


def with_timings(model: TriModeModel, timings: Timings) -> TriModeModel:
    return TriModeModel(model.bundle, model.session, model.target, 1, timings)


@pytest.fixture(scope="module")
def model(opened: TriModeModel) -> TriModeModel:
    return with_timings(opened, timings_of(crowded, (1, 2, 4, 8)))


@pytest.fixture(scope="module")
def prompts(opened: TriModeModel) -> list[list[int]]:
    return [opened.codec.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS]


@pytest.fixture(scope="module")
def expected(opened: TriModeModel, prompts: list[list[int]]) -> list[list[int]]:
    return [opened.stream([ids], "ar", max_new_tokens=48).finish().token_ids for ids in prompts]


class RestlessPolicy:
    """Another plan at every step, in parts another one for each row."""

    def __init__(self, seed: int) -> None:
        self._random, self.num_plans = random.Random(seed), 0

    def is_due(self, num_rows: int, now_ms: float) -> bool:
        return True

    def plan(self, rows: Sequence[RowState], now_ms: float, *, num_queued: int = 0) -> ModePlan:
        self.num_plans += 1
        some = self._random.sample(rows, len(rows) // 2)
        lengths = {row.key: self._random.choice((1, 4, 16)) for row in some}
        return ModePlan(self._random.choice((1, 4, 8, 16, 32)), lengths, "restless")


@pytest.mark.parametrize("seed", range(3))
def test_greedy_tokens_do_not_depend_on_the_plan(
    model: TriModeModel, prompts: list[list[int]], expected: list[list[int]], seed: int
) -> None:
    policy = RestlessPolicy(seed)
    with Engine(model, max_rows=3, mode_policy=policy) as engine:
        handles = [engine.submit(ids, max_new_tokens=48) for ids in prompts]
        found = [handle.result() for handle in handles]
        num_switches = len(engine.stats().mode_switches)
    assert [result.token_ids for result in found] == expected
    assert policy.num_plans > 10
    assert num_switches > 3
    picks: dict[int, int] = {}
    for result in found:
        for length, count in (result.picks or {}).items():
            picks[length] = picks.get(length, 0) + count
    assert len(picks) >= 4, "the rows have followed"


def test_load_decides_and_says_so(
    model: TriModeModel, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """The table says: alone with blocks, together in AR."""
    with Engine(model, max_rows=4) as engine:
        alone = engine.submit(prompts[1], max_new_tokens=48).result()
        handles = [engine.submit(ids, max_new_tokens=48) for ids in prompts * 6]
        together = [handle.result() for handle in handles]
        switches = engine.stats().mode_switches
    assert alone.token_ids == expected[1]
    assert [result.token_ids for result in together] == expected * 6
    assert set(alone.picks or {}) == {32}
    last = together[-5].picks or {}
    assert set(last) == {1}, last
    changed = [switch for switch in switches if switch.reason != "start"]
    assert (32, 1) in [(switch.before, switch.after) for switch in changed]
    assert all(switch.predicted_gain >= 0.05 for switch in changed)


@pytest.mark.parametrize("mode", ["auto", "linear_spec", "ar", "diffusion"])
def test_a_seed_or_a_mode_that_was_asked_for_is_kept(
    model: TriModeModel, prompts: list[list[int]], mode: Any
) -> None:
    chosen: dict[str, Any] = {"max_new_tokens": 32}
    if mode == "auto":
        chosen |= {"seed": 5, "temperature": 1.0}
    expected = model.stream([prompts[0]], mode, **chosen).finish()
    with Engine(model, max_rows=3, mode_policy=RestlessPolicy(1)) as engine:
        others = [engine.submit(ids, max_new_tokens=48) for ids in prompts[1:3]]
        found = engine.submit(prompts[0], mode=mode, **chosen).result()
        for other in others:
            other.result()
    assert (found.token_ids, found.seed) == (expected.token_ids, expected.seed)
    assert mode == "auto" or not found.picks


def parts_of(engine: Engine) -> LoadPolicy:
    policy = engine._core.settings.mode_policy
    assert isinstance(policy, LoadPolicy)
    return policy


@pytest.mark.parametrize("freeze_timings", [False, True])
def test_the_table_learns_unless_it_is_frozen(
    model: TriModeModel, prompts: list[list[int]], freeze_timings: bool
) -> None:
    with Engine(model, max_rows=2, freeze_timings=freeze_timings) as engine:
        engine.submit(prompts[1], max_new_tokens=32).result()
        drift = parts_of(engine)._table.drift
    assert (drift == 1) == freeze_timings


def test_rows_follow_the_plan_with_their_own_estimates(
    model: TriModeModel, prompts: list[list[int]]
) -> None:
    with Engine(model, max_rows=1) as engine:
        before = sum(row_of(engine, prompts[1]).likely)
        for ids in prompts * 3:
            engine.submit(ids, max_new_tokens=48).result()
        after = sum(row_of(engine, prompts[1]).likely)
    assert after != before


def row_of(engine: Engine, prompt: list[int]) -> RowPolicy:
    row = engine._core.settings.make_row_policy(prompt, lambda: 1)
    assert isinstance(row, RowPolicy)
    return row


def test_without_timings_of_batches_each_text_has_its_own_policy(
    opened: TriModeModel, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    timings = timings_of(crowded, (1,))
    with caplog.at_level(logging.WARNING, "trimode.runtime"):
        assert load_modes(timings, use_drafter=True) is None
    assert "trimode bench BUNDLE --batch" in caplog.text
    with Engine(with_timings(opened, timings), max_rows=2) as engine:
        assert engine._core.settings.mode_policy is None
        engine.submit(prompts[0], max_new_tokens=8).result()


@pytest.mark.parametrize("chosen", [{"by_load": False}, {"mode": "ar"}])
def test_it_can_be_left_out(model: TriModeModel, chosen: dict[str, Any]) -> None:
    with Engine(model, max_rows=2, **chosen) as engine:
        assert engine._core.settings.mode_policy is None


def test_lengths_are_those_that_the_graphs_take() -> None:
    timings = timings_of(crowded, (1, 2))
    modes = load_modes(timings, use_drafter=True, takes_length=lambda length: length == 8)
    assert modes is not None
    rows = [RowState(1, "auto", 64, 99, tuple(0.99**k for k in range(32)))]
    assert modes.policy.plan(rows, 0.0).block_length == 8
    assert modes.row([1, 2], lambda: 8).choose(0, 9) == 8
    assert np.isclose(modes.table.ms("verify", 2, 8, 64), crowded("verify", 2, 8))

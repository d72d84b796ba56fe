"""Modes by load in a simulated engine: as good as the best fixed plan, and calm.

The times are not measured here. They come from published figures of a B200, from rooflines, and
from one table that `trimode bench` wrote on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.simulator.arrivals import (
    Clients,
    Source,
    bursts,
    closed_loop,
    open_loop,
    ramp,
    sawtooth,
    steady,
)
from benchmarks.simulator.engine import Outcome, Simulator
from benchmarks.simulator.machines import (
    B200_AR,
    B200_SPECULATION,
    MACHINES,
    ROWS,
    b200,
    b200_cells,
    machine,
)
from benchmarks.simulator.texts import HARD, REASONING, SPEED_BENCH, Profile, mean_cycle
from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.engine.load.cost_table import Cell, CostTable
from trimode.runtime.engine.load.policy import LoadPolicy, LoadSettings
from trimode.runtime.engine.load.state import FixedModePolicy, ModePolicy

LEAST_SHARE = 0.95
"""Of the throughput of the best fixed plan."""
MOST_SWITCHES_A_MINUTE = 30
"""Where nothing changes but what the texts show."""
NO_HYSTERESIS = LoadSettings(least_gain=0, num_evaluations=1, dwell_cycles=1, least_interval_ms=0)
PUBLISHED_CYCLES = {4: 3.67, 8: 6.36, 16: 10.22, 32: 15.50}


def live(cells_of: Callable[[int], float] = lambda _: 1.0) -> CostTable:
    """The B200's table as an engine would have it, each block length's times off by a factor."""
    ar = [Cell(n, 1, 1024, 1e3 * n / speed) for n, speed in zip(ROWS, B200_AR, strict=True)]
    ar = [cell._replace(ms=cell.ms * cells_of(1)) for cell in ar]
    blocks = [
        cell._replace(ms=cell.ms * cells_of(cell.tokens)) for cell in b200_cells((4, 8, 16, 32))
    ]
    prompts = b200_cells((128, 512))
    return CostTable({"ar": [*ar, *prompts], "draft": blocks, "verify": blocks})


def run(
    policy: ModePolicy,
    clients: Clients,
    until_ms: float,
    source: Source,
    table: CostTable | None = None,
    **facts: object,
) -> Outcome:
    truth = b200()
    simulator = Simulator(truth, policy, table or truth, **facts)  # type: ignore[arg-type]
    return closed_loop(simulator, source, clients, until_ms)


def share_of_best(clients: Clients, until_ms: float, source: Source) -> tuple[float, LoadPolicy]:
    """Throughput over that of the best fixed plan, and the policy that reached it."""
    fixed = [
        run(FixedModePolicy(length), clients, until_ms, source).tokens_per_s
        for length in (AR_STEP, 4, 8, 16, 32)
    ]
    policy = LoadPolicy(b200())
    return run(policy, clients, until_ms, source).tokens_per_s / max(fixed), policy


# --- what the simulation stands on


@pytest.mark.parametrize("length", PUBLISHED_CYCLES)
def test_texts_are_as_published(length: int) -> None:
    assert mean_cycle(REASONING, length) == pytest.approx(PUBLISHED_CYCLES[length], rel=0.06)


@pytest.mark.parametrize(("length", "tokens"), [(32, 6.72), (64, 6.88)])
def test_mixed_questions_are_as_published(length: int, tokens: float) -> None:
    assert mean_cycle(SPEED_BENCH, length) == pytest.approx(tokens, rel=0.06)


def test_the_table_gives_the_published_throughput_back() -> None:
    table = b200()
    for rows, ar, speculation in zip(ROWS, B200_AR, B200_SPECULATION[32], strict=True):
        assert 1e3 * rows / table.ms("ar", rows, 1, 1024) == pytest.approx(ar, rel=0.01)
        cycle_ms = table.ms("draft", rows, 32, 1024) + table.ms("verify", rows, 32, 1024)
        assert 1e3 * rows * 6.72 / cycle_ms == pytest.approx(speculation, rel=0.03)


def test_simulated_speculation_is_as_fast_as_published() -> None:
    """End to end, prompts and ragged batches included; published at 1 and 128 requests."""
    source = Source(SPEED_BENCH, tokens=(600, 1000))
    for rows, seconds, published in ((1, 60, 440), (128, 5, 4230)):
        outcome = run(FixedModePolicy(32), steady(rows), 1e3 * seconds, source)
        assert outcome.tokens_per_s == pytest.approx(published, rel=0.12)


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_has_a_table_that_grows_with_the_load(name: str) -> None:
    table = machine(name)
    assert table.lengths == (4, 8, 16, 32)
    times = [table.ms("verify", rows, 32, 512) for rows in (1, 4, 16, 64)]
    assert times == sorted(times)
    assert table.ms("ar", 64, 1, 512) < table.ms("ar", 64, 512, 512)


# --- as good as the best fixed plan


@pytest.mark.parametrize("rows", ROWS)
def test_steady_load(rows: int) -> None:
    source = Source(SPEED_BENCH, tokens=(200, 400))
    share, policy = share_of_best(steady(rows), 6000 if rows < 64 else 5000, source)
    assert share >= LEAST_SHARE
    assert len(policy.switches) <= 4


@pytest.mark.parametrize(
    ("profile", "rows"), [(REASONING, 2), (REASONING, 64), (HARD, 1), (HARD, 48)]
)
def test_steady_load_of_other_texts(profile: Profile, rows: int) -> None:
    share, policy = share_of_best(steady(rows), 6000, Source(profile, tokens=(200, 400)))
    assert share >= LEAST_SHARE
    assert len(policy.switches) <= 4


@pytest.mark.parametrize(
    ("clients", "most_switches"),
    [(ramp(128, 12_000), 12), (bursts(4, 96, 6000), 10), (sawtooth(128, 6000), 12)],
    ids=["ramp", "bursts", "sawtooth"],
)
def test_load_that_changes(clients: Clients, most_switches: int) -> None:
    share, policy = share_of_best(clients, 12_000, Source(SPEED_BENCH, tokens=(100, 300)))
    assert share >= LEAST_SHARE
    assert len(policy.switches) <= most_switches
    assert {switch.reason for switch in policy.switches} & {"more rows", "fewer rows"}


def test_requests_that_come_at_random_are_answered_as_soon() -> None:
    source = Source(SPEED_BENCH, tokens=(100, 300))

    def latency_ms(policy: ModePolicy) -> float:
        simulator = Simulator(b200(), policy, b200())
        rate = lambda at: 24.0 if 2000 < at < 4000 else 4.0  # noqa: E731
        return open_loop(simulator, source, rate, 6000).latency_ms(50)

    best = min(latency_ms(FixedModePolicy(length)) for length in (AR_STEP, 8, 16, 32))
    assert latency_ms(LoadPolicy(b200())) <= best / LEAST_SHARE


# --- the crossover


def settled(name: str, rows: int, lengths: tuple[int, ...] | None = None) -> int:
    table = machine(name)
    policy = LoadPolicy(table, lengths=lengths)
    simulator = Simulator(table, policy, table)
    closed_loop(simulator, Source(SPEED_BENCH, tokens=(300, 700)), steady(rows), 4000)
    return policy.plan([], 0).block_length


@pytest.mark.parametrize(
    ("name", "speculates", "is_ar"), [("b200 bf16", 8, 32), ("gb200 fp8", 32, 128)]
)
def test_with_one_block_length_ar_wins_from_16_to_64_rows_on(
    name: str, speculates: int, is_ar: int
) -> None:
    """Published for length 32: between 16 and 32 requests on a B200, near 64 on a GB200."""
    assert settled(name, speculates, (32,)) == 32
    assert settled(name, is_ar, (32,)) == AR_STEP


def test_with_shorter_blocks_speculation_lasts_longer() -> None:
    chosen = [settled("b200 bf16", rows) for rows in (1, 32, 128)]
    assert chosen == sorted(chosen, reverse=True)
    assert (chosen[0], chosen[-1]) == (32, AR_STEP)
    assert chosen[1] in (8, 16)


# --- calm


def check_calm(settings: LoadSettings, rows: int, seconds: float = 10) -> None:
    """Few switches where the load is steady, forwards vary by a tenth, and the table learns."""
    table = live()
    policy = LoadPolicy(table, settings)
    source = Source(SPEED_BENCH, tokens=(200, 400))
    run(policy, steady(rows), 1e3 * seconds, source, table, noise=0.1)
    assert len(policy.switches) <= MOST_SWITCHES_A_MINUTE * seconds / 60


@pytest.mark.parametrize("rows", [2, 16, 64])
def test_modes_do_not_swing(rows: int) -> None:
    check_calm(LoadSettings(), rows)


@pytest.mark.parametrize("rows", [2, 16, 64])
def test_without_hysteresis_they_would(rows: int) -> None:
    with pytest.raises(AssertionError):
        check_calm(NO_HYSTERESIS, rows, seconds=4)


@pytest.mark.parametrize(
    "settings",
    [
        LoadSettings(num_evaluations=1, dwell_cycles=1, least_interval_ms=0),
        LoadSettings(least_gain=0),
    ],
    ids=["gain alone", "evaluations alone"],
)
def test_both_halves_of_the_hysteresis_are_needed(settings: LoadSettings) -> None:
    with pytest.raises(AssertionError):
        check_calm(settings, 2)


def test_a_machine_that_slows_down_in_all_changes_no_mode() -> None:
    table = live()
    policy = LoadPolicy(table)
    slow = lambda at: 1.7 if at > 3000 else 1.0  # noqa: E731
    source = Source(REASONING, tokens=(200, 400))
    run(policy, steady(8), 8000, source, table, slowdown=slow)
    assert not [switch for switch in policy.switches if switch.at_ms > 3000]


# --- learning


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_table_that_is_wrong_is_learned(is_frozen: bool) -> None:
    """It says that AR takes 60% of its time: then AR seems best, and is not."""
    source = Source(SPEED_BENCH, tokens=(200, 400))
    best = run(FixedModePolicy(16), steady(16), 10_000, source).tokens_per_s
    table = live(lambda tokens: 0.6 if tokens == 1 else 1.0)
    table.is_frozen = is_frozen
    found = run(LoadPolicy(table), steady(16), 10_000, source, table).tokens_per_s
    assert (found >= 0.9 * best) == (not is_frozen)


# --- waiting


def test_rows_that_wait_for_prompts_give_them_their_first_token_sooner() -> None:
    source = Source(REASONING, prompt_length=60, tokens=(20, 80))

    def found(waits: bool) -> tuple[float, float]:
        policy = FixedModePolicy(32)
        outcome = run(policy, steady(8), 4000, source, max_rows=8, waits=waits)
        first = [one.first_ms - one.at_ms for one in outcome.finished]
        return sum(first) / len(first), outcome.tokens_per_s

    (waiting_ms, waiting_speed), (usual_ms, usual_speed) = found(True), found(False)
    assert waiting_ms < 0.6 * usual_ms
    assert waiting_speed > 0.97 * usual_speed

"""Modes by load against every fixed plan, in a simulated engine.

    python -m benchmarks.load_simulator [--seconds 10] [--machines NAME,...]

Nothing is measured but on the CPU's own table: times are the machine's table
(`benchmarks.simulator.machines`), texts are drawn (`benchmarks.simulator.texts`). The policy, the
estimates of acceptance, the grouping and the rule for waiting are the runtime's. Writes
`results/load_simulator.json` and a picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks.common import RESULTS, arguments_of, save
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
from benchmarks.simulator.machines import LENGTHS, MACHINES, ROWS, machine
from benchmarks.simulator.texts import PROFILES
from trimode.report.quantization_figure import load_matplotlib
from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.engine.load.candidates import name_of
from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.load.policy import LoadPolicy, LoadSettings
from trimode.runtime.engine.load.state import FixedModePolicy, ModePolicy

NO_HYSTERESIS = LoadSettings(least_gain=0, num_evaluations=1, dwell_cycles=1, least_interval_ms=0)
FIXED = (AR_STEP, *LENGTHS)
TOKENS = (300, 700)
Run = Callable[[ModePolicy], Outcome]


def steady_runs(table: CostTable, profile: str, rows: int, seconds: float) -> Run:
    source = Source(PROFILES[profile], tokens=TOKENS)
    return lambda policy: closed_loop(
        Simulator(table, policy, table), source, steady(rows), 1e3 * seconds
    )


def changing_runs(table: CostTable, profile: str, clients: Clients, seconds: float) -> Run:
    source = Source(PROFILES[profile], tokens=(100, 300))
    return lambda policy: closed_loop(
        Simulator(table, policy, table), source, clients, 1e3 * seconds
    )


def compare(run: Run, table: CostTable) -> dict[str, Any]:
    """Tokens a second of every fixed plan and of the policy, and what the policy did."""
    fixed = {name_of(n): run(FixedModePolicy(n)).tokens_per_s for n in FIXED}
    policy = LoadPolicy(table)
    outcome = run(policy)
    best = max(fixed, key=lambda name: fixed[name])
    return {
        "fixed_tokens_per_s": fixed,
        "load_tokens_per_s": outcome.tokens_per_s,
        "best_fixed": best,
        "share_of_best_fixed": outcome.tokens_per_s / fixed[best],
        "rows_per_forward": outcome.rows_per_forward,
        "switches": [switch._asdict() for switch in policy.switches],
        "plans": outcome.plans,
        "last_plan": outcome.plans[-1][1] if outcome.plans else None,
    }


def steady_table(names: tuple[str, ...], seconds: float) -> list[dict[str, Any]]:
    """Machine, kind of text and number of requests, all in turn."""
    found = []
    for name in names:
        for profile in PROFILES if name == "b200 bf16" else ("speed-bench",):
            for rows in ROWS:
                table = machine(name)
                one = compare(steady_runs(table, profile, rows, seconds), table)
                found.append({"machine": name, "texts": profile, "rows": rows, **one})
                show(found[-1])
    return found


def show(one: dict[str, Any]) -> None:
    fixed = " ".join(f"{value:8.0f}" for value in one["fixed_tokens_per_s"].values())
    print(
        f"{one['machine']:18s} {one['texts']:12s} {one.get('rows', one.get('load'))!s:>9s} {fixed}"
        f" load {one['load_tokens_per_s']:8.0f} share {one['share_of_best_fixed']:.3f}"
        f" switches {len(one['switches'])}",
        flush=True,
    )


def changing_table(seconds: float) -> list[dict[str, Any]]:
    """A B200's load that rises and falls."""
    period = 1e3 * seconds
    loads = {
        "ramp": ramp(128, period),
        "bursts": bursts(4, 96, period / 3),
        "sawtooth": sawtooth(128, period / 2),
    }
    found = []
    for profile in ("speed-bench", "reasoning"):
        for name, clients in loads.items():
            table = machine("b200 bf16")
            one = compare(changing_runs(table, profile, clients, 2 * seconds), table)
            found.append({"machine": "b200 bf16", "texts": profile, "load": name, **one})
            show(found[-1])
    return found


def latency_table(seconds: float) -> list[dict[str, Any]]:
    """Requests that come at random, four a second and in a burst forty."""
    source = Source(PROFILES["speed-bench"], tokens=(100, 300))
    found = []
    for name, policy in (
        *((name_of(n), FixedModePolicy(n)) for n in FIXED),
        ("by load", LoadPolicy(machine("b200 bf16"))),
    ):
        table = machine("b200 bf16")
        outcome = open_loop(
            Simulator(table, policy, table), source, burst_rate(seconds), 1e3 * seconds
        )
        times = {f"p{p}_ms": outcome.latency_ms(p) for p in (50, 95, 99)}
        found.append({"plan": name, **times, "tokens_per_s": outcome.tokens_per_s})
        print(name, {key: round(value) for key, value in times.items()}, flush=True)
    return found


def burst_rate(seconds: float) -> Callable[[float], float]:
    return lambda at: 40.0 if 0.3 < at / 1e3 / seconds < 0.6 else 4.0


def calm_table(seconds: float) -> list[dict[str, Any]]:
    """Switches at a steady load with and without hysteresis, forwards varying by a tenth."""
    found = []
    for rows in (2, 16, 64):
        counts = {}
        for name, settings in (("with", LoadSettings()), ("without", NO_HYSTERESIS)):
            table = machine("b200 bf16")
            table.is_frozen = False
            policy = LoadPolicy(table, settings)
            simulator = Simulator(machine("b200 bf16"), policy, table, noise=0.1)
            source = Source(PROFILES["speed-bench"], tokens=TOKENS)
            closed_loop(simulator, source, steady(rows), 1e3 * seconds)
            counts[name] = sum(policy.counts.values())
        found.append({"rows": rows, "seconds": seconds, "switches": counts})
        print("calm", found[-1], flush=True)
    return found


def draw(steady_rows: list[dict[str, Any]], changing: list[dict[str, Any]]) -> None:
    figure = load_matplotlib().Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, texts in zip((*panels[0], panels[1][0]), PROFILES, strict=True):
        own = [one for one in steady_rows if (one["machine"], one["texts"]) == ("b200 bf16", texts)]
        _draw_steady(axes, own, texts)
    _draw_ramp(panels[1][1], next(one for one in changing if one["load"] == "ramp"))
    figure.suptitle("Simulated: 8B, BF16, one B200 (times from published throughput)")
    path = RESULTS / "load_simulator.png"
    figure.savefig(path, dpi=120)
    print(f"picture: {path.name}")


def _draw_steady(axes: Any, own: list[dict[str, Any]], texts: str) -> None:
    rows = [one["rows"] for one in own]
    for style, name in zip(("o-", "v:", "^:", "s:", "D:"), map(name_of, FIXED), strict=True):
        speeds = [one["fixed_tokens_per_s"][name] for one in own]
        axes.plot(rows, speeds, style, label=name, markersize=4, linewidth=1)
    loaded = [one["load_tokens_per_s"] for one in own]
    axes.plot(rows, loaded, "k-", label="by load", linewidth=2.5, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="requests at a time", ylabel="tokens a second")
    axes.set_xticks(rows, [str(n) for n in rows])
    axes.set_title(f"texts: {texts}")
    axes.legend(fontsize=7)


def _draw_ramp(axes: Any, one: dict[str, Any]) -> None:
    end = max((at for at, _ in one["plans"]), default=1.0) * 1.02
    times = [at / 1e3 for at, _ in one["plans"]] + [end / 1e3]
    lengths = [length for _, length in one["plans"]]
    axes.step(times, [*lengths, lengths[-1]], "k", where="post", label="block length, 1 = AR")
    half = ramp(128, end / 2)
    grid = [end * step / 400 for step in range(401)]
    axes.plot([at / 1e3 for at in grid], [half(at) for at in grid], "C1:", label="requests")
    axes.set(yscale="log", xlabel="seconds", title="requests from 1 to 128 and back, twice")
    axes.set_yticks([1, 4, 8, 16, 32, 128], ["1", "4", "8", "16", "32", "128"])
    axes.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--machines", default=",".join(MACHINES))
    args = parser.parse_args()
    steady_rows = steady_table(tuple(args.machines.split(",")), args.seconds)
    changing = changing_table(args.seconds)
    latency, calm = latency_table(args.seconds), calm_table(args.seconds)
    save(
        "load_simulator",
        {
            "arguments": arguments_of(vars(args)),
            "simulated": True,
            "steady": steady_rows,
            "changing": changing,
            "random_arrivals": latency,
            "calm": calm,
            "least_share_of_best_fixed": min(
                one["share_of_best_fixed"] for one in (*steady_rows, *changing)
            ),
        },
    )
    draw(steady_rows, changing)


if __name__ == "__main__":
    main()

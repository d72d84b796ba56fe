"""Modes by load on this machine: what following a plan costs, and what the plan gives.

    python -m benchmarks.load_engine BUNDLE [--threads 1] [--rounds 9]

All ways take turns in one run, in an order that is drawn anew, and the least time of each counts,
since what else the machine does only ever adds. `cost`: mode `ar` beside mode `auto` by load under
a table that makes AR the best plan, evaluations and probes included. `speed`: the fixed modes,
`auto` by text and `auto` by load, with a table that is measured first. Every text is compared with
AR's.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import trimode
from benchmarks.auto_mode import encode
from benchmarks.common import arguments_of, save
from trimode import Engine, TriModeModel
from trimode.calib.demo.tasks import examples
from trimode.runtime.auto.timings import ForwardTime, Timings, subject_of
from trimode.runtime.measure.forwards import TimerSettings, check_settings, time_forwards

LENGTHS = (4, 8, 16, 32)
CONCURRENCY = (1, 4, 16)
MAX_NEW_TOKENS = 128
WARM_UP = 2
"""Rounds that do not count, in which estimates and tables settle."""
PROMPTS = 24
WAYS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    **{f"linear_spec {n}": {"mode": "linear_spec", "block_length": n} for n in LENGTHS},
    "auto by text": {"mode": "auto"},
    "auto by load": {"mode": "auto"},
}


def measured(model: TriModeModel, threads: int, repeats: int) -> Timings:
    settings = check_settings(
        TimerSettings((1, *LENGTHS), (64, 224), CONCURRENCY, repeats), model.model, model.session
    )
    forwards = time_forwards(model.session, model.model, settings, lambda _: None)
    return table_of(model, threads, forwards)


def table_of(model: TriModeModel, threads: int, forwards: tuple[ForwardTime, ...]) -> Timings:
    return Timings(
        trimode_version=trimode.__version__,
        command="benchmarks.load_engine",
        date=time.strftime("%Y-%m-%d"),
        system="",
        subject=subject_of(model.bundle, model.target, threads),
        forwards=forwards,
    )


def where_ar_wins(timings: Timings) -> tuple[ForwardTime, ...]:
    """The same forwards, drafts and verifications taking ten times as long."""
    names = ("least_ms", "lower_quartile_ms", "median_ms", "upper_quartile_ms")
    factors = dict.fromkeys(names, 10.0)
    return tuple(
        one
        if one.graph == "ar"
        else one.model_copy(update={k: f * getattr(one, k) for k, f in factors.items()})
        for one in timings.forwards
    )


Answer = Callable[[list[list[int]]], list[Any]]


def answer_with(engine: Engine, options: dict[str, Any]) -> Answer:
    def answer(prompts: list[list[int]]) -> list[Any]:
        handles = [engine.submit(ids, max_new_tokens=MAX_NEW_TOKENS, **options) for ids in prompts]
        return [handle.result() for handle in handles]

    return answer


def race(
    ways: dict[str, Answer], prompts: list[list[int]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Least seconds of the processor, and of the wall, of each way."""
    order = random.Random(0)
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    wall: dict[str, list[float]] = {way: [] for way in ways}
    expected: list[Any] | None = None
    for _ in range(rounds + WARM_UP):
        for way in order.sample(list(ways), len(ways)):
            start = time.perf_counter(), time.process_time()
            found = [result.token_ids for result in ways[way](prompts)]
            wall[way].append(time.perf_counter() - start[0])
            cpu[way].append(time.process_time() - start[1])
            expected = expected or found
            assert found == expected, f"{way}: other tokens"
    return (
        {way: min(values[WARM_UP:]) for way, values in cpu.items()},
        {way: min(values[WARM_UP:]) for way, values in wall.items()},
    )


def questions(model: TriModeModel, count: int) -> list[list[int]]:
    return [encode(model, e.prompt) for e in itertools.islice(examples(7, "held-out"), count)]


def cost(model: TriModeModel, timings: Timings, rows: int, rounds: int) -> dict[str, Any]:
    """Mode `auto` by load that always picks AR, over mode `ar`."""
    loaded = TriModeModel(
        model.bundle,
        model.session,
        model.target,
        model.num_threads,
        table_of(model, model.num_threads or 1, where_ar_wins(timings)),
    )
    with (
        Engine(model, max_rows=rows, kv_bytes=0, mode="ar") as plain,
        Engine(loaded, max_rows=rows, kv_bytes=0) as engine,
    ):
        ways = {
            "ar": answer_with(plain, {"mode": "ar"}),
            "auto by load": answer_with(engine, {"mode": "auto"}),
        }
        cpu, wall = race(ways, questions(model, PROMPTS), rounds)
    ratio = {"cpu": cpu["auto by load"] / cpu["ar"], "wall": wall["auto by load"] / wall["ar"]}
    print(f"rows {rows}: auto that picks AR over ar: {ratio}", flush=True)
    return {"rows": rows, "cpu_s": cpu, "wall_s": wall, "auto_over_ar": ratio}


def speed(model: TriModeModel, rows: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of every way."""
    prompts = questions(model, PROMPTS)
    with (
        Engine(model, max_rows=rows, kv_bytes=0, by_load=False) as plain,
        Engine(model, max_rows=rows, kv_bytes=0) as engine,
    ):
        ways = {
            name: answer_with(engine if name == "auto by load" else plain, options)
            for name, options in WAYS.items()
        }
        tokens = sum(len(result.token_ids) for result in ways["ar"](prompts))
        cpu, wall = race(ways, prompts, rounds)
        stats = engine.stats()
    speeds = {way: tokens / seconds for way, seconds in cpu.items()}
    fixed = [speeds[way] for way in WAYS if not way.startswith("auto")]
    share = speeds["auto by load"] / max(fixed)
    print(f"rows {rows}: { ({k: round(v) for k, v in speeds.items()}) } share {share:.3f}")
    return {
        "rows": rows,
        "tokens_per_cpu_s": speeds,
        "tokens_per_wall_s": {way: tokens / seconds for way, seconds in wall.items()},
        "share_of_best_fixed": share,
        "switches": [vars(switch) for switch in stats.mode_switches],
        "rows_per_forward": stats.rows_per_forward,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    with TriModeModel.from_pretrained(args.bundle, num_threads=args.threads) as opened:
        timings = measured(opened, args.threads, args.repeats)
        model = TriModeModel(opened.bundle, opened.session, opened.target, args.threads, timings)
        costs = [cost(model, timings, rows, args.rounds) for rows in (1, 4)]
        speeds = [speed(model, rows, args.rounds) for rows in CONCURRENCY]
    save(
        "load_engine",
        {
            "arguments": arguments_of(vars(args)),
            "cost": costs,
            "speed": speeds,
            "timings": timings.model_dump(mode="json"),
        },
    )
    print("largest cost:", np.round(max(one["auto_over_ar"]["cpu"] for one in costs), 4))


if __name__ == "__main__":
    main()

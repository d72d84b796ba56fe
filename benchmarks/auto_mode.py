"""Wall time per task family of the demo: AR, linear self-speculation at several block lengths, and
mode auto.

    python -m benchmarks.auto_mode BUNDLE [--threads 1] [--per-family 8] [--rounds 5]

All are timed in one run: every question is answered in every way, in an order that is drawn anew,
before the next question comes, and the least of a question's times over the rounds is kept, since
what else the machine does only ever adds. Beside the wall's, the processor's time is taken (with
one thread; a busy machine disturbs it less). A timing table is measured first, as `trimode bench
--prompts-file` does, over training questions. A mixture weighs the families' times per token:
equally, and in random shares.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

import trimode
from benchmarks.common import arguments_of, save
from trimode.calib.demo.tasks import FAMILIES, examples
from trimode.runtime import TriModeModel
from trimode.runtime.auto.timings import AcceptanceRecord, Timings, subject_of
from trimode.runtime.measure.acceptance import write_texts
from trimode.runtime.measure.forwards import (
    DEFAULT_ROWS,
    TimerSettings,
    check_settings,
    time_forwards,
)

BLOCKS = (8, 12, 16, 24, 32)
MAX_NEW_TOKENS = 192
TRAINING_PER_FAMILY = 20
KEYS = ("ms_per_token", "cpu_ms_per_token")
WAYS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    **{f"linear-spec {n}": {"mode": "linear_spec", "block_length": n} for n in BLOCKS},
    "auto": {"mode": "auto"},
}


def measured_timings(model: TriModeModel, threads: int, repeats: int) -> Timings:
    settings = check_settings(
        TimerSettings(DEFAULT_ROWS, (32, 128, 192), repeats=repeats), model.model, model.session
    )
    forwards = time_forwards(model.session, model.model, settings, lambda _: None)
    subject = subject_of(model.bundle, model.target, threads)
    training = [
        encode(model, e.prompt)
        for e in itertools.islice(examples(3, "train"), TRAINING_PER_FAMILY * len(FAMILIES))
    ]
    texts = list(write_texts(model, training, max(BLOCKS), use_drafter=model.model.has_drafter))
    record = AcceptanceRecord.of(texts, max(BLOCKS), drafter=model.model.has_drafter)
    assert record is not None
    return Timings(
        trimode_version=trimode.__version__,
        command="benchmarks.auto_mode",
        date=time.strftime("%Y-%m-%d"),
        system="",
        subject=subject,
        forwards=forwards,
        acceptance=(record,),
    )


def encode(model: TriModeModel, prompt: str) -> list[int]:
    return model.codec.encode_chat([{"role": "user", "content": prompt}])


def answer(model: TriModeModel, ids: list[int], options: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """Seconds of the wall and of the processor, and the result."""
    start = time.perf_counter(), time.process_time()
    result = model.stream([ids], max_new_tokens=MAX_NEW_TOKENS, **options).finish()
    return np.array([time.perf_counter() - start[0], time.process_time() - start[1]]), result


def measure(
    model: TriModeModel, per_family: int, rounds: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Family -> way -> milliseconds a token, and what auto picked."""
    order = random.Random(0)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for family in FAMILIES:
        questions = itertools.islice(examples(7, "held-out", [family]), per_family)
        prompts = [encode(model, e.prompt) for e in questions]
        least = {way: np.full((per_family, 2), np.inf) for way in WAYS}
        tokens, picks = np.zeros(per_family), dict.fromkeys(DEFAULT_ROWS, 0)
        for round_ in range(rounds):
            for number, ids in enumerate(prompts):
                texts = {}
                for way in order.sample(list(WAYS), len(WAYS)):
                    seconds, result = answer(model, ids, WAYS[way])
                    least[way][number] = np.minimum(least[way][number], seconds)
                    texts[way] = result.token_ids
                    for length, count in (result.picks or {}).items():
                        picks[length] += count * (round_ == 0)
                assert all(text == texts["ar"] for text in texts.values()), (
                    f"{family}: tokens differ from those of AR"
                )
                tokens[number] = len(texts["ar"])
        ms = {way: (1e3 * least[way].sum(0) / tokens.sum()).tolist() for way in WAYS}
        table[family] = {
            way: {"ms_per_token": wall, "cpu_ms_per_token": cpu} for way, (wall, cpu) in ms.items()
        }
        table[family]["auto"]["picks"] = picks
    return table


def mixtures(
    table: dict[str, dict[str, dict[str, Any]]], key: str, count: int = 1000
) -> dict[str, Any]:
    """Auto over the best single way: families weighed equally, and in random shares (Dirichlet,
    concentration 1).
    """
    ms = np.array([[rows[way][key] for way in WAYS] for rows in table.values()])
    shares = np.vstack(
        [
            np.full(len(table), 1 / len(table)),
            np.random.default_rng(0).dirichlet(np.ones(len(table)), count),
        ]
    )
    mixed = shares @ ms
    ratios = mixed[:, -1] / mixed[:, :-1].min(1)
    return {
        "equal_shares_ms_per_token": dict(zip(WAYS, mixed[0].tolist(), strict=True)),
        "equal_shares_auto_over_best": float(ratios[0]),
        "random_shares_auto_over_best": dict(
            zip(
                ("least", "median", "most"),
                np.percentile(ratios[1:], (0, 50, 100)).tolist(),
                strict=True,
            )
        ),
        "random_shares_auto_wins": float((ratios[1:] < 1).mean()),
    }


def show(table: dict[str, dict[str, dict[str, Any]]], mixed: dict[str, Any], key: str) -> None:
    print(
        f"{key:16s}" + "".join(f"{way[-11:]:>12s}" for way in WAYS) + "   auto/best   picks of auto"
    )
    for family, rows in table.items():
        best = min(rows[way][key] for way in WAYS if way != "auto")
        cells = "".join(f"{rows[way][key]:12.3f}" for way in WAYS)
        print(f"{family:16s}{cells}{rows['auto'][key] / best:12.3f}   {rows['auto']['picks']}")
    equal = "".join(f"{value:12.3f}" for value in mixed["equal_shares_ms_per_token"].values())
    print(f"{'equal shares':16s}{equal}{mixed['equal_shares_auto_over_best']:12.3f}")
    print(f"random shares, auto/best: {mixed['random_shares_auto_over_best']}")
    print(f"random shares in which auto is the fastest: {mixed['random_shares_auto_wins']:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--per-family", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    with TriModeModel.from_pretrained(args.bundle, num_threads=args.threads) as opened:
        timings = measured_timings(opened, args.threads, args.repeats)
        model = TriModeModel(opened.bundle, opened.session, opened.target, args.threads, timings)
        for options in WAYS.values():  # buffers and threads come into being
            answer(model, encode(model, "Add 478 and 356."), options)
        table = measure(model, args.per_family, args.rounds)
        source = model.bundle.manifest.source.sha256
    costs = timings.costs(use_drafter=model.model.has_drafter)
    print(
        f"table, ms at {costs.past} cached: AR {costs.ar_ms}, drafts {dict(costs.draft_ms)}, "
        f"verifications {dict(costs.verify_ms)}"
    )
    print(
        f"acceptance expected {costs.history.rate:.3f}, {len(costs.history.kinds)} kinds of prompts"
    )
    mixed = {key: mixtures(table, key) for key in KEYS}
    for key in KEYS:
        show(table, mixed[key], key)
    save(
        "auto_mode",
        {
            "arguments": arguments_of(vars(args)),
            "source_sha256": source,
            "families": table,
            "mixtures": mixed,
            "timings": timings.model_dump(mode="json"),
        },
    )


if __name__ == "__main__":
    main()

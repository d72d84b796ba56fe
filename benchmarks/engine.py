"""What the engine adds and saves: overhead over the decoder, prefix reuse, capacities, alignment.

    python -m benchmarks.engine BUNDLE [--threads 2] [--rounds 7]

Everything is measured in one run and in turns, so that the machine's mood hits both sides of a
ratio. Times are of the processor, all threads of the process together, since a shared machine's
clock measures the neighbours. Ratios are of the fastest rounds, and the median of the rounds' own.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments_of, median, save
from benchmarks.simulator.machines import machine
from benchmarks.waiting import run
from trimode import Engine, TriModeModel
from trimode.calib.demo.tasks import examples

MODES: tuple[Any, ...] = ("ar", "diffusion", "linear_spec", "auto")
PREFIX = 512


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of the process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def summary(first: list[float], second: list[float]) -> dict[str, Any]:
    """Seconds of both sides, and second over first: of the fastest, and the rounds' median."""
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    return {
        "first_s": first,
        "second_s": second,
        "ratio_of_least": min(second) / min(first),
        "median_ratio": median(ratios),
    }


def overhead(model: TriModeModel, prompts: list[list[int]], rounds: int) -> dict[str, Any]:
    """One request after the other, through the engine and without: wall time and, as the machine
    is shared, processor time of the whole process.
    """
    with Engine(model, kv_bytes=0) as engine:
        found = {mode: overhead_of(model, engine, mode, prompts, rounds) for mode in MODES}
    return {
        f"{mode} {clock}": value
        for mode, clocks in found.items()
        for clock, value in clocks.items()
    }


def overhead_of(
    model: TriModeModel, engine: Engine, mode: Any, prompts: list[list[int]], rounds: int
) -> dict[str, Any]:
    def alone() -> None:
        for prompt in prompts:
            model.stream([prompt], mode).finish()

    def through() -> None:
        for prompt in prompts:
            engine.submit(prompt, mode=mode).result()

    alone(), through()
    times: dict[str, tuple[list[float], list[float]]] = {"wall": ([], []), "processor": ([], [])}
    for _ in range(rounds):
        for side, answer in enumerate((alone, through)):
            start, cpu = time.perf_counter(), time.process_time()
            answer()
            times["wall"][side].append(time.perf_counter() - start)
            times["processor"][side].append(time.process_time() - cpu)
    return {clock: summary(*sides) for clock, sides in times.items()}


def auto_of_ar(model: TriModeModel, prompts: list[list[int]], rounds: int) -> dict[str, Any]:
    """Mode ``auto`` with a plan that says AR, against mode ``ar``; both through the engine."""
    from trimode.runtime.engine.load.state import FixedModePolicy

    fixed, planned = [], []
    with (
        Engine(model, kv_bytes=0) as plain,
        Engine(model, kv_bytes=0, mode_policy=FixedModePolicy(1)) as auto,
    ):
        for _ in range(rounds + 1):
            fixed.append(seconds(lambda: [plain.submit(p, mode="ar").result() for p in prompts]))
            planned.append(seconds(lambda: [auto.submit(p, mode="auto").result() for p in prompts]))
    return summary(fixed[1:], planned[1:])


def first_token(engine: Engine, ids: list[int], **options: Any) -> tuple[Any, float]:
    """A request, and the processor time of the process until its first token."""
    start, ends = time.process_time(), []
    handle = engine.submit(
        ids, mode="ar", on_piece=lambda _: ends.append(time.process_time()), **options
    )
    next(iter(handle))
    while not ends:  # the callback comes just after the piece
        time.sleep(1e-4)
    return handle, ends[0] - start


def shared_prefix(model: TriModeModel, rounds: int) -> dict[str, Any]:
    """Time to the first token of the first and of the second prompt with a prefix of 512 tokens,
    with the first at work or ended.
    """
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name in ("ended", "at_work"):
        first, second = [], []
        for _ in range(rounds):
            stem = rng.integers(12, 99, PREFIX).tolist()
            with Engine(model) as engine:
                new = 2 if name == "ended" else 200
                one, took = first_token(engine, [*stem, 20], max_new_tokens=new, eos_token_ids=())
                first.append(took)
                if name == "ended":
                    one.result()
                second.append(first_token(engine, [*stem, 30], max_new_tokens=1)[1])
                one.cancel()
        found[name] = summary(first, second)
    return found


def conversation(model: TriModeModel) -> dict[str, Any]:
    """Turns through the chat template, from the second one on: share of the prompts' tokens that
    is not computed again, and share of what an earlier turn had computed.
    """
    found = {}
    questions = [example.prompt for example in itertools.islice(examples(2, "held-out"), 12)]
    for mode in MODES:
        cached = total = known = before = 0
        with Engine(model) as engine:
            messages: list[dict[str, str]] = []
            for number, question in enumerate(questions):
                messages.append({"role": "user", "content": question})
                ids = model.codec.encode_chat(messages)
                handle = engine.submit(ids, mode=mode, max_new_tokens=120)
                text = model.codec.decode(handle.result().token_ids)
                messages.append({"role": "assistant", "content": text})
                usage = handle.usage
                if number:
                    cached += usage.cached_tokens
                    total += usage.prompt_tokens
                    known += before
                before = usage.prompt_tokens + usage.completion_tokens
        found[mode] = {
            "cached_tokens": cached,
            "prompt_tokens": total,
            "earlier_tokens": known,
            "share_of_prompts": cached / total,
            "share_of_earlier_tokens": cached / known,
        }
    return found


def beside_a_long_one(model: TriModeModel, rounds: int) -> dict[str, Any]:
    """Eight short texts alone, and beside a text of 1,200 tokens that decodes all the time."""
    rng = np.random.default_rng(1)
    short = [rng.integers(12, 99, 20).tolist() for _ in range(8)]
    long = rng.integers(12, 99, 1200).tolist()
    options: dict[str, Any] = {"mode": "ar", "eos_token_ids": ()}

    def answer(engine: Engine) -> None:
        handles = [engine.submit(p, max_new_tokens=120, **options) for p in short]
        for handle in handles:
            handle.result()

    alone, beside = [], []
    with Engine(model, max_rows=9, kv_bytes=0) as engine:
        answer(engine)
        for _ in range(rounds):
            alone.append(seconds(lambda: answer(engine)))
            other = engine.submit(long, max_new_tokens=800, **options)
            next(iter(other))
            beside.append(seconds(lambda: answer(engine)))
            assert not other.done
            other.cancel()
    return summary(alone, beside)


def alignment(model: TriModeModel, prompts: list[list[int]]) -> dict[str, Any]:
    """Rows per forward of all prompts at once, eight at a time; and forwards over those of single
    runs. Who runs with whom is counted on a simulated clock, so that it can be repeated.
    """
    found = {}
    for mode in MODES[:3]:
        single = 0
        for prompt in prompts:
            result = model.stream([prompt], mode).finish()
            single += sum(vars(result.forwards).values())
        joint = run(
            model,
            prompts,
            machine("cpu"),
            block_length=32,
            arrival="together",
            waits=False,
            mode=mode,
        )
        found[mode] = {
            "rows_per_forward": joint["rows_per_forward"],
            "forwards": joint["forwards"],
            "share_of_single_forwards": sum(joint["forwards"].values()) / single,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model = TriModeModel.from_pretrained(args.bundle, num_threads=args.threads, target="portable")
    prompts = [
        model.codec.encode_chat([{"role": "user", "content": e.prompt}])
        for e in itertools.islice(examples(1, "held-out"), args.prompts)
    ]
    measured = {
        "overhead_of_the_engine": overhead(model, prompts[:8], args.rounds),
        "auto_that_picks_ar": auto_of_ar(model, prompts[:8], args.rounds),
        "shared_prefix_ttft": shared_prefix(model, args.rounds),
        "conversation": conversation(model),
        "short_beside_long": beside_a_long_one(model, args.rounds),
        "alignment": alignment(model, prompts),
    }
    for name, value in measured.items():
        print(name)
        for key, row in (value if "ratio_of_least" not in value else {"": value}).items():
            print("   ", key, {k: v for k, v in row.items() if not isinstance(v, list)})
    save("engine", {"arguments": arguments_of(vars(args)), **measured})


if __name__ == "__main__":
    main()

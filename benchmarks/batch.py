"""Tokens per second of batches of 1, 2, 4 and 8 texts, in AR, diffusion and linear
self-speculation.

    python -m benchmarks.batch BUNDLE [--threads 2] [--prompts 36]

All are timed in one run, round after round, so that the machine's mood hits each of them; a round
is every prompt once. A batch of 1 is what a single text takes through the same machinery; `single`
is the ordinary way, one stream after the other. The forwards of a round are counted, too: a batch
of n that always was full would take 1/n of them.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import arguments_of, median, save
from trimode.calib.demo.tasks import examples
from trimode.runtime import Generation, TriModeModel
from trimode.runtime.sessions.ort.session import OrtSession

ROUNDS = 5
MAX_NEW_TOKENS = 192
MODES: tuple[Any, ...] = ("ar", "diffusion", "linear_spec")
SIZES = (1, 2, 4, 8)


class CountingSession(OrtSession):
    """Counts its forwards, and the tokens in them, padding included."""

    forwards = tokens = 0

    def _run(self, graph_name: Any, cache: Any, rows: range, input_ids: Any, *rest: Any) -> Any:
        self.forwards += 1
        self.tokens += input_ids.size
        return super()._run(graph_name, cache, rows, input_ids, *rest)


def runners(model: TriModeModel) -> dict[str, Callable[[list[list[int]]], list[Generation]]]:
    def single(mode: Any) -> Callable[[list[list[int]]], list[Generation]]:
        return lambda prompts: [
            model.stream([prompt], mode, max_new_tokens=MAX_NEW_TOKENS).finish()
            for prompt in prompts
        ]

    def batch(mode: Any, size: int) -> Callable[[list[list[int]]], list[Generation]]:
        return lambda prompts: model.generate_batch(
            prompts, mode, max_rows=size, max_new_tokens=MAX_NEW_TOKENS
        )

    named = {f"{mode} single": single(mode) for mode in MODES}
    return named | {f"{mode} batch {size}": batch(mode, size) for mode in MODES for size in SIZES}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=36)
    args = parser.parse_args()
    opened = TriModeModel.from_pretrained(args.bundle, num_threads=args.threads, target="portable")
    session = CountingSession(opened.bundle, None, args.threads)
    model = TriModeModel(opened.bundle, session)
    prompts = [
        model.codec.encode_chat([{"role": "user", "content": e.prompt}])
        for e in itertools.islice(examples(1, "held-out"), args.prompts)
    ]
    speeds: dict[str, list[float]] = {}
    work: dict[str, dict[str, int]] = {}
    same: dict[str, int] = {}
    for number in range(ROUNDS + 1):
        alone: dict[str, list[tuple[list[int], int]]] = {}
        for name, run in runners(model).items():
            session.forwards = session.tokens = 0
            start = time.perf_counter()
            results = run(prompts)
            seconds = time.perf_counter() - start
            work[name] = {"forwards": session.forwards, "tokens_with_padding": session.tokens}
            answers = [(one.token_ids, one.nfe) for one in results]
            expected = alone.setdefault(name.split()[0], answers)
            same[name] = sum(a == b for a, b in zip(answers, expected, strict=True))
            if number > 0:  # the first round warms up
                speeds.setdefault(name, []).append(
                    sum(len(one.token_ids) for one in results) / seconds
                )
    report(speeds, work, same, vars(args))


def report(
    speeds: dict[str, list[float]],
    work: dict[str, dict[str, int]],
    same: dict[str, int],
    arguments: dict[str, Any],
) -> None:
    medians = {name: median(values) for name, values in speeds.items()}
    ratios = {
        # round by round
        name: median(
            [
                value / single
                for value, single in zip(values, speeds[f"{name.split()[0]} single"], strict=True)
            ]
        )
        for name, values in speeds.items()
    }
    for name, value in medians.items():
        print(
            f"{name:22s} {value:8.0f} tokens/s   {ratios[name]:5.2f} times single   "
            f"{work[name]['forwards']:6d} forwards   "
            f"tokens and nfe of single: {same[name]}"
        )
    save(
        "batch",
        {
            "arguments": arguments_of(arguments),
            "tokens_per_s": speeds,
            "over_single": ratios,
            "work_of_a_round": work,
            "same_tokens_and_nfe_as_single": same,
        },
    )


if __name__ == "__main__":
    main()

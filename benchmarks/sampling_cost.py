"""Milliseconds that one sampled row of 131,072 logits takes on the host, in one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.sampling_cost [--rounds 60]

For each shape of the logits and each set of options: `trimode`, what the runtime does to a row,
from float32 logits to a token; `dense`, the definition of the same distribution in float64 over the
whole row (:func:`trimode.runtime.decode.sampling.distribution`), which is what the runtime did
before; and `transformers`, its logits processors in float32, softmax and `torch.multinomial`. All
are timed in turn, round after round; the least time counts, since whatever else the machine does
adds to it.

`verify` is a row of a block of self-speculation: a draft accepted or replaced. `rows_together` has
the same arithmetic over 8 rows in one call of numpy each, for temperature alone.

A language model's logits are `zipf` here: probabilities that fall with a power of the rank. The
other shapes are harder: many more tokens matter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from benchmarks.common import arguments_of, median, save
from trimode.runtime.decode.penalties import Penalties
from trimode.runtime.decode.sampling import SamplingOptions, distribution, draw
from trimode.runtime.decode.token_distribution import accept_or_replace, leading
from trimode.runtime.decode.vocabulary_row import best_token, row_distribution

VOCABULARY = 131072
PROMPT_TOKENS = 2000
ROWS = 8
CASES = {
    "temperature": SamplingOptions(0.7),
    "top_k": SamplingOptions(0.7, top_k=50),
    "top_p": SamplingOptions(0.7, top_p=0.9),
    "min_p": SamplingOptions(0.7, min_p=0.05),
    "all": SamplingOptions(0.7, 50, 0.9, 0.05),
    "all and repetition": SamplingOptions(0.7, 50, 0.9, 0.05, 1.2),
    "temperature and repetition": SamplingOptions(0.7, repetition_penalty=1.2),
    "greedy and repetition": SamplingOptions(0.0, repetition_penalty=1.2),
}

Run = Callable[[], object]


def shapes(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Logits ``(V,)`` as float32."""
    normal = rng.normal(size=VOCABULARY)
    named = {
        "zipf": -2.2 * np.log(rng.permutation(VOCABULARY) + 1.0) + normal * 0.5,
        "normal": normal * 2.5,
        "flat": normal * 0.01,
    }
    found = {name: values.astype(np.float32) for name, values in named.items()}
    bits = found["normal"].view(np.uint32) & 0xFFFF0000
    return {**found, "normal in bfloat16": bits.view(np.float32)}


def ours(logits: np.ndarray, s: SamplingOptions, prompt: list[int]) -> Run:
    penalties, rng = Penalties(s, VOCABULARY, prompt), np.random.Generator(np.random.Philox(1))
    if not s.is_random:
        return lambda: best_token(penalties.row(logits))
    return lambda: row_distribution(penalties.row(logits), s).draw(rng)


def dense(logits: np.ndarray, s: SamplingOptions, prompt: list[int]) -> Run:
    rng, seen = np.random.Generator(np.random.Philox(1)), np.zeros(VOCABULARY, bool)
    seen[prompt] = True

    def run() -> object:
        scores = logits.astype(np.float64)
        if s.repetition_penalty != 1:
            old = scores[seen]
            scores[seen] = np.where(old < 0, old * s.repetition_penalty, old / s.repetition_penalty)
        return draw(distribution(scores, s), rng)

    return run


def peer(logits: np.ndarray, s: SamplingOptions, prompt: list[int]) -> Run:
    processors = LogitsProcessorList()
    if s.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.is_random:
        processors.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        processors.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        processors.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        processors.append(MinPLogitsWarper(s.min_p))
    row, ids = torch.from_numpy(logits)[None], torch.tensor([prompt])

    def run() -> object:
        scores = processors(ids, row)
        if not s.is_random:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1)

    return run


def verified(logits: np.ndarray, s: SamplingOptions) -> Run:
    """A draft among five candidates, accepted or replaced."""
    penalties, rng = Penalties(s, VOCABULARY, []), np.random.Generator(np.random.Philox(1))
    q_ids, q = np.argsort(-logits)[:5].astype(np.int64), np.full(5, 0.2)

    def run() -> object:
        p = row_distribution(penalties.row(logits), s)
        return accept_or_replace(int(q_ids[4]), p, q_ids, q, rng)

    return run


def together(rows: np.ndarray, temperature: float) -> Run:
    """Logits ``(n, V)`` in one call of numpy for each operation."""
    rng, block = np.random.Generator(np.random.Philox(1)), 512

    def run() -> object:
        scores = np.subtract(rows, rows.max(-1, keepdims=True), dtype=np.float64)
        scores /= temperature
        np.exp(scores, out=scores)
        sums = scores.reshape(len(rows), -1, block).sum(-1)
        aims = rng.random(len(rows)) * sums.sum(-1)
        return [leading(row, aim) for row, aim in zip(scores, aims, strict=True)]

    return run


def time_all(runs: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Least and median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: {"least": min(t), "median": median(t)} for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCABULARY, PROMPT_TOKENS).tolist()
    measured: dict[str, Any] = {}
    for shape, logits in shapes(rng).items():
        found: dict[str, Any] = {}
        for case, s in CASES.items():
            runs = {"trimode": ours, "dense": dense, "transformers": peer}
            found[case] = time_all(
                {name: make(logits, s, prompt) for name, make in runs.items()}, args.rounds
            )
            found[case]["verify"] = (
                time_all({"": verified(logits, s)}, args.rounds)[""] if s.is_random else None
            )
            report(f"{shape}, {case}", found[case])
        measured[shape] = found
    rows = np.stack([shapes(rng)["normal"] for _ in range(ROWS)])
    alone = [ours(row, CASES["temperature"], []) for row in rows]
    several = time_all(
        {
            "in one call": together(rows, CASES["temperature"].temperature),
            "row by row": lambda: [run() for run in alone],
        },
        args.rounds,
    )
    report(f"{ROWS} rows", several)
    settings = {"vocabulary": VOCABULARY, "prompt_tokens": PROMPT_TOKENS, "rows": ROWS}
    save(
        "sampling_cost",
        {
            "arguments": {**arguments_of(vars(args)), **settings},
            "options": {
                case: {k: v for k, v in vars(s).items() if v != getattr(SamplingOptions(), k)}
                for case, s in CASES.items()
            },
            "ms_per_row": measured,
            "ms_of_rows_together": several,
        },
    )


def report(what: str, found: dict[str, Any]) -> None:
    times = ", ".join(f"{name} {t['least']:.3f}" for name, t in found.items() if t)
    print(f"{what:45s} ms: {times}")


if __name__ == "__main__":
    main()

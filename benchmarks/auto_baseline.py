"""Mode auto beside a policy of forty lines: simulated texts, and the demo checkpoint.

    python -m benchmarks.auto_baseline simulated
    python -m benchmarks.auto_baseline demo BUNDLE [--threads 1] [--per-family 8] [--rounds 5]

The simulated texts are those of the policy's tests; there, milliseconds are computed from a cost
table, so the machine does not matter. On the demo checkpoint both policies and all single choices
answer every question in one run, as in `benchmarks.auto_mode`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import auto_mode
from benchmarks.common import arguments_of, save
from tests.simulated_texts import (
    CPU,
    GPU,
    Rates,
    bursts,
    by_stretch,
    by_text,
    constant,
    milliseconds_per_token,
)
from trimode.runtime import TriModeModel
from trimode.runtime.auto.policy import AR_STEP, AdaptivePolicy, FixedPolicy, Policy, StepCosts
from trimode.runtime.decode import algorithms as decode

MEMORY_CYCLES = 8.0
PROBE_TOKENS = 60.0
PRIOR_DRAFTS = 4.0

TEXTS: dict[str, tuple[Rates, int, int]] = {
    **{f"constant {rate}": (constant(rate), 500, 12) for rate in (0.1, 0.4, 0.7, 0.85, 0.93, 0.98)},
    "by text, long": (by_text, 300, 30),
    "by text, short": (by_text, 60, 60),
    "by stretch": (by_stretch, 500, 12),
    "bursts": (bursts, 300, 30),
}


class MovingAveragePolicy:
    """The step of the fewest milliseconds a token, by a moving average of how many drafts were
    accepted and how many rejected.

    Where drafts have a confidence, that of the last block stands for the positions it covered, and
    decides what is verified.
    """

    def __init__(self, costs: StepCosts, _prompt: Sequence[int] = (), **_: bool) -> None:
        self._costs, self._prior = costs, costs.history.rate
        self._accepted, self._rejected = (
            PRIOR_DRAFTS * self._prior,
            PRIOR_DRAFTS * (1 - self._prior),
        )
        self._length = self._rows = AR_STEP
        self._ms_per_token, self._drafts = 0.0, np.empty(0)

    def choose(self, past: int, left: int) -> int:
        self._times = times = self._costs.at(past)
        rates = np.full(max(times.lengths) - 1, self._accepted / (self._accepted + self._rejected))
        ahead = min(len(self._drafts), len(rates))
        rates[:ahead] = 0.8 * self._drafts[:ahead] + 0.2 * rates[:ahead]
        tokens = np.cumsum(np.cumprod(np.concatenate(([1.0], rates))))
        cycles = [
            draft + verify for draft, verify in zip(times.draft_ms, times.verify_ms, strict=True)
        ]
        per_token = [
            times.ar_ms,
            *(ms / tokens[min(n, left) - 1] for ms, n in zip(cycles, times.lengths, strict=True)),
        ]
        self._ms_per_token = min(per_token)
        self._length = (AR_STEP, *times.lengths)[per_token.index(self._ms_per_token)]
        return self._length

    def rows_to_verify(self, num_wanted: int, confidence: NDArray[Any] | None) -> int:
        self._rows = next(length for length in self._costs.lengths if length >= num_wanted)
        self._drafts = np.empty(0)
        if confidence is not None:  # a further row has to save more than it takes
            self._drafts = confidence[1:num_wanted]
            tokens = np.cumsum(np.cumprod(np.concatenate(([1.0], self._drafts))))
            usable = [
                (ms, n)
                for ms, n in zip(self._times.verify_ms, self._times.lengths, strict=True)
                if n <= self._rows
            ]
            self._rows = max(
                usable,
                key=lambda one: self._ms_per_token * tokens[min(one[1], num_wanted) - 1] - one[0],
            )[1]
        return self._rows

    def record(self, num_tokens: int) -> None:
        self._drafts = self._drafts[num_tokens:] if self._length > AR_STEP else self._drafts[1:5]
        # nothing was shown: back to the prior, so that drafting is tried again
        if self._length == AR_STEP:
            keep, seen = math.exp(-1 / PROBE_TOKENS), PRIOR_DRAFTS
            self._accepted = keep * self._accepted + (1 - keep) * seen * self._prior
            self._rejected = keep * self._rejected + (1 - keep) * seen * (1 - self._prior)
            return
        keep = math.exp(-1 / MEMORY_CYCLES)
        self._accepted = keep * self._accepted + num_tokens - 1
        self._rejected = keep * self._rejected + (num_tokens < self._rows)


def simulated() -> dict[str, dict[str, float]]:
    """Text and machine -> milliseconds a token of each way."""
    table: dict[str, dict[str, float]] = {}
    for machine, costs in (("cpu", CPU), ("gpu", GPU)):
        for name, (rates, length, texts) in TEXTS.items():
            for is_confident in (False, True):
                ways: dict[str, Callable[[], Policy]] = {
                    "auto": partial(AdaptivePolicy, costs, is_confident=is_confident),
                    "baseline": partial(MovingAveragePolicy, costs, is_confident=is_confident),
                    **{str(n): partial(FixedPolicy, n) for n in (AR_STEP, *costs.lengths)},
                }
                ms = {
                    way: milliseconds_per_token(
                        make, costs, rates, length, texts, is_confident=is_confident
                    )
                    for way, make in ways.items()
                }
                table[f"{machine}, {name}, confidence {'known' if is_confident else 'unknown'}"] = (
                    ms
                )
    return table


@contextlib.contextmanager
def baseline_in_place() -> Iterator[None]:
    """Mode auto asks the baseline."""
    kept = decode.make_policy
    decode.make_policy = lambda costs, _length, prompt, *, is_confident: MovingAveragePolicy(
        costs, prompt, is_confident=is_confident
    )  # type: ignore[assignment]
    try:
        yield
    finally:
        decode.make_policy = kept


def demo(
    bundle: Path, threads: int, per_family: int, rounds: int, repeats: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Family -> way -> milliseconds a token, all in one run."""
    plain = auto_mode.answer

    def answer(model: TriModeModel, ids: list[int], options: dict[str, Any]) -> Any:
        if not options.get("baseline"):
            return plain(model, ids, options)
        with baseline_in_place():
            return plain(model, ids, {"mode": "auto"})

    auto_mode.answer = answer
    auto_mode.WAYS = {
        **{k: v for k, v in auto_mode.WAYS.items() if k != "auto"},
        "baseline": {"baseline": True},
        "auto": {"mode": "auto"},
    }
    with TriModeModel.from_pretrained(bundle, num_threads=threads) as opened:
        timings = auto_mode.measured_timings(opened, threads, repeats)
        model = TriModeModel(opened.bundle, opened.session, opened.target, threads, timings)
        for options in auto_mode.WAYS.values():
            answer(model, auto_mode.encode(model, "Add 478 and 356."), options)
        return auto_mode.measure(model, per_family, rounds)


def show(table: dict[str, dict[str, float]]) -> None:
    print(f"{'':44s}{'auto':>8s}{'baseline':>10s}{'best one':>10s}{'baseline/auto':>15s}")
    for name, ms in table.items():
        best = min(value for way, value in ms.items() if way not in ("auto", "baseline"))
        print(
            f"{name:44s}{ms['auto']:8.3f}{ms['baseline']:10.3f}{best:10.3f}"
            f"{ms['baseline'] / ms['auto']:15.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["simulated", "demo"])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--per-family", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    if args.what == "simulated":
        table = simulated()
    else:
        families = demo(args.bundle, args.threads, args.per_family, args.rounds, args.repeats)
        table = {
            family: {way: values["cpu_ms_per_token"] for way, values in rows.items()}
            for family, rows in families.items()
        }
    show(table)
    save(
        f"auto_baseline_{args.what}", {"arguments": arguments_of(vars(args)), "ms_per_token": table}
    )


if __name__ == "__main__":
    main()

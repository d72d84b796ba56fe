"""Random load on an engine for an hour: memory stays flat, and no token differs from a single run.

    python -m benchmarks.soak BUNDLE [--minutes 60] [--duty 0.3]

Requests come in bursts: every mode, forks, follow-ups, salts, priorities, deadlines, stop strings,
cancelled ones, from a thread and from asyncio. A second model of the same bundle gives the cold
single runs. The process rests so long that it takes the share ``--duty`` of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments_of, save
from benchmarks.load_engine import measured
from trimode import Engine, Handle, TriModeModel
from trimode.calib.demo.tasks import examples
from trimode.errors import RequestCancelledError, RequestTimeoutError

MODES: tuple[Any, ...] = ("ar", "diffusion", "linear_spec", "auto")
SAMPLE_S = 5.0
MOST_GROWTH = 0.03
MAX_ROWS = 8
MARKERS = 8
"""Classes of token ids: a marked text may only have ids of its own class."""
TIE = 1e-3
"""Most difference of two log-probabilities that rounding may decide between."""
STOPS: tuple[str, ...] = ("\n", "}", "return", "=")


@dataclass(eq=False)
class Asked:
    """A request: what its single run is made with, and the class of its tokens if it is marked."""

    handle: Handle
    mode: Any
    options: dict[str, Any]
    marker: int | None = None

    @property
    def is_repeatable(self) -> bool:
        """Whether a single run draws the same tokens."""
        return "temperature" not in self.options or "seed" in self.options


@dataclass
class Seen:
    """What the load has shown."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)


def memory() -> dict[str, int]:
    """Bytes of this process: resident, and of those what no other process shares."""
    found = {"rss": 0, "uss": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, *rest = line.split()
        if name == "Rss:":
            found["rss"] = 1024 * int(rest[0])
        elif name in ("Private_Clean:", "Private_Dirty:"):
            found["uss"] += 1024 * int(rest[0])
    return found


class Sampler(threading.Thread):
    """Notes memory, threads and open files every few seconds."""

    def __init__(self, start: float) -> None:
        super().__init__(daemon=True)
        self._start, self.over = start, threading.Event()
        self.samples: list[dict[str, Any]] = []

    def run(self) -> None:
        while not self.over.wait(SAMPLE_S):
            files = len(list(Path("/proc/self/fd").iterdir()))
            self.samples.append(
                {
                    "minute": round((time.monotonic() - self._start) / 60, 3),
                    **memory(),
                    "threads": threading.active_count(),
                    "files": files,
                }
            )


class Load:
    """Makes requests and checks their texts.

    Args:
        engine: Engine under load.
        reference: Another model of the same bundle, for single runs.
        seed: Seed of all that is random.
    """

    def __init__(self, engine: Engine, reference: TriModeModel, seed: int) -> None:
        self._engine, self._reference = engine, reference
        self._rng = random.Random(seed)
        self._questions = examples(seed, "held-out")
        self._ended: deque[Asked] = deque(maxlen=6)
        vocab = engine.model.model.vocab_size
        self._stems = [self._tokens(length) for length in (60, 255, 256, 257, 512, 1500)]
        self._biases = [
            {token: -100.0 for token in range(vocab) if token % MARKERS != marker}
            for marker in range(MARKERS)
        ]
        self.seen = Seen()

    def fill(self, max_rows: int) -> None:
        """Have caches of every capacity with all rows, so that they grow no more."""
        for stem in self._stems:
            prompts = [[*stem, token] for token in range(12, 12 + max_rows)]
            handles = [self._engine.submit(ids, max_new_tokens=2) for ids in prompts]
            for handle in handles:
                handle.result(300)

    def burst(self) -> None:
        """Submit some requests, end a few of them early, wait, and check."""
        asked: list[Asked] = []
        for _ in range(self._rng.choice((1, 1, 2, 4, 8, 16))):
            asked += self._submit()
        if self._rng.random() < 0.3:
            asyncio.run(self._end_in_asyncio(asked))
        for one in asked:
            self._end(one)
        singles: dict[Any, list[int]] = {}
        for one in asked:
            self._check(one, singles)
        self._ended += [one for one in asked if one.handle.error is None]

    def _tokens(self, count: int) -> list[int]:
        vocab = self._engine.model.model.vocab_size
        return [self._rng.randrange(12, vocab) for _ in range(count)]

    def _prompt(self) -> list[int]:
        """A question, or random tokens, mostly behind a beginning that others share."""
        codec = self._engine.model.codec
        if self._rng.random() < 0.6:
            return codec.encode_chat([{"role": "user", "content": next(self._questions).prompt}])
        stem = self._rng.choices(self._stems, (6, 4, 4, 4, 2, 1))[0]
        mask = [self._engine.model.model.mask_token_id] * self._rng.choice((0, 0, 0, 3))
        return [*stem[: self._rng.choice((31, 32, 33, len(stem)))], *mask, *self._tokens(2)]

    def _choices(self) -> tuple[Any, dict[str, Any], int | None]:
        mode, marker = self._rng.choice(MODES), None
        chosen: dict[str, Any] = {"max_new_tokens": self._rng.choice((1, 7, 32, 60, 120))}
        if self._rng.random() < 0.2:
            chosen["stop"] = self._rng.choice(STOPS)
        if self._rng.random() < 0.1:
            chosen["eos_token_ids"] = ()
        kind = self._rng.random()
        if kind < 0.15 and mode != "auto":
            chosen |= {"temperature": 0.8, "top_p": 0.95, "seed": self._rng.randrange(10**6)}
        elif kind < 0.3 and mode != "diffusion":
            marker = self._rng.randrange(MARKERS)
            chosen |= {"temperature": 1.0, "logit_bias": self._biases[marker], "eos_token_ids": ()}
            chosen.pop("stop", None)
        return mode, chosen, marker

    def _submit(self) -> list[Asked]:
        mode, chosen, marker = self._choices()
        around: dict[str, Any] = {
            "cache_salt": self._rng.choice(("", "a", "b")),
            "priority": self._rng.choice((0, 0, 1)),
            "timeout_s": self._rng.choice((None, None, None, None, 0.05, 0.5)),
            "n": self._rng.choice((1, 1, 1, 1, 2, 4)),
        }
        if self._ended and self._rng.random() < 0.2:
            before = self._rng.choice(self._ended).handle
            turn = self._tokens(5)
            room = self._engine.model.model.max_length
            if len(before.prompt) + len(before.token_ids) + 200 < room:
                self.seen.counts["follow_up"] += 1
                handle = self._engine.follow_up(before, turn, mode=mode, **chosen, **around)
                return self._noted(handle, mode, chosen, marker)
        handle = self._engine.submit(self._prompt(), mode=mode, **chosen, **around)
        return self._noted(handle, mode, chosen, marker)

    def _noted(
        self, handle: Handle, mode: Any, chosen: dict[str, Any], marker: int | None
    ) -> list[Asked]:
        self.seen.counts[f"mode {mode}"] += len(handle.choices)
        self.seen.counts["forks"] += len(handle.choices) - 1
        found = []
        for number, choice in enumerate(handle.choices):
            options = dict(chosen)
            if "seed" in options:
                options["seed"] += number
            found.append(Asked(choice, mode, options, marker))
        return found

    async def _end_in_asyncio(self, asked: list[Asked]) -> None:
        """Wait for some on an event loop; cancel the task of one, and so its request."""
        some = self._rng.sample(asked, min(4, len(asked)))

        async def answer(one: Asked) -> None:
            with contextlib.suppress(RequestTimeoutError, RequestCancelledError):
                async for _ in one.handle:
                    pass

        tasks = [asyncio.ensure_future(answer(one)) for one in some]
        await asyncio.sleep(0.02 * self._rng.random())
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.seen.counts["asyncio"] += len(some)

    def _end(self, one: Asked) -> None:
        """Wait for the end, or bring it about."""
        way = self._rng.random()
        if way < 0.08:
            one.handle.cancel()
        elif way < 0.16:
            with contextlib.suppress(RequestTimeoutError, RequestCancelledError):
                next(iter(one.handle), None)
            one.handle.cancel()
        with contextlib.suppress(RequestTimeoutError, RequestCancelledError):
            one.handle.result(600)  # a busy machine may stand still

    def _check(self, one: Asked, singles: dict[Any, list[int]]) -> None:
        found, error = one.handle.token_ids, one.handle.error
        if isinstance(error, RequestTimeoutError | RequestCancelledError):
            self.seen.counts[type(error).__name__] += 1
        elif error is not None:
            self._note(one, f"{type(error).__name__}: {error}")
            return
        if one.marker is not None:
            self.seen.counts["marked"] += 1
            if any(token % MARKERS != one.marker for token in found):
                self._note(one, "token of another marker")
        if not one.is_repeatable:
            return
        key = tuple(one.handle.prompt), one.mode, repr(sorted(one.options.items()))
        if key not in singles:
            singles[key] = self._single(one)
        expected = singles[key]
        self.seen.counts["compared" if error is None else "compared beginnings"] += 1
        if found != (expected if error is None else expected[: len(found)]):
            self._differs(one, expected)

    def _single(self, one: Asked, **more: Any) -> list[int]:
        mode = "ar" if one.mode == "auto" else one.mode
        stream = self._reference.stream([one.handle.prompt], mode, **one.options, **more)
        return list(stream.finish().token_ids)

    def _differs(self, one: Asked, expected: list[int]) -> None:
        """Note a text that is not the single run's; two equally likely tokens are told apart."""
        found = one.handle.token_ids
        pairs = enumerate(zip(found, expected, strict=False))
        place = next((n for n, (a, b) in pairs if a != b), min(len(found), len(expected)))
        if "temperature" not in one.options and self._is_tie(one, expected[:place]):
            self.seen.counts["ties"] += 1
            return
        self._note(one, f"differs at token {place}", expected=expected)

    def _is_tie(self, one: Asked, before: list[int]) -> bool:
        """Whether the two most likely tokens after these are equal but for rounding."""
        ids = [[*one.handle.prompt, *before]]
        result = self._reference.stream(ids, "ar", max_new_tokens=1, logprobs=2).finish()
        assert result.logprobs is not None
        first, second = (value for _, value in result.logprobs[0].top[:2])
        return bool(first - second < TIE)

    def _note(self, one: Asked, what: str, expected: list[int] | None = None) -> None:
        print("WRONG:", what, one.mode, one.options if one.marker is None else one.marker)
        self.seen.wrong.append(
            {
                "what": what,
                "mode": one.mode,
                "options": {k: v for k, v in one.options.items() if k != "logit_bias"},
                "prompt": one.handle.prompt,
                "found": one.handle.token_ids,
                "expected": expected,
            }
        )


def growth(samples: list[dict[str, Any]], warm_up: float, name: str) -> dict[str, float]:
    """Mean of the last ten minutes over that of the first ten after the warm-up, less 1; shorter
    runs compare as many minutes as half of what is left.
    """
    end = samples[-1]["minute"]
    window = min(10.0, (end - warm_up) / 2)
    first = [one[name] for one in samples if warm_up <= one["minute"] < warm_up + window]
    last = [one[name] for one in samples if one["minute"] >= end - window]
    return {
        "first_bytes": float(np.mean(first)),
        "last_bytes": float(np.mean(last)),
        "growth": float(np.mean(last) / np.mean(first) - 1),
        "growth_of_medians": float(np.median(last) / np.median(first) - 1),
        "growth_of_most": max(last) / max(first) - 1,
    }


def keep_up(load: Load, start: float, until: float, duty: float) -> None:
    """Bursts until a time; rest between them for the share of the core."""
    told = start
    while (now := time.monotonic()) < until:
        load.burst()
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{(told - start) / 60:.1f} min", dict(load.seen.counts), memory(), flush=True)
        busy = time.process_time() / duty
        time.sleep(min(max(0.0, busy - (now - start)), 5.0, max(0.0, until - now)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, default=5.0, help="minutes that do not count")
    parser.add_argument("--duty", type=float, default=0.3, help="share of one core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-bytes", type=int, default=8 << 20)
    args = parser.parse_args()
    with (
        TriModeModel.from_pretrained(args.bundle, num_threads=1, target="portable") as opened,
        TriModeModel.from_pretrained(args.bundle, num_threads=1, target="portable") as reference,
    ):
        timings = measured(opened, 1, 5)
        model = TriModeModel(opened.bundle, opened.session, opened.target, 1, timings)
        start = time.monotonic()
        sampler = Sampler(start)
        sampler.start()
        with Engine(model, max_rows=MAX_ROWS, kv_bytes=args.kv_bytes) as engine:
            load = Load(engine, reference, args.seed)
            load.fill(MAX_ROWS)
            keep_up(load, start, start + 60 * args.minutes, args.duty)
            stats = engine.stats()
        sampler.over.set()
        sampler.join()
    grown = {name: growth(sampler.samples, args.warm_up, name) for name in ("uss", "rss")}
    is_passed = not load.seen.wrong and all(one["growth"] <= MOST_GROWTH for one in grown.values())
    record = {
        "arguments": arguments_of(vars(args)),
        "is_passed": is_passed,
        "memory": grown,
        "counts": dict(load.seen.counts),
        "wrong": load.seen.wrong,
        "rows_left": stats.running,
        "stats": {**vars(stats), "mode_switches": len(stats.mode_switches)},
        "processor_s": time.process_time(),
        "samples": sampler.samples,
    }
    save("soak", record)
    print(grown, dict(load.seen.counts), "passed" if is_passed else "FAILED")
    sys.exit(not is_passed)


if __name__ == "__main__":
    main()

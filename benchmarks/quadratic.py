"""Quadratic against linear self-speculation and AR on the demo bundle: acceptance length, tokens
per forward, tokens per second.

    trimode build artifacts/nld-tiny -o BUNDLE --quadratic
    python -m benchmarks.quadratic BUNDLE [--threads 2] [--prompts 18] [--rounds 3]

Without the drafter in both, as the reference drafts in quadratic mode; with it in one more row. All
are timed in turns, round after round.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from benchmarks.common import arguments_of, median, save
from trimode.calib.demo.tasks import examples
from trimode.runtime import TriModeModel

MAX_NEW_TOKENS = 192
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ar": ("ar", {}),
    **{
        f"linear-spec {n}": ("linear_spec", {"block_length": n, "use_drafter": False})
        for n in (8, 16, 32)
    },
    "linear-spec 32, drafter": ("linear_spec", {"block_length": 32}),
    **{f"quadratic-spec {n}": ("quadratic_spec", {"block_length": n}) for n in (4, 8, 16, 32)},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = TriModeModel.from_pretrained(args.bundle, num_threads=args.threads)
    chosen = itertools.islice(examples(1, "held-out"), args.prompts)
    prompts = [
        model.codec.encode_chat([{"role": "user", "content": example.prompt}]) for example in chosen
    ]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _, (name, (mode, options)) in itertools.product(range(args.rounds), WAYS.items()):
        rounds[name].append(measure(model, prompts, mode, options))
    report(rounds, arguments_of(vars(args)))


def measure(
    model: TriModeModel, prompts: list[list[int]], mode: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """One round of a mode over all prompts."""
    results = []
    for prompt in prompts:
        stream = model.stream([prompt], mode, max_new_tokens=MAX_NEW_TOKENS, **options)
        for _ in stream:
            pass
        results.append(stream.result)
    tokens, nfe = sum(len(r.token_ids) for r in results), sum(r.nfe for r in results)
    cycles = sum(r.forwards.verify + r.forwards.quadratic for r in results)
    # its first token comes from the prefill, not from a cycle
    first = 1 if mode == "linear_spec" else 0
    return {
        "token_ids": [r.token_ids for r in results],
        "tokens_per_s": tokens / sum(r.elapsed_s for r in results),
        "tokens_per_forward": tokens / nfe,
        "acceptance_length": (tokens - first * len(prompts)) / cycles if cycles else None,
    }


def report(rounds: dict[str, list[dict[str, Any]]], arguments: dict[str, str]) -> None:
    rows = {}
    for name, found in rounds.items():
        speeds = [one["tokens_per_s"] for one in found]
        rows[name] = {
            **{key: found[0][key] for key in ("tokens_per_forward", "acceptance_length")},
            "tokens_per_s": speeds,
            "same_tokens_as_ar": sum(
                a == b
                for a, b in zip(found[0]["token_ids"], rounds["ar"][0]["token_ids"], strict=True)
            ),
        }
        acceptance = (
            f"{rows[name]['acceptance_length']:.2f}" if rows[name]["acceptance_length"] else ""
        )
        print(
            f"{name:24s} acceptance {acceptance:>6s}   tokens per forward "
            f"{rows[name]['tokens_per_forward']:6.2f}   {median(speeds):7.0f} tokens/s"
            f"   as AR: {rows[name]['same_tokens_as_ar']} of {len(found[0]['token_ids'])}"
        )
    save("quadratic", {"arguments": arguments, "ways": rows})


if __name__ == "__main__":
    main()

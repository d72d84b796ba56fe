"""Exact match, tokens per forward and acceptance length of the demo bundle, per task family and
mode, on held-out prompts.

python -m benchmarks.demo_quality BUNDLE [--per-family 30]
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from benchmarks.common import save
from trimode.calib.demo.tasks import FAMILIES, examples
from trimode.runtime import TriModeModel
from trimode.runtime.decode.stream import Generation

MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "diffusion 0.9": {"mode": "diffusion", "threshold": 0.9},
    "diffusion 0.5": {"mode": "diffusion", "threshold": 0.5},
    "linear-spec": {"mode": "linear_spec"},
    "linear-spec, no drafter": {"mode": "linear_spec", "use_drafter": False},
}


def measure(model: TriModeModel, family: str, count: int) -> dict[str, dict[str, float | None]]:
    chosen = list(itertools.islice(examples(7, "held-out", [family]), count))
    rows: dict[str, dict[str, float | None]] = {}
    ar: list[list[int]] = []
    for name, options in MODES.items():
        results: list[tuple[Generation, bool]] = []
        for example in chosen:
            stream = model.stream(
                [model.codec.encode_chat([{"role": "user", "content": example.prompt}])],
                max_new_tokens=192,
                **options,
            )
            for _ in stream:
                pass
            results.append(
                (stream.result, model.codec.decode(stream.result.token_ids) in example.answers)
            )
        if name == "ar":
            ar = [r.token_ids for r, _ in results]
        tokens, nfe = sum(len(r.token_ids) for r, _ in results), sum(r.nfe for r, _ in results)
        cycles = sum(r.forwards.verify for r, _ in results)
        rows[name] = {
            "exact_match": sum(right for _, right in results) / count,
            "tokens": tokens,
            "nfe": nfe,
            "tokens_per_forward": tokens / nfe,
            "acceptance_length": sum(
                (r.acceptance_length or 0) * r.forwards.verify for r, _ in results
            )
            / cycles
            if cycles
            else None,
            "same_tokens_as_ar": sum(
                r.token_ids == text for (r, _), text in zip(results, ar, strict=True)
            )
            / count,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--per-family", type=int, default=30)
    args = parser.parse_args()
    model = TriModeModel.from_pretrained(args.bundle)
    table = {family: measure(model, family, args.per_family) for family in FAMILIES}
    print(f"{'family':10s}" + "".join(f"{name:>26s}" for name in MODES))
    for family, rows in table.items():
        print(f"{family:10s}" + "".join(f"{cell(rows[name]):>26s}" for name in MODES))
    print("each cell: exact match / tokens per forward / acceptance length")
    save(
        "demo_quality",
        {
            "per_family": args.per_family,
            "source_sha256": model.bundle.manifest.source.sha256,
            "families": table,
        },
    )


def cell(row: dict[str, float | None]) -> str:
    acceptance = row["acceptance_length"]
    return f"{100 * row['exact_match']:.0f}% / {row['tokens_per_forward']:.2f}" + (
        f" / {acceptance:.1f}" if acceptance else ""
    )


if __name__ == "__main__":
    main()

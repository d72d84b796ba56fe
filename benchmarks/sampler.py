"""Block diffusion under each policy: exact match against tokens per forward, over thresholds.

python -m benchmarks.sampler prompts FILE [--count 800]
    writes prompts of the training split, for `trimode calibrate sampler --data`
python -m benchmarks.sampler measure BUNDLE [--per-family 30] [--block-length 32]
    [--only NAME,...] [--figure FILE]

The bundle is one of the demo checkpoint with a learned sampler. Questions are of the held-out
split, and no sampler was trained on them. Greedy, batch 1, forwards counted as everywhere:
denoising and commits.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, held_out_questions, save, write_prompts
from trimode.calib.demo.tasks import Example
from trimode.report.quantization_figure import load_matplotlib
from trimode.runtime import TriModeModel

MAX_NEW_TOKENS = 128
POLICIES: dict[str, list[dict[str, Any]]] = {
    "threshold": [{"threshold": value} for value in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)],
    "learned": [{"threshold": value} for value in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)],
    "margin": [{"threshold": value} for value in (0.5, 0.7, 0.8, 0.9)],
    "schedule": [{"steps": value} for value in (2, 4, 8)],
    "leftmost": [{}],
}


def answer(
    model: TriModeModel, questions: list[Example], length: int, name: str, options: dict[str, Any]
) -> dict[str, Any]:
    chosen = {
        key: min(value, length) if key == "steps" else value for key, value in options.items()
    }
    right = tokens = nfe = 0
    elapsed_s = 0.0
    for question in questions:
        ids = model.codec.encode_chat([{"role": "user", "content": question.prompt}])
        stream = model.stream(
            [ids],
            "diffusion",
            sampler=name,
            block_length=length,
            max_new_tokens=MAX_NEW_TOKENS,
            **chosen,
        )
        right += "".join(stream.text()) in question.answers
        tokens, nfe, elapsed_s = (
            tokens + len(stream.result.token_ids),
            nfe + stream.result.nfe,
            elapsed_s + stream.result.elapsed_s,
        )
    return {
        "sampler": name,
        **chosen,
        "exact_match": right / len(questions),
        "num_right": right,
        "tokens": tokens,
        "nfe": nfe,
        "tokens_per_forward": tokens / nfe,
        "elapsed_s": elapsed_s,
    }


def speed_at(rows: list[dict[str, Any]], exact_match: float) -> float | None:
    """Tokens per forward of the fastest row that is at least so exact; None where there is none."""
    return max(
        (row["tokens_per_forward"] for row in rows if row["exact_match"] >= exact_match - 1e-9),
        default=None,
    )


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    figure = load_matplotlib().Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, style in (
        ("threshold", "o-"),
        ("learned", "s-"),
        ("margin", "^:"),
        ("schedule", "x:"),
        ("leftmost", "D"),
    ):
        own = [row for row in rows if row["sampler"] == name]
        axes.plot(
            [row["tokens_per_forward"] for row in own],
            [100 * row["exact_match"] for row in own],
            style,
            label=name,
        )
        if name in ("threshold", "learned"):
            for row in own:
                point = (row["tokens_per_forward"], 100 * row["exact_match"])
                axes.annotate(
                    f"{row['threshold']:g}",
                    point,
                    textcoords="offset points",
                    xytext=(5, 5 if name == "learned" else -12),
                    fontsize=7,
                )
    axes.set(title=title, xlabel="tokens per forward", ylabel="exact match, %")
    axes.set_ylim(
        bottom=100
        * min(
            (row["exact_match"] for row in rows if row["sampler"] in ("threshold", "learned")),
            default=0,
        )
        - 2
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=100)


def measure(options: argparse.Namespace) -> None:
    model = TriModeModel.from_pretrained(options.bundle, num_threads=options.threads)
    record, source = model.bundle.manifest.sampler, model.bundle.manifest.source.sha256
    questions = held_out_questions(options.per_family)
    names = [name for name in POLICIES if name in options.only.split(",")]
    assert record is not None or "learned" not in names, "build the bundle with --sampler"
    setting = {
        "questions": len(questions),
        "block_length": options.block_length,
        "source_sha256": source,
    }
    rows = [row for row in earlier_rows(setting) if row["sampler"] not in names]
    print(f"{'sampler':10s}{'':>14s}{'exact':>9s}{'tokens/fwd':>12s}")
    for name in names:
        for one in POLICIES[name]:
            rows.append(answer(model, questions, options.block_length, name, one))
            value = next((f"{key} {number:g}" for key, number in one.items()), "")
            print(
                f"{name:10s}{value:>14s}{100 * rows[-1]['exact_match']:>8.1f}%"
                f"{rows[-1]['tokens_per_forward']:>12.2f}",
                flush=True,
            )
    rows.sort(key=lambda row: list(POLICIES).index(row["sampler"]))
    by_name = {name: [row for row in rows if row["sampler"] == name] for name in POLICIES}
    equal = [
        {
            "exact_match": row["exact_match"],
            "threshold": speed_at(by_name["threshold"], row["exact_match"]),
            "learned": speed_at(by_name["learned"], row["exact_match"]),
        }
        for row in by_name["threshold"]
    ]
    print("fastest at an exact match of at least: threshold, learned")
    for row in equal:
        learned = math.nan if row["learned"] is None else row["learned"]
        print(f"{100 * row['exact_match']:6.1f}% {row['threshold']:6.2f} {learned:6.2f}")
    title = (
        f"{model.bundle.manifest.source.name}, block {options.block_length}, {len(questions)} "
        f"held-out questions"
    )
    RESULTS.mkdir(exist_ok=True)
    draw(rows, title, options.figure or RESULTS / f"sampler_{options.block_length}.png")
    save(
        f"sampler_{options.block_length}",
        {
            **setting,
            "sampler": record.model_dump(mode="json") if record else None,
            "rows": rows,
            "fastest_at_equal_exact_match": equal,
        },
    )


def earlier_rows(setting: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured before over the same questions."""
    path = RESULTS / f"sampler_{setting['block_length']}.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found["rows"] if all(found.get(key) == value for key, value in setting.items()) else []


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts")
    prompts.add_argument("file", type=Path)
    prompts.add_argument("--count", type=int, default=800)
    measuring = commands.add_parser("measure")
    measuring.add_argument("bundle", type=Path)
    measuring.add_argument("--per-family", type=int, default=30)
    measuring.add_argument("--block-length", type=int, default=32)
    measuring.add_argument("--threads", type=int)
    measuring.add_argument(
        "--only",
        default=",".join(POLICIES),
        help="policies to measure; rows of the others stay, where the questions are the same",
    )
    measuring.add_argument("--figure", type=Path, help="beside the raw results if left out")
    options = parser.parse_args()
    if options.command == "prompts":
        write_prompts(options.file, options.count)
    else:
        measure(options)


if __name__ == "__main__":
    main()

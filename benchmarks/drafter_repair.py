"""What training the drafter on the quantized model does: tokens a cycle on held-out questions,
before and after.

python -m benchmarks.drafter_repair [CHECKPOINT] [--precision int4] [--calibration CAL]
    [--prompts 400] [--steps 300] [--per-family 11]

A user's way, command by command: calibrate, train the adapter, build one bundle with the
checkpoint's adapter and one with the trained one, answer held-out questions with both. Prompts for
the first two are of the training split. All on the CPU, through the portable graphs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import held_out_questions, save, write_prompts
from trimode.calib.demo.tasks import FAMILIES
from trimode.calib.drafter.settings import DrafterJobSettings
from trimode.calib.scales.settings import QuantizeSettings
from trimode.cli.calibrate.drafter import drafter_command
from trimode.cli.calibrate.scales import run_calibrate
from trimode.cli.calibrate.training import run_training
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.formats.calibration import load_record
from trimode.formats.drafter import RECORD
from trimode.runtime import TriModeModel
from trimode.runtime.text.prompts import USUAL_STYLE

DEMO = Path(__file__).parents[1] / "artifacts" / "nld-tiny"
MODES: dict[str, dict[str, Any]] = {
    "no drafter": {"mode": "linear_spec", "use_drafter": False},
    "drafter": {"mode": "linear_spec"},
}


def measure(bundle: Path, per_family: int) -> dict[str, Any]:
    """Acceptance length and tokens per forward over all questions, by family too, and how many
    answers are unlike AR's.
    """
    model = TriModeModel.from_pretrained(bundle)
    questions = held_out_questions(per_family)
    ids = [
        model.codec.encode_chat([{"role": "user", "content": question.prompt}])
        for question in questions
    ]
    greedy = [
        model.ar_generate([one], max_new_tokens=192)[0][0, len(one) :].tolist() for one in ids
    ]
    results: dict[str, Any] = {}
    for name, options in MODES.items():
        counts: dict[str, list[int]] = {family: [0, 0] for family in FAMILIES}
        tokens = nfe = unlike = 0
        for question, one, expected in zip(questions, ids, greedy, strict=True):
            stream = model.stream([one], max_new_tokens=192, **options)
            for _ in stream:
                pass
            tokens, nfe, unlike = (
                tokens + len(stream.result.token_ids),
                nfe + stream.result.nfe,
                unlike + (stream.result.token_ids != expected),
            )
            cycles = stream.result.forwards.verify
            counts[question.family][0] += round((stream.result.acceptance_length or 0) * cycles)
            counts[question.family][1] += cycles
        results[name] = {
            "questions": len(questions),
            "acceptance_length": sum(drafted for drafted, _ in counts.values())
            / sum(cycles for _, cycles in counts.values()),
            "tokens_per_forward": tokens / nfe,
            "tokens": tokens,
            "nfe": nfe,
            "unlike_ar": unlike,
            "families": {
                family: drafted / cycles for family, (drafted, cycles) in counts.items() if cycles
            },
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--calibration", type=Path, help="an existing one, instead of calibrating")
    parser.add_argument("--samples", type=int, default=24, help="prompts to calibrate with")
    parser.add_argument(
        "--prompts",
        type=int,
        default=400,
        help="prompts to train on, an eighth of them (at most 32) to decide by",
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--per-family", type=int, default=11)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with a training that was interrupted; needs --work",
    )
    parser.add_argument(
        "--work", type=Path, help="folder to keep what is made in; a temporary one if left out"
    )
    options = parser.parse_args()
    if options.work is None:
        with tempfile.TemporaryDirectory() as name:
            run(options, Path(name))
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        run(options, options.work)


def run(options: argparse.Namespace, folder: Path) -> None:
    write_prompts(folder / "prompts.jsonl", options.prompts + 16)
    calibration = options.calibration or folder / "calibration"
    if options.calibration is None and not options.resume:
        run_calibrate(
            options.checkpoint,
            calibration,
            folder / "prompts.jsonl",
            QuantizeSettings(options.precision, num_samples=options.samples),
            style=USUAL_STYLE,
            as_json=True,
        )
    settings = DrafterJobSettings(
        steps=options.steps, num_held_out=16, from_scratch=options.from_scratch
    )
    run_training(
        drafter_command(),
        options.checkpoint,
        folder / "adapter",
        folder / "prompts.jsonl",
        settings,
        style=USUAL_STYLE,
        calibration=calibration,
        resume=options.resume,
    )
    results = {}
    for name, adapter in (("before", None), ("after", folder / "adapter")):
        bundle = folder / f"bundle-{name}"
        build_bundle(
            options.checkpoint,
            bundle,
            BuildOptions(
                calibration=calibration, drafter=adapter, cache=folder / "cache", force=True
            ),
        )
        results[name] = measure(bundle, options.per_family)
    record = load_record(calibration)
    save(
        "drafter_repair",
        {
            "calibration": {
                "precision": record.precision,
                "data": record.data.model_dump() if record.data else None,
            },
            "training": json.loads((folder / "adapter" / RECORD).read_text()),
            "results": results,
        },
    )
    print(f"{'':10s}{'':12s}{'acceptance':>12s}{'tokens/fwd':>12s}{'unlike AR':>12s}")
    for bundle_name, modes in results.items():
        for mode, row in modes.items():
            print(
                f"{bundle_name:10s}{mode:12s}{row['acceptance_length']:12.3f}{row['tokens_per_forward']:12.3f}{row['unlike_ar']:12d}"
            )


if __name__ == "__main__":
    main()

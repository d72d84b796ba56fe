"""What quantization does to each mode: exact match, acceptance length and tokens per forward of the
demo, by precision and calibration.

python -m benchmarks.quantization [--per-family 30] [--samples 64]

Calibration prompts are of the training split, questions of the held-out one. All on the CPU through
the portable graphs, which compute in float32 with the quantized weights and inputs. For each
precision: calibrated with the rows of all modes, and of AR alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, Literal

from benchmarks.common import save, write_prompts
from benchmarks.demo_quality import measure
from trimode.calib.demo.tasks import FAMILIES
from trimode.calib.scales.settings import QuantizeSettings
from trimode.cli.calibrate.scales import run_calibrate
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.formats.contract import GRAPH_NAMES, GraphName
from trimode.runtime import TriModeModel
from trimode.runtime.text.prompts import USUAL_STYLE

DEMO = Path(__file__).parents[1] / "artifacts" / "nld-tiny"
AR_ALONE: tuple[GraphName, ...] = ("ar",)
PRECISIONS = ("fp8", "int8", "int4")


def evaluate(model: TriModeModel, per_family: int) -> dict[str, Any]:
    """Families weighted equally; acceptance per cycle and tokens per forward over all of them;
    whether self-speculation wrote AR's text.
    """
    table = {family: measure(model, family, per_family) for family in FAMILIES}
    modes: dict[str, Any] = {}
    for mode in next(iter(table.values())):
        rows = [families[mode] for families in table.values()]
        accepted = [row["acceptance_length"] for row in rows if row["acceptance_length"]]
        modes[mode] = {
            "exact_match": sum(row["exact_match"] or 0 for row in rows) / len(rows),
            "tokens_per_forward": sum(row["tokens"] or 0 for row in rows)
            / sum(row["nfe"] or 0 for row in rows),
            "acceptance_length": sum(accepted) / len(accepted) if accepted else None,
            "same_tokens_as_ar": sum(row["same_tokens_as_ar"] or 0 for row in rows) / len(rows),
        }
    return {"weight_bytes": model.bundle.chosen.weight_bytes, "modes": modes, "families": table}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--per-family", type=int, default=30)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl", options.samples)
        build_bundle(DEMO, folder / "fp32")
        results["fp32"] = evaluate(
            TriModeModel.from_pretrained(folder / "fp32"), options.per_family
        )
        for precision in PRECISIONS:
            calibrations: dict[str, Path | Literal["rtn"]] = {}
            for label, modes in (("all modes", GRAPH_NAMES), ("ar alone", AR_ALONE)):
                calibrations[label] = output = folder / f"{precision}-{'-'.join(modes)}"
                settings = QuantizeSettings(precision, modes)
                data = folder / "prompts.jsonl"
                run_calibrate(DEMO, output, data, settings, style=USUAL_STYLE, as_json=True)
            if precision != "fp8":
                calibrations["rounded to nearest"] = "rtn"
            for label, calibration in calibrations.items():
                bundle = folder / f"bundle-{precision}-{label.replace(' ', '-')}"
                build_bundle(
                    DEMO, bundle, BuildOptions(precision=precision, calibration=calibration)
                )
                results[f"{precision}, {label}"] = evaluate(
                    TriModeModel.from_pretrained(bundle), options.per_family
                )
    save(
        "quantization",
        {"per_family": options.per_family, "samples": options.samples, "results": results},
    )
    print(f"{'':26s}{'MB':>7s}" + "".join(f"{mode:>26s}" for mode in results["fp32"]["modes"]))
    for label, result in results.items():
        print(
            f"{label:26s}{result['weight_bytes'] / 1e6:7.1f}"
            + "".join(f"{_cell(row):>26s}" for row in result["modes"].values())
        )
    print("each cell: exact match / tokens per forward / acceptance length")


def _cell(row: dict[str, Any]) -> str:
    accepted = row["acceptance_length"]
    return f"{100 * row['exact_match']:.1f}% / {row['tokens_per_forward']:.2f}" + (
        f" / {accepted:.1f}" if accepted else ""
    )


if __name__ == "__main__":
    main()

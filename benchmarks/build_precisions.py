"""Time and memory of building 8B for one GPU, for each precision, with nothing cached.

python -m benchmarks.build_precisions                    four layers, then all; every precision
python -m benchmarks.build_precisions bf16 --layers 4    one of them; the others stay as they were

A sparse checkpoint of the true shape and byte count, with a drafter; bundles take up to 17 GB of
disk. Scales are those of rounding to nearest; of fp8, which needs measured inputs, any. Memory is
the proportional set size of the whole process tree. The machine's load is written down: other work
on it makes a build slower. Writes results/build_precisions.json after each build.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, save
from benchmarks.engine_scale import timed
from benchmarks.large import calibration_for, sparse_checkpoint

NAME, TARGET = "build_precisions", "rtx-pro-6000"
PRECISIONS = ("bf16", "fp8", "int8", "int4", "nvfp4")


def measure(precision: str, num_layers: int | None) -> dict[str, Any]:
    """One build in processes of its own, with a cache of its own."""
    with sparse_checkpoint("8b", num_layers) as checkpoint, tempfile.TemporaryDirectory() as cache:
        scales = calibration_for(checkpoint, precision, "tensor" if precision == "fp8" else None)
        bundle = checkpoint.with_name("bundle")
        command = [sys.executable, "-m", "trimode.cli.main", "build", str(checkpoint)]
        command += ["-o", str(bundle), "--target", TARGET, "--precision", precision]
        command += ["--calibration", str(scales)] if scales else []
        before = os.getloadavg()[0]
        try:
            measured = timed(command, Path(cache))
            manifest = json.loads((bundle / "manifest.json").read_text())
        finally:
            shutil.rmtree(bundle, ignore_errors=True)
    files = {name: record["num_bytes"] for name, record in manifest["files"].items()}
    return {
        "precision": precision,
        "layers": num_layers or "all",
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "engine_bytes": sum(size for name, size in files.items() if name.endswith(".engine")),
        "bundle_bytes": sum(files.values()),
        **measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("precisions", nargs="*", choices=[*PRECISIONS, []])
    parser.add_argument("--layers", type=int, help="only so many; 0 = all; default: 4, then all")
    options = parser.parse_args()
    depths = (4, None) if options.layers is None else (options.layers or None,)
    path = RESULTS / f"{NAME}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["builds"] if path.exists() else []
    for num_layers in depths:
        for precision in options.precisions or PRECISIONS:
            one = measure(precision, num_layers)
            place = (precision, num_layers or "all")
            found = [*(old for old in found if (old["precision"], old["layers"]) != place), one]
            save(NAME, {"size": "8b", "target": TARGET, "builds": found})


if __name__ == "__main__":
    main()

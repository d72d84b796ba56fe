"""G5: calibration with ModelOpt on the GPU: minutes and memory at a published size, and whether its
scales are the CPU's.

python -m benchmarks.gpu.g5_calibration [--size 8b] [--precisions fp8,int4]
python -m benchmarks.gpu.g5_calibration --device cpu --size tiny

The large checkpoint is random, and so are the prompts: time and memory do not depend on what they
say. Scales are compared on the tiny checkpoint, calibrated on the GPU and on the CPU from the same
prompts: answers are greedy, and the same, as long as no two tokens are nearly equal.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.common import TINY, arguments, save, show, write_random_checkpoint
from trimode.calib.data.prompts import Prompts
from trimode.calib.scales.job import ScalesJob
from trimode.calib.scales.settings import QuantizeSettings
from trimode.formats.calibration import QuantizedPrecision, Scales, load_calibration
from trimode.graphs.checkpoint import describe_model, open_checkpoint

NUM_PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 8, 64, 32


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._start = "", 0.0

    def stage(self, name: str, total: int) -> Callable[[int], None]:  # noqa: ARG002
        self.end()
        self._stage, self._start = name, time.perf_counter()
        return lambda _steps: None

    def end(self) -> None:
        if self._stage:
            self.seconds[self._stage] = (
                self.seconds.get(self._stage, 0.0) + time.perf_counter() - self._start
            )
        self._stage = ""


def run(
    checkpoint: Path, output: Path, precision: QuantizedPrecision, device: str
) -> tuple[dict[str, Any], Scales]:
    opened = open_checkpoint(checkpoint)
    model = describe_model(opened, 1024)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, model.vocab_size, PROMPT_LENGTH).tolist() for _ in range(NUM_PROMPTS)]
    settings = QuantizeSettings(precision, max_new_tokens=NEW_TOKENS, device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watch, start = Stopwatch(), time.perf_counter()
    ScalesJob(opened, model, Prompts(texts, ""), output, settings, watch).run()
    watch.end()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    measured = {
        "precision": precision,
        "device": device,
        "minutes": (time.perf_counter() - start) / 60,
        "peak_gpu_bytes": peak,
    }
    return {**measured, "seconds_by_stage": watch.seconds}, load_calibration(output)[1]


def largest_difference(found: Scales, expected: Scales) -> float:
    """Relative, over all scales."""
    return max(
        float(np.max(np.abs(found[name] - expected[name]) / expected[name])) for name in expected
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--precisions", default="fp8,int4")
    options = parser.parse_args()
    measured: dict[str, Any] = {
        "size": options.size,
        "prompts": NUM_PROMPTS,
        "new_tokens": NEW_TOKENS,
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(folder / "tiny", TINY)
        write_random_checkpoint(folder / "large", options.size)
        for precision in options.precisions.split(","):
            here, there = (
                run(folder / "tiny", folder / f"tiny-{precision}-{device}", precision, device)[1]
                for device in (options.device, "cpu")
            )
            record, _ = run(
                folder / "large", folder / f"large-{precision}", precision, options.device
            )
            measured["runs"].append(
                {**record, "largest_relative_difference_from_cpu": largest_difference(here, there)}
            )
    save(f"g5_calibration_{options.device}", measured)
    show(
        measured["runs"],
        ("precision", "minutes", "peak_gpu_bytes", "largest_relative_difference_from_cpu"),
    )


if __name__ == "__main__":
    main()

"""Cost tables of machines that are not here: published throughput, rooflines, and one CPU's own.

Nothing here was measured by us on a GPU. The B200's table is what published tokens a second imply;
the others follow from bandwidth and arithmetic, with the launch time that published speeds of one
text imply.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.common import RESULTS
from trimode.compiler.targets import TARGETS
from trimode.formats.contract import GraphName
from trimode.runtime.auto.timings import read_timings
from trimode.runtime.engine.load.cost_table import Cell, CostTable

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
LENGTHS = (4, 8, 16, 32)
PROMPT_TOKENS = (128, 512)
CPU_TIMINGS = RESULTS / "forward_times_cpu.json"

# SGLang on one B200, BF16, output tokens a second at 1, 2, 4, ... 128 requests: AR of Qwen3-8B,
# and linear self-speculation of the 8B model's predecessor.
B200_AR = (222, 424, 834, 1599, 3027, 5317, 7906, 11774)
B200_SPECULATION = {
    32: (440, 777, 1317, 2204, 3069, 3651, 4024, 4230),
    64: (433, 738, 1248, 1784, 2223, 2451, 2510, 2602),
}
B200_CYCLE_TOKENS = {32: 2 * 3.36, 64: 2 * 3.44}
"""Tokens a cycle of two forwards."""

LAYER_PARAMETERS = 7.95e9
"""Of the 8B model: all that a forward reads, so without the embedding."""
CACHE_BYTES = 139_264
"""Of a token's keys and values in bf16."""
CACHED = (256, 1024, 4096)


def b200() -> CostTable:
    """The table that published throughput on a B200 implies."""
    ar = [Cell(n, 1, 1024, 1e3 * n / speed) for n, speed in zip(ROWS, B200_AR, strict=True)]
    prompts = b200_cells(PROMPT_TOKENS)
    blocks = b200_cells(LENGTHS)
    return CostTable({"ar": ar + prompts, "draft": blocks, "verify": blocks}, is_frozen=True)


def b200_forward_ms(num_tokens: int) -> float:
    """Milliseconds of a forward of so many tokens in all, between the published ones.

    Below 32 tokens it is held: from 8 to 16 a forward grows by 2%, as published for 14B.
    """
    known = {
        n * length: 1e3 * n * B200_CYCLE_TOKENS[length] / speed / 2
        for length in (64, 32)
        for n, speed in zip(ROWS, B200_SPECULATION[length], strict=True)
    }
    tokens = np.array(sorted(known), float)
    ms = np.array([known[int(one)] for one in tokens])
    if num_tokens > tokens[-1]:
        return float(ms[-1] * num_tokens / tokens[-1])
    return float(np.exp(np.interp(np.log(num_tokens), np.log(tokens), np.log(ms))))


def b200_cells(lengths: tuple[int, ...]) -> list[Cell]:
    return [Cell(n, k, 1024, b200_forward_ms(n * k)) for n in ROWS for k in lengths]


@dataclass(frozen=True)
class Gpu:
    """Describes a GPU by what bounds a forward.

    Attributes:
        target: Name among the compiler's targets, which has the bandwidth.
        weight_bits: Bits of a weight.
        tflops: Dense arithmetic at this precision, in 10^12 operations a second.
        ar_tokens_per_s: Published speed of one text in AR; None where none is known.
    """

    target: str
    weight_bits: int
    tflops: float
    ar_tokens_per_s: float | None = None


GPUS = {
    "rtx-pro-6000 fp8": Gpu("rtx-pro-6000", 8, 1000, 80),
    "dgx-spark fp8": Gpu("dgx-spark", 8, 250, 24.7),
    "dgx-spark int4": Gpu("dgx-spark", 4, 125, 41.8),
    "gb200 fp8": Gpu("gb200", 8, 5000, 256),
    "h100 bf16": Gpu("h100", 16, 989),
    "rtx-4090 int4": Gpu("rtx-4090", 4, 165),
}
BANDWIDTH_SHARE, ARITHMETIC_SHARE = 0.8, 0.4
"""Shares of the data sheet's figures that forwards are assumed to reach."""
USUAL_LAUNCH_MS = 1.0
ROW_MS = 0.02
"""Host time of a row, assumed."""


def roofline(gpu: Gpu) -> CostTable:
    """The table of the 8B model on a GPU: whichever is longer, memory or arithmetic."""
    bandwidth = BANDWIDTH_SHARE * (TARGETS[gpu.target].bandwidth_gb_s or 0) * 1e6
    weights_ms = LAYER_PARAMETERS * gpu.weight_bits / 8 / bandwidth
    launch_ms = USUAL_LAUNCH_MS
    if gpu.ar_tokens_per_s is not None:
        launch_ms = max(1e3 / gpu.ar_tokens_per_s - weights_ms - ROW_MS, 0.0)

    def ms(rows: int, tokens: int, cached: int) -> float:
        memory = weights_ms + rows * cached * CACHE_BYTES / bandwidth
        compute = 2 * LAYER_PARAMETERS * rows * tokens / (ARITHMETIC_SHARE * gpu.tflops * 1e9)
        return launch_ms + ROW_MS * rows + max(memory, compute)

    return _table(ms)


def _table(ms: object) -> CostTable:
    assert callable(ms)

    def cells(tokens: tuple[int, ...]) -> list[Cell]:
        return [Cell(n, k, c, ms(n, k, c)) for n in ROWS for k in tokens for c in CACHED]

    found: dict[GraphName, list[Cell]] = {
        "ar": cells((1, *PROMPT_TOKENS)),
        "draft": cells(LENGTHS),
        "verify": cells(LENGTHS),
    }
    return CostTable(found, is_frozen=True)


def cpu() -> CostTable:
    """What `trimode bench` measured of the demo bundle on one core of a small machine."""
    return CostTable.from_timings(read_timings(CPU_TIMINGS), use_drafter=True, is_frozen=True)


def machine(name: str) -> CostTable:
    """The table of a machine by its name."""
    if name == "b200 bf16":
        return b200()
    return cpu() if name == "cpu" else roofline(GPUS[name])


MACHINES = ("b200 bf16", *GPUS, "cpu")

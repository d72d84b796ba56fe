"""What the GPU checks share: where results go, what the machine is, random checkpoints of published
sizes, timing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.build_scale import SIZES, write_sparse_checkpoint
from benchmarks.common import RESULTS, machine

TINY = "tiny"
ROWS = (1, 8, 16, 32)
PASTS = (512, 4096)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options of every check: where it runs and how large."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--size", choices=(*SIZES, TINY), default="8b", help="tiny: to prove the script on a CPU"
    )
    return parser


def result_folder() -> Path:
    """``$OUT`` where that is set, else the repository's results; made where it is missing."""
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(name: str, measured: dict[str, Any]) -> None:
    """Write ``<name>.json`` to :func:`result_folder`: figures, GPU, driver, libraries, command."""
    folder = result_folder()
    command = " ".join(["python", "-m", f"benchmarks.gpu.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    record = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {**machine(), **gpu_facts()},
        **measured,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"raw results: {folder / name}.json")


def gpu_facts() -> dict[str, Any]:
    """Name, memory, driver and clocks as nvidia-smi says them; nothing where there is none."""
    query = "name,memory.total,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {"gpu": None, "python": platform.python_version()}
    return {
        "gpu": dict(
            zip(query.split(","), done.stdout.strip().splitlines()[0].split(", "), strict=False)
        )
    }


def write_random_checkpoint(folder: Path, size: str) -> int:
    """A bf16 checkpoint of a published size whose weights are small random numbers (one block of 64
    MiB, repeated); its bytes.

    Random, because a GPU draws less power, and so runs faster, on zeros.
    """
    num_bytes = (
        write_tiny_checkpoint(folder) if size == TINY else write_sparse_checkpoint(folder, size)
    )
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(1 << 25, np.float32) * 0.02).view("<u4") >> 16
    data = block.astype("<u2").tobytes()
    path = folder / "model.safetensors"
    with path.open("r+b") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        for begin in range(0, num_bytes, len(data)):
            stream.write(data[: num_bytes - begin])
    return num_bytes


def write_tiny_checkpoint(folder: Path) -> int:
    """Two layers of width 256: for a CPU."""
    SIZES[TINY] = (256, 512, 2, 1e6)
    return write_sparse_checkpoint(folder, TINY, vocab_size=512, heads=(4, 2, 64))


def median_ms(
    run: Callable[[], object], wait: Callable[[], object], repeats: int = 20, warm: int = 3
) -> float:
    """Median wall time of ``run``, each run followed by ``wait``."""
    times = []
    for index in range(warm + repeats):
        start = time.perf_counter()
        run()
        wait()
        if index >= warm:
            times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def show(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """A plain table, last thing printed."""
    widths = [max(len(c), *(len(_cell(row.get(c))) for row in rows)) for c in columns]
    for cells in (columns, *([_cell(row.get(c)) for c in columns] for row in rows)):
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)

"""What every benchmark shares: the machine's description, result files, process memory."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimode.calib.demo.tasks import Example

TRAIN_SEED, QUESTION_SEED = 3, 7
RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "onnxruntime", "torch", "transformers")


def save(name: str, measured: dict[str, Any]) -> None:
    """Write ``results/<name>.json``: what was measured, where, and by which command."""
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(
        [
            "python",
            "-m",
            f"benchmarks.{Path(sys.argv[0]).stem}",
            *map(without_folders, sys.argv[1:]),
        ]
    )
    record = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        **measured,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"raw results: {path.relative_to(Path.cwd())}")


def arguments_of(values: dict[str, Any]) -> dict[str, str]:
    """What a command line was parsed to, for the record."""
    return {name: without_folders(str(value)) for name, value in values.items()}


def write_prompts(path: Path, count: int) -> None:
    """JSON lines of the demo's training split, for jobs that take `--data`."""
    from trimode.calib.demo.tasks import examples  # of no use to those who measure a process

    prompts = [example.prompt for example in itertools.islice(examples(TRAIN_SEED, "train"), count)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def held_out_questions(per_family: int) -> list[Example]:
    """Of the demo's held-out split, family by family: the same ones for every benchmark."""
    from trimode.calib.demo.tasks import FAMILIES, examples

    return [
        example
        for family in FAMILIES
        for example in itertools.islice(examples(QUESTION_SEED, "held-out", [family]), per_family)
    ]


def without_folders(text: str) -> str:
    """An absolute path as its last name: where somebody keeps a file says nothing about a
    measurement.
    """
    return Path(text).name if Path(text).is_absolute() else text


def machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        **versions,
    }


def pss_bytes() -> int:
    """Proportional set size of this process: a page mapped several times counts once."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss in smaps_rollup")


def bytes_read() -> int:
    """Bytes this process asked to read (files, through read calls)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise RuntimeError("no rchar in /proc/self/io")


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]

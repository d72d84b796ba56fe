"""Time, memory and bytes of compiling a checkpoint of a published size for three GPUs, with no GPU.

python -m benchmarks.engine_scale --size 8b

Needs the checkpoint's size of free disk (8b: 17 GB) and TensorRT-RTX.

The checkpoint is a sparse file of the true shape and byte count. Memory is the proportional set
size of the whole process tree (a page that two processes map counts once), sampled every 50 ms, and
the resident set size of its largest process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.build_scale import write_sparse_checkpoint
from benchmarks.common import save

TARGETS = ("dgx-spark", "rtx-pro-6000", "rtx-4090")


class TreeMemory(threading.Thread):
    """Samples the memory of a process and all its descendants until it ends, and ends it when they
    take more than ``limit_bytes``.
    """

    def __init__(self, pid: int, limit_bytes: int | None = None) -> None:
        super().__init__(daemon=True)
        self._limit = limit_bytes
        self.stopped = False
        self._root = psutil.Process(pid)
        self.peak_pss = self.peak_rss = self.peak_processes = 0

    def run(self) -> None:
        while psutil.pid_exists(self._root.pid):
            pss, rss, count = 0, 0, 0
            # a process may end between being listed and being read
            with contextlib.suppress(psutil.Error):
                for process in [self._root, *self._root.children(recursive=True)]:
                    info = process.memory_full_info()
                    pss, rss, count = pss + info.pss, max(rss, info.rss), count + 1
            self.peak_pss, self.peak_rss = max(self.peak_pss, pss), max(self.peak_rss, rss)
            self.peak_processes = max(self.peak_processes, count)
            if self._limit is not None and pss > self._limit:
                self.stopped = True
                self._root.kill()
            time.sleep(0.05)


def timed(command: list[str], cache: Path) -> dict[str, Any]:
    """Run a command with its own cache; seconds, and memory of its process tree."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TRIMODE_CACHE": str(cache)}
    )
    memory = TreeMemory(process.pid)
    memory.start()
    assert process.stderr is not None
    stages = [(line.strip(), time.perf_counter() - start) for line in process.stderr]
    if process.wait():
        sys.exit("\n".join(line for line, _ in stages))
    memory.join(1)
    return {
        "seconds": time.perf_counter() - start,
        "stages_begin_s": {line: second for line, second in stages if line.endswith("...")},
        "peak_pss_bytes": memory.peak_pss,
        "peak_rss_bytes_of_one_process": memory.peak_rss,
        "processes": memory.peak_processes,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="8b")
    parser.add_argument("--jobs", type=int, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source_bytes = write_sparse_checkpoint(folder / "checkpoint", options.size)
        command = [
            sys.executable,
            "-m",
            "trimode.cli.main",
            "build",
            str(folder / "checkpoint"),
            "-o",
            str(folder / "bundle"),
        ]
        command += ["--precision", "bf16"]
        command += [part for target in TARGETS for part in ("--target", target)]
        command += ["--jobs", str(options.jobs)] if options.jobs else []
        measured = {
            "size": options.size,
            "targets": TARGETS,
            "checkpoint_bytes": source_bytes,
            "first": timed(command, folder / "cache"),
        }
        measured["again"] = timed(command, folder / "cache")
        measured["a_fourth_target"] = timed([*command, "--target", "l4"], folder / "cache")
        files = {
            str(p.relative_to(folder / "bundle")): p.stat().st_size
            for p in (folder / "bundle").rglob("*")
            if p.is_file()
        }
    engines = {file: size for file, size in files.items() if file.endswith(".engine")}
    measured["engine_bytes"] = engines
    measured["bundle_bytes"] = sum(files.values())
    measured["bundle_to_weights_plus_engines"] = sum(files.values()) / (
        source_bytes + sum(engines.values())
    )
    print(json.dumps(measured, indent=1))
    save(f"engine_scale_{options.size}", measured)


if __name__ == "__main__":
    main()

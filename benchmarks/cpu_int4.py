"""int4 against float32 in ONNX Runtime on the CPU: tokens a second, verify forwards, and the memory
of three graphs.

    python -m benchmarks.cpu_int4 [--megabytes 500]

One random float32 checkpoint of about that size, three bundles for ``cpu``: fp32, int4 with
products in float32 (``exact``), and int4 as built, with the inputs of products in int8 blocks.
Speeds are taken in turns in one process with two threads, so that their ratios are of one machine
in one state. Memory is that of a process of its own for each bundle, after every graph has run at 1
and at 32 rows, less that of the same process with nothing loaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import median, pss_bytes, save
from benchmarks.memory import write_checkpoint

BUNDLES = ("fp32", "int4", "int4, inputs in int8")
PROMPT, NEW_TOKENS, TURNS = 16, 32, 7


def build_all(folder: Path) -> None:
    from trimode.compiler.options import BuildOptions
    from trimode.compiler.pipeline import build_bundle

    build_bundle(folder / "checkpoint", folder / BUNDLES[0])
    for name, exact in zip(BUNDLES[1:], (True, False), strict=True):
        options = BuildOptions(precision="int4", calibration="rtn", exact=exact)
        build_bundle(folder / "checkpoint", folder / name, options)


def measure_first_load(folder: Path, name: str) -> dict[str, Any]:
    """With an empty cache: int4 weights are prepacked and written."""
    import resource

    from trimode.runtime import TriModeModel
    from trimode.runtime.sessions.ort import session as ort_session  # noqa: F401

    start = time.perf_counter()
    TriModeModel.from_pretrained(folder / name, num_threads=2)
    return {
        "first_load_s": time.perf_counter() - start,
        "first_load_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_memory(folder: Path, name: str) -> dict[str, Any]:
    import numpy as np

    from trimode.runtime import TriModeModel
    from trimode.runtime.sessions.ort import session as ort_session  # noqa: F401

    base_pss, base_rss, start = pss_bytes(), rss_bytes(), time.perf_counter()
    model = TriModeModel.from_pretrained(folder / name, num_threads=2)
    loaded = time.perf_counter() - start
    session, cache = model.session, model.session.new_cache()
    for graph_name, rows in itertools.product(("ar", "draft", "verify"), (1, 32)):
        session.run(graph_name, cache, np.arange(rows)[None] * 7 + 200, 100)
    return {
        "load_s": loaded,
        "pack_bytes": model.bundle.chosen.weight_bytes,
        "pss_bytes": pss_bytes() - base_pss,
        "rss_bytes": rss_bytes() - base_rss,
    }


def rss_bytes() -> int:
    """Resident set size: a page that three graphs map counts three times."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_speed(folder: Path) -> dict[str, Any]:
    import numpy as np

    from trimode.runtime import TriModeModel

    models = {
        name: TriModeModel.from_pretrained(folder / name, num_threads=2, verify=False)
        for name in BUNDLES
    }
    ids, block = [list(range(200, 200 + PROMPT))], np.arange(32)[None] * 7 + 200
    rates: dict[str, list[float]] = {name: [] for name in models}
    verify_ms: dict[str, list[float]] = {name: [] for name in models}
    for turn, (name, model) in itertools.product(range(TURNS), models.items()):
        stream = model.stream(ids, mode="ar", max_new_tokens=NEW_TOKENS)
        for _ in stream:
            pass
        if turn:  # the first is warm-up
            rates[name].append(len(stream.result.token_ids) / stream.result.elapsed_s)
        cache = model.session.new_cache()
        for _ in range(4):
            start = time.perf_counter()
            model.session.run("verify", cache, block, 100)
            verify_ms[name].append(1e3 * (time.perf_counter() - start))
    return {
        "ar_tokens_per_s": {n: median(v) for n, v in rates.items()},
        "verify_32_rows_ms": {n: median(v) for n, v in verify_ms.items()},
    }


def in_process(folder: Path, *part: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu_int4",
        "--folder",
        str(folder),
        "--part",
        *part,
    ]
    environment = {**os.environ, "TRIMODE_CACHE": str(folder / "cache")}
    return json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--part", nargs="+")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.part:
        parts = {"first load": measure_first_load, "memory": measure_memory, "speed": measure_speed}
        print(json.dumps(parts[args.part[0]](args.folder, *args.part[1:])))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "checkpoint").mkdir()
        write_checkpoint(folder / "checkpoint", args.megabytes)
        build_all(folder)
        measured = {
            n: in_process(folder, "first load", n) | in_process(folder, "memory", n)
            for n in BUNDLES
        }
        speed = in_process(folder, "speed")
        cached = (
            sum(
                path.stat().st_size
                for path in (folder / "cache" / "prepacked").rglob("weights.bin")
            )
            / 2
        )
        checkpoint = (folder / "checkpoint" / "model.safetensors").stat().st_size
    rates, verify = speed["ar_tokens_per_s"], speed["verify_32_rows_ms"]
    ratios = {
        name: {
            "ar_tokens_per_s_over_fp32": rates[name] / rates["fp32"],
            "verify_speed_over_fp32": verify["fp32"] / verify[name],
            "pss_over_pack": measured[name]["pss_bytes"] / measured[name]["pack_bytes"],
        }
        for name in BUNDLES
    }
    for name in BUNDLES:
        print(
            f"{name:24s} AR {rates[name]:7.1f} tokens/s   verify {verify[name]:7.1f} ms   pack "
            f"{measured[name]['pack_bytes'] / 1e6:6.1f} MB"
            f"   PSS {measured[name]['pss_bytes'] / 1e6:6.1f} MB   "
            + "  ".join(f"{k} {v:.2f}" for k, v in ratios[name].items())
        )
    save(
        "cpu_int4",
        {
            "checkpoint_bytes": checkpoint,
            "ratios": ratios,
            **speed,
            "memory": measured,
            "cache_bytes_per_bundle": cached,
        },
    )


if __name__ == "__main__":
    main()

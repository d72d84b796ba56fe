"""Memory and one-row latency of three graphs over one weight pack, against one ordinary session;
memory of building.

    python -m benchmarks.memory [--megabytes 500]

Each part runs in a process of its own. PSS is taken after every graph has run at 1 and at 32 rows,
less the PSS of the same process with its imports done and nothing loaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import bytes_read, median, pss_bytes, save

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 3584, 16, 4, 128, 4096


def write_checkpoint(folder: Path, megabytes: int) -> None:
    """Random float32 weights of about that size (a sparse file of zeros would let the kernel share
    one page).
    """
    import numpy as np

    from trimode.graphs.checkpoint import expected_tensors
    from trimode.graphs.config import parse_config

    layer = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM + 3 * HIDDEN * INNER
    config: dict[str, Any] = {
        "architectures": ["NemotronLabsDiffusionModel"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": max(1, (megabytes * 250_000 - 2 * VOCAB * HIDDEN) // layer),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "mask_token_id": 100,
        "eos_token_id": 11,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_tensors(parse_config(config))
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            stream.write((rng.standard_normal(shape, dtype=np.float32) * 0.03).tobytes())


def measure_build(folder: Path) -> dict[str, Any]:
    from trimode.compiler.pipeline import build_bundle

    start, before = time.perf_counter(), bytes_read()
    build_bundle(folder / "checkpoint", folder / "bundle")
    return {
        "seconds": time.perf_counter() - start,
        "bytes_read": bytes_read() - before,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_open(folder: Path) -> dict[str, Any]:
    """Ours: three graphs, each run at 1 and at 32 rows."""
    import numpy as np

    from trimode.runtime import TriModeModel

    # imported before the baseline is taken
    from trimode.runtime.sessions.ort import session as ort_session  # noqa: F401

    base, read, start = pss_bytes(), bytes_read(), time.perf_counter()
    model = TriModeModel.from_pretrained(folder / "bundle", num_threads=2)
    opened, read = time.perf_counter() - start, bytes_read() - read
    session, cache = model.session, model.session.new_cache()
    for graph_name, rows in itertools.product(("ar", "draft", "verify"), (1, 32)):
        session.run(graph_name, cache, np.full((1, rows), 5), 100)
    return {"open_s": opened, "bytes_read": read, "pss_bytes": pss_bytes() - base}


def measure_latency(folder: Path) -> dict[str, Any]:
    """Our ar graph beside one ordinary session of the same graph with default options, IO bound
    alike, in turns in one process.
    """
    import onnxruntime as ort

    from trimode.runtime import TriModeModel
    from trimode.runtime.sessions.ort.cache import BoundGraph, GraphBuffers, OrtCache

    model = TriModeModel.from_pretrained(folder / "bundle", num_threads=2, verify=False)
    base = pss_bytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    ordinary = ort.InferenceSession(
        folder / "bundle" / "ar.onnx", options, providers=["CPUExecutionProvider"]
    )
    ordinary_bytes = pss_bytes() - base
    contract, cache = model.bundle.manifest.contracts["ar"], OrtCache(model.model)
    cache.reserve(200)
    times: dict[str, list[float]] = {}
    for rows in (1, 32):
        sessions = {"ours": model.session.sessions["ar"], "ordinary": ordinary}  # type: ignore[attr-defined]
        bound = {
            name: BoundGraph(session, cache, range(1), GraphBuffers(contract, 1, rows, "cpu"), {})
            for name, session in sessions.items()
        }
        for _, name in itertools.product(range(6), sessions):
            bound[name].input_ids[:], bound[name].past_length[0], bound[name].input_length[:] = (
                5,
                100,
                rows,
            )
            time.sleep(0.02)  # the ordinary session's threads spin for a while after each run
            for _ in range(25 if rows == 1 else 8):
                start = time.perf_counter()
                sessions[name].run_with_iobinding(bound[name].binding)
                times.setdefault(f"{name} {rows}", []).append(1e3 * (time.perf_counter() - start))
    return {
        "ordinary_pss_bytes": ordinary_bytes,
        "median_ms": {name: median(values) for name, values in times.items()},
    }


def in_process(what: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--part", what, "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--part")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    parts = {"build": measure_build, "open": measure_open, "latency": measure_latency}
    if args.part:
        print(json.dumps(parts[args.part](args.folder)))
        return
    small, (weights, measured) = (
        run_all(args.megabytes // 5, ("build",)),
        run_all(args.megabytes, tuple(parts)),
    )
    build, opened, times = measured["build"], measured["open"], measured["latency"]["median_ms"]
    ratios = {
        "pss_over_weights": opened["pss_bytes"] / weights,
        "one_row_over_ordinary_session": times["ours 1"] / times["ordinary 1"],
        "32_rows_over_ordinary_session": times["ours 32"] / times["ordinary 32"],
        "open_bytes_read_over_weights": opened["bytes_read"] / weights,
        "build_bytes_read_over_weights": build["bytes_read"] / weights,
        "build_peak_rss_over_that_of_a_fifth_of_the_weights": build["peak_rss_bytes"]
        / small[1]["build"]["peak_rss_bytes"],
    }
    for key, value in ratios.items():
        print(f"{key:52s} {value:8.3f}")
    save(
        "memory",
        {
            "weights_bytes": weights,
            "ratios": ratios,
            **measured,
            "build_of_a_fifth": small[1]["build"],
        },
    )


def run_all(megabytes: int, parts: tuple[str, ...]) -> tuple[int, dict[str, Any]]:
    """Size of the checkpoint, and what each part measured on it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "checkpoint").mkdir()
        write_checkpoint(folder / "checkpoint", megabytes)
        weights = (folder / "checkpoint" / "model.safetensors").stat().st_size
        return weights, {part: in_process(part, folder) for part in parts}


if __name__ == "__main__":
    main()

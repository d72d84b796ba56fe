"""Memory and one-row latency of three graphs over one weight pack, against one ordinary session; memory of building.

    python -m benchmarks.memory [--megabytes 500]

Each measurement runs in a process of its own. PSS is taken after every graph has run at 1 and at 32 rows, less the PSS of the same process
with its imports done and nothing loaded.
"""

from __future__ import annotations

import argparse
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
STEPS = 60


def write_checkpoint(folder: Path, megabytes: int) -> None:
    """Random float32 weights of about that size (a sparse file of zeros would let the kernel share one page)."""
    import numpy as np

    from trimode.graphs.checkpoint import expected_tensors
    from trimode.graphs.config import parse_config

    layer = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM + 3 * HIDDEN * INNER
    config: dict[str, Any] = {
        "architectures": ["NemotronLabsDiffusionModel"], "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": max(1, (megabytes * 250_000 - 2 * VOCAB * HIDDEN) // layer), "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 4096, "mask_token_id": 100, "eos_token_id": 11,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 256,
                            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_tensors(parse_config(config))
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
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
    return {"seconds": time.perf_counter() - start, "bytes_read": bytes_read() - before,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # fmt: skip


def measure_open(folder: Path) -> dict[str, Any]:
    """Ours: three graphs."""
    import numpy as np

    from trimode.runtime import TriModeModel, ort_session  # noqa: F401  (imported before the baseline is taken)

    base, read = pss_bytes(), bytes_read()
    start = time.perf_counter()
    model = TriModeModel.from_pretrained(folder / "bundle", num_threads=2)
    opened, read = time.perf_counter() - start, bytes_read() - read
    session, cache = model._session, model._session.new_cache()
    times = {}
    for role in ("ar", "draft", "verify"):
        for rows in (1, 32):
            ids = np.full((1, rows), 5)
            times[f"{role} {rows}"] = timed(lambda role=role, ids=ids: session.run(role, cache, ids, 100))
    return {"open_s": opened, "bytes_read": read, "pss_bytes": pss_bytes() - base, "median_ms": times}


def measure_ordinary(folder: Path) -> dict[str, Any]:
    """One session of the same ar graph with default options, IO bound like ours."""
    import onnxruntime as ort

    from trimode.runtime.bundle import open_bundle
    from trimode.runtime.ort_session import BoundGraph, OrtCache

    bundle = open_bundle(folder / "bundle", verify=False)
    base = pss_bytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(folder / "bundle" / "ar.onnx", options, providers=["CPUExecutionProvider"])
    cache = OrtCache(bundle.manifest.model)
    cache.reserve(200)
    times = {}
    for rows in (1, 32):
        bound = BoundGraph(session, bundle.manifest.graphs["ar"].contract, cache, rows)
        bound.input_ids[:], bound.past_length[0] = 5, 100
        times[f"ar {rows}"] = timed(lambda bound=bound: session.run_with_iobinding(bound.binding))
    return {"pss_bytes": pss_bytes() - base, "median_ms": times}


def timed(step: Any) -> float:
    for _ in range(5):
        step()
    values = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        values.append(1e3 * (time.perf_counter() - start))
    return median(values)


def in_process(what: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--part", what, "--folder", str(folder)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--part")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    parts = {"build": measure_build, "open": measure_open, "ordinary": measure_ordinary}
    if args.part:
        print(json.dumps(parts[args.part](args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "checkpoint").mkdir()
        write_checkpoint(folder / "checkpoint", args.megabytes)
        weights = (folder / "checkpoint" / "model.safetensors").stat().st_size
        build = in_process("build", folder)
        # Alternate, so that a slow minute of the machine hits both.
        runs = [(in_process("open", folder), in_process("ordinary", folder)) for _ in range(3)]
    ours, ordinary = min(runs, key=lambda r: r[0]["median_ms"]["ar 1"])[0], min(runs, key=lambda r: r[1]["median_ms"]["ar 1"])[1]
    ratios = {
        "pss_over_weights": ours["pss_bytes"] / weights,
        "one_row_over_ordinary_session": ours["median_ms"]["ar 1"] / ordinary["median_ms"]["ar 1"],
        "build_peak_rss_over_weights": build["peak_rss_bytes"] / weights,
        "build_bytes_read_over_weights": build["bytes_read"] / weights,
        "open_bytes_read_over_weights": ours["bytes_read"] / weights,
    }
    for key, value in ratios.items():
        print(f"{key:36s} {value:8.3f}")
    print({k: round(v, 2) for k, v in ours["median_ms"].items()}, "ordinary", {k: round(v, 2) for k, v in ordinary["median_ms"].items()})
    save("memory", {"weights_bytes": weights, "ratios": ratios, "build": build, "runs": [{"ours": a, "ordinary": b} for a, b in runs]})


if __name__ == "__main__":
    main()

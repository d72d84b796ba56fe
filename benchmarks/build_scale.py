"""Time and peak memory of compiling a checkpoint of a published size, on a sparse file of the true
shape and byte count.

python -m benchmarks.build_scale --size 3b

Needs twice the checkpoint's size of free disk (3b: 16 GB).
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import save
from trimode.compiler.pipeline import build_bundle
from trimode.graphs.adapter import ADAPTER_PREFIX, expected_adapter_tensors
from trimode.graphs.checkpoint import expected_tensors
from trimode.graphs.config import parse_config
from trimode.progress import Advance, Silent

SIZES = {"3b": (3072, 9216, 26, 1e6), "8b": (4096, 14336, 34, 1e6), "14b": (5120, 16384, 40, 1e9)}


def write_sparse_checkpoint(
    folder: Path,
    size: str,
    *,
    vocab_size: int = 131072,
    heads: tuple[int, int, int] = (32, 8, 128),
    num_layers: int | None = None,
    rank: int = 0,
) -> int:
    """Config and a safetensors file of zeros that takes no disk; returns the number of bytes it
    stands for.

    ``heads``: of queries, of keys and values, and their size. ``num_layers``: None = the size's
    own. ``rank``: of the drafter's adapter; 0 = there is none.
    """
    hidden, inner, layers, theta = SIZES[size]
    layers = num_layers or layers
    config = {
        "architectures": ["NemotronLabsDiffusionModel"],
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "max_position_embeddings": 262144,
        "mask_token_id": 100,
        "eos_token_id": 11,
        "block_size": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    parsed = parse_config(config)
    if rank:
        adapter = folder / "linear_spec_lora"
        adapter.mkdir()
        facts = {"peft_type": "LORA", "target_modules": ["o_proj"], "r": rank}
        settings = {**facts, "lora_alpha": 4 * rank, "bias": "none"}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        shapes = expected_adapter_tensors(parsed, rank)
        names = {ADAPTER_PREFIX + name: shape for name, shape in shapes.items()}
        _write_zeros(adapter / "adapter_model.safetensors", names)
    return _write_zeros(folder / "model.safetensors", expected_tensors(parsed))


def _write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return end


class Stages(Silent):
    """Notes when each stage begins; the weights are written beside the others."""

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}
        self._start = time.perf_counter()

    def stage(self, name: str, total: int) -> Advance:
        self.begun[name] = time.perf_counter() - self._start
        return super().stage(name, total)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="3b")
    size = parser.parse_args().size
    with tempfile.TemporaryDirectory() as name:
        source_bytes = write_sparse_checkpoint(Path(name) / "checkpoint", size)
        stages, start = Stages(), time.perf_counter()
        manifest = build_bundle(
            Path(name) / "checkpoint", Path(name) / "bundle", progress=stages
        ).manifest
        end = time.perf_counter()
    measured = {
        "size": size,
        "checkpoint_bytes": source_bytes,
        "bundle_bytes": sum(record.num_bytes for record in manifest.files.values()),
        "seconds": end - start,
        "stages_begin_s": stages.begun,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(measured, indent=1))
    save(f"build_scale_{size}", measured)


if __name__ == "__main__":
    main()

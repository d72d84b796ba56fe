"""Time and peak memory of `trimode calibrate` on a random checkpoint whose weights do not fit into
the memory they are allowed.

python -m benchmarks.calibration_scale [--layers 8] [--precision int4] [--folder FOLDER]

Needs 0.2 GB of disk a layer.

The decoder layers are wide and many, the vocabulary is small; weights are bf16. Peak memory is
polled: pages of the mapped checkpoint, which the kernel can take back, are counted apart from what
the process holds itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.common import save
from trimode.calib.scales.modelopt import load_modelopt
from trimode.calib.scales.settings import QuantizeSettings
from trimode.cli.calibrate.scales import run_calibrate
from trimode.graphs.checkpoint import expected_tensors
from trimode.graphs.config import parse_config
from trimode.runtime.text.prompts import USUAL_STYLE

HIDDEN, INNER, VOCABULARY = 2048, 8192, 1024
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 2, 64, 3


def write_checkpoint(folder: Path, num_layers: int) -> int:
    """One shard a layer, so that no more than a layer is in memory; returns the number of
    weights.
    """
    config = {
        "architectures": ["NemotronLabsDiffusionModel"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "mask_token_id": 100,
        "eos_token_id": 11,
        "block_size": 4,
        "rope_parameters": None,
        "rope_theta": 1e6,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in expected_tensors(parse_config(config)).items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    generator, total = torch.Generator().manual_seed(0), 0
    for file, shapes in shards.items():
        tensors = {name: _weight(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file)
        total += sum(tensor.numel() for tensor in tensors.values())
    names = {name: file for file, shapes in shards.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return total


def _weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) / shape[1] ** 0.5).bfloat16()


class PeakMemory(threading.Thread):
    """Polls ``/proc/self/status``: the largest anonymous and file-backed parts of the resident
    set.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0, "RssFile": 0}
        self._stop_polling = threading.Event()

    def run(self) -> None:
        while not self._stop_polling.wait(0.02):
            for name, num_bytes in memory().items():
                self.peak[name] = max(self.peak[name], num_bytes)

    def stop(self) -> dict[str, int]:
        self._stop_polling.set()
        self.join()
        return self.peak


def memory() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0] in ("RssAnon:", "RssFile:")
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--precision", choices=("fp8", "int8", "int4"), default="int4")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is written for the time being"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measured = measure(folder, options.layers, options.precision)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(measured, indent=1))
    save(f"calibration_scale_{options.precision}", measured)


def measure(folder: Path, num_layers: int, precision: str) -> dict[str, Any]:
    num_weights = write_checkpoint(folder, num_layers)
    tokens = np.random.default_rng(0).integers(200, VOCABULARY, (PROMPTS, PROMPT_LENGTH)).tolist()
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in tokens))
    settings = QuantizeSettings(precision, max_new_tokens=NEW_TOKENS, memory_gib=0.0)  # type: ignore[arg-type]
    load_modelopt()  # what the libraries take is not the point
    before, peak, start = memory(), PeakMemory(), time.perf_counter()
    peak.start()
    run_calibrate(folder, folder / "calibration", data, settings, style=USUAL_STYLE)
    seconds, highest = time.perf_counter() - start, peak.stop()
    layer = (num_weights - 2 * VOCABULARY * HIDDEN - HIDDEN) // num_layers
    return {
        "precision": precision,
        "num_weights": num_weights,
        "checkpoint_bytes": 2 * num_weights,
        "float32_bytes": 4 * num_weights,
        "float32_bytes_of_a_layer": 4 * layer,
        "libraries_anonymous_bytes": before["RssAnon"],
        "peak_anonymous_bytes": highest["RssAnon"],
        "peak_file_bytes": highest["RssFile"],
        "seconds": seconds,
        "prompts": PROMPTS,
        "prompt_length": PROMPT_LENGTH,
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()

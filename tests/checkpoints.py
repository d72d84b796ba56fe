"""Random checkpoints of odd shapes, in the public layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from trimode.formats.calibration import SCHEMA_VERSION, Calibration, save_calibration
from trimode.graphs.adapter import ADAPTER_PREFIX, expected_adapter_tensors
from trimode.graphs.checkpoint import expected_tensors, open_checkpoint
from trimode.graphs.config import parse_config
from trimode.graphs.identity import SourceDigest


def yarn(**changes: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
        **changes,
    }


def config_of(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "vocab_size": 109,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 1024,
        "rope_parameters": yarn(),
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 11,
        "mask_token_id": 100,
        "block_size": 32,
        "dlm_paradigm": "bidirectional",
        **changes,
    }


# name -> config changes, element type of the weights, rank of the drafter (0 = none), shards
SHAPES: dict[str, tuple[dict[str, Any], torch.dtype, int, int]] = {
    "three_kv_heads": ({}, torch.bfloat16, 4, 1),
    "one_kv_head": (
        {
            "hidden_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "num_hidden_layers": 3,
            "rope_parameters": yarn(rope_theta=1e9, factor=0.25),
        },
        torch.float32,
        3,
        2,
    ),
    "plain": (
        {
            "num_key_value_heads": 6,
            "head_dim": 8,
            "vocab_size": 301,
            "rope_parameters": None,
            "rope_theta": 10000.0,
        },
        torch.float16,
        0,
        1,
    ),
}


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """A checkpoint whose logits vary and whose attention matters; same seed, same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    parsed = parse_config(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _weight(name, shape, generator).to(dtype)
        for name, shape in expected_tensors(parsed).items()
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        _save_shards(tensors, folder, shards)
    if rank:
        adapter = folder / "linear_spec_lora"
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text(
            json.dumps(
                {
                    "peft_type": "LORA",
                    "target_modules": ["o_proj"],
                    "r": rank,
                    "lora_alpha": 4 * rank,
                    "bias": "none",
                }
            )
        )
        lora = {
            ADAPTER_PREFIX + n: torch.randn(s, generator=generator) * 0.1
            for n, s in expected_adapter_tensors(parsed, rank).items()
        }
        save_file(lora, adapter / "adapter_model.safetensors")
    return folder


def raw_weight(folder: Path, name: str) -> NDArray[np.float32]:
    """A tensor of a float32 checkpoint."""
    entry = open_checkpoint(folder).tensors[name]
    return np.frombuffer(b"".join(entry.chunks()), np.float32).reshape(entry.shape)


def write_int8_calibration(checkpoint: Path, folder: Path) -> Path:
    """Scales of every layer but the head, inputs scaled too; the checkpoint is one of float32."""
    digest, rng, scales = SourceDigest(open_checkpoint(checkpoint)), np.random.default_rng(3), {}
    for name in open_checkpoint(checkpoint).tensors:
        if name.endswith("_proj.weight"):
            layer, weight = name.removesuffix(".weight"), raw_weight(checkpoint, name)
            scales[f"{layer}.pre_quant_scale"] = rng.uniform(0.5, 2, weight.shape[1]).astype(
                np.float32
            )
            scales[f"{layer}.weight_amax"] = np.abs(
                weight / scales[f"{layer}.pre_quant_scale"]
            ).max(1)
            scales[f"{layer}.input_amax"] = np.array(rng.uniform(3, 5), np.float32)
    list(digest.read_all())
    record = Calibration(
        schema_version=SCHEMA_VERSION,
        trimode_version="0",
        precision="int8",
        algorithm="by hand",
        block_size=None,
        source_name="it",
        source_sha256=digest.base_hexdigest(),
        scales_sha256="",
        data=None,
        layers={},
        libraries={},
    )
    save_calibration(folder, record, scales)
    return folder


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.2 * values
    return values * (0.4 if name == "diffusion_head.weight" else 0.15)


def _save_shards(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: t for j, (n, t) in enumerate(tensors.items()) if j % shards == i}
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )

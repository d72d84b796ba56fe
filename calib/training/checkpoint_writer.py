"""Writes trained weights as a whole checkpoint, or as an adapter.

The layout is the public one. A folder is filled beside its destination and renamed when it is
complete, so a run that stops half-way leaves no half checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from trimode.errors import UsageError
from trimode.formats.files import (
    check_replaceable,
    replace_bytes,
    replace_text,
    staged_replacement,
)
from trimode.graphs.adapter import ADAPTER_FOLDER, ADAPTER_PREFIX
from trimode.graphs.checkpoint import is_adapter_tensor
from trimode.graphs.decoder.trunk import LowRankLinear, TriModeTrunk


def write_checkpoint(
    folder: Path, trunk: TriModeTrunk, config: Mapping[str, Any], texts: Mapping[str, str]
) -> None:
    """Write a checkpoint folder, its weights in bfloat16.

    It holds ``config.json``, the drafter adapter if the trunk has one, and ``texts`` as they are.

    Args:
        folder: Folder to write: new, empty, or an earlier checkpoint, which is replaced whole.
        trunk: Trunk whose weights are written.
        config: Contents of ``config.json``; they have to describe the trunk.
        texts: Other files of the folder, by name (tokenizer, chat template, generation defaults).

    Raises:
        UsageError: the folder holds something that is no checkpoint.
    """
    with _replacing(folder) as staged:
        write_json(staged / "config.json", config)
        weights = {
            name: tensor.to(torch.bfloat16)
            for name, tensor in _weights(trunk).items()
            if not is_adapter_tensor(name)
        }
        (staged / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
        for name, text in texts.items():
            (staged / name).write_text(text, encoding="utf-8")
        if adapter_layers(trunk):
            write_adapter(staged / ADAPTER_FOLDER, trunk)


def write_adapter(folder: Path, trunk: TriModeTrunk) -> None:
    """Write the drafter in the layout of PEFT, float32.

    The files are ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        UsageError: the trunk has no adapter.
    """
    layers = required_adapter_layers(trunk)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        ADAPTER_PREFIX + name: tensor.float()
        for name, tensor in _weights(trunk).items()
        if is_adapter_tensor(name)
    }
    replace_bytes(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_json(folder / "adapter_config.json", _adapter_config(layers[0]))


def _adapter_config(layer: LowRankLinear) -> dict[str, Any]:
    """Describe the adapter to PEFT by one of its layers."""
    assert layer.lora_A is not None
    rank = layer.lora_A.out_features
    alpha = round(layer.scaling * rank, 9)  # the division may have cost a last digit
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": ["o_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    replace_text(path, json.dumps(values, indent=2) + "\n")


def round_weights(trunk: TriModeTrunk) -> None:
    """Round the weights in place as :func:`write_checkpoint` does."""
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if not is_adapter_tensor(name):
                parameter.copy_(parameter.bfloat16())


def adapter_layers(trunk: TriModeTrunk) -> list[LowRankLinear]:
    """List the projections with the drafter's branch; none without a drafter."""
    return [
        module
        for module in trunk.modules()
        if isinstance(module, LowRankLinear) and module.lora_A is not None
    ]


def required_adapter_layers(trunk: TriModeTrunk) -> list[LowRankLinear]:
    """List the projections with the drafter's branch.

    Raises:
        UsageError: the trunk has no adapter.
    """
    layers = adapter_layers(trunk)
    if not layers:
        raise UsageError(
            "expected a trunk with a drafter adapter, found one without",
            "give TriModeTrunk a drafter_rank",
        )
    return layers


def _weights(trunk: TriModeTrunk) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in trunk.state_dict().items()}


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which replaces ``folder`` unless an error occurs."""
    folder = folder.absolute()
    check_replaceable(folder, "config.json", "a checkpoint")
    with staged_replacement(folder, "config.json") as staged:
        yield staged

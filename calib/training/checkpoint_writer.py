"""Writes trained weights in the public layout: a whole checkpoint, or an adapter alone.

A folder is filled beside its destination and renamed when it is complete, so a run that stops
half-way leaves no half checkpoint.
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
from trimode.formats.files import check_replaceable, staged_replacement
from trimode.graphs.adapter import ADAPTER_FOLDER, ADAPTER_PREFIX
from trimode.graphs.checkpoint import is_adapter_tensor
from trimode.graphs.decoder.trunk import LowRankLinear, TriModeTrunk


def write_checkpoint(
    folder: Path, trunk: TriModeTrunk, config: Mapping[str, Any], texts: Mapping[str, str]
) -> None:
    """Write a checkpoint folder, its weights in bfloat16.

    It holds ``config.json``, the drafter adapter where the trunk has one, and ``texts`` as they
    are.

    Args:
        folder: new, empty, or an earlier checkpoint, which is replaced whole.
        trunk: Trunk whose weights are written.
        config: the contents of ``config.json``; has to describe the trunk.
        texts: other files of the folder, by name (tokenizer, chat template, generation defaults).

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
    layers = adapter_layers(trunk)
    if not layers:
        raise UsageError(
            "expected a trunk with a drafter adapter, found one without",
            "give TriModeTrunk a drafter_rank",
        )
    folder.mkdir(parents=True, exist_ok=True)
    assert layers[0].lora_A is not None
    rank = layers[0].lora_A.out_features
    alpha = round(layers[0].scaling * rank, 9)  # the division may have cost a last digit
    config = {
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
    tensors = {
        ADAPTER_PREFIX + name: tensor.float()
        for name, tensor in _weights(trunk).items()
        if is_adapter_tensor(name)
    }
    partial = folder / ".adapter_model.safetensors.partial"
    partial.write_bytes(save(tensors, {"format": "pt"}))
    partial.replace(folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", config)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def round_weights(trunk: TriModeTrunk) -> None:
    """Round the weights in place to what :func:`write_checkpoint` will write.

    The adapter keeps float32.
    """
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if not is_adapter_tensor(name):
                parameter.copy_(parameter.bfloat16())


def adapter_layers(trunk: TriModeTrunk) -> list[LowRankLinear]:
    """The projections that carry the drafter's branch; none where the checkpoint has no drafter."""
    return [
        module
        for module in trunk.modules()
        if isinstance(module, LowRankLinear) and module.lora_A is not None
    ]


def _weights(trunk: TriModeTrunk) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in trunk.state_dict().items()}


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the place of ``folder`` at the end.

    Where an error stops the work, the old one stays.
    """
    folder = folder.absolute()
    check_replaceable(folder, "config.json", "a checkpoint")
    with staged_replacement(folder, "config.json") as staged:
        yield staged

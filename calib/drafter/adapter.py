"""Holds a drafter's adapter apart from a trunk.

So several adapters can be tried on one trunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trimode.errors import BuildError
from trimode.formats.contract import DType
from trimode.graphs.decoder.trunk import LowRankLinear, TriModeTrunk


@dataclass(frozen=True)
class Adapter:
    """Holds a low-rank branch for every ``o_proj``, scaled by ``alpha / rank``.

    Attributes:
        weights: Weights in float32 on the CPU, by the checkpoint's names:
            ``encoder.layers.0.self_attn.o_proj.lora_A.weight (rank, in)`` and ``.lora_B.weight
            (out, rank)``.
    """

    rank: int
    alpha: float
    weights: Mapping[str, Tensor]

    def rounded(self, stored: DType) -> Adapter:
        """Round the weights as a pack stores them; they stay float32.

        Raises:
            BuildError: a weight is not finite, or too large for ``stored``.
        """
        weights = {
            name: weight.to(getattr(torch, stored)).float() for name, weight in self.weights.items()
        }
        lost = [name for name, weight in weights.items() if not weight.isfinite().all()]
        if lost:
            raise BuildError(
                f"{lost[0]}: expected weights that {stored} holds, found larger ones",
                "train with a lower `learning_rate`",
            )
        return replace(self, weights=weights)


def blank_adapter(trunk: TriModeTrunk, rank: int, alpha: float) -> Adapter:
    """Return an adapter of zeros for this trunk."""
    weights = {}
    for name, layer in _places(trunk):
        weights[f"{name}.lora_A.weight"] = torch.zeros(rank, layer.in_features)
        weights[f"{name}.lora_B.weight"] = torch.zeros(layer.out_features, rank)
    return Adapter(rank, alpha, weights)


def adapter_of(trunk: TriModeTrunk, alpha: float) -> Adapter:
    """Copy the adapter of a trunk.

    ``alpha`` is given because the trunk keeps the quotient alone.
    """
    weights = {
        name: tensor.detach().float().cpu().clone()
        for name, tensor in trunk.state_dict().items()
        if ".lora_" in name
    }
    return Adapter(next(iter(weights.values())).shape[0], alpha, weights)


def install_adapter(trunk: TriModeTrunk, adapter: Adapter) -> None:
    """Replace the trunk's adapter, if any, by a copy of this one."""
    device = trunk.diffusion_head.weight.device
    for name, layer in _places(trunk):
        layer.lora_A, layer.lora_B = (
            _linear(adapter.weights[f"{name}.{part}.weight"], device)
            for part in ("lora_A", "lora_B")
        )
        layer.scaling = adapter.alpha / adapter.rank


def _places(trunk: TriModeTrunk) -> Iterator[tuple[str, LowRankLinear]]:
    return (
        (name, module)
        for name, module in trunk.named_modules()
        if isinstance(module, LowRankLinear)
    )


def _linear(weight: Tensor, device: torch.device) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone().to(device), requires_grad=False)
    return linear

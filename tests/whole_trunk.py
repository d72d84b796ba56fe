"""Calibration the obvious way, to compare with: the whole float32 trunk, each recorded forward run
through ModelOpt's quantized layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trimode.calib.reference.episodes import (
    Episode,
    RecordingSession,
    answer,
    forwards_of,
    merged,
    pattern_for,
)
from trimode.calib.reference.torch_session import TorchCache
from trimode.calib.scales.layers import quantized_layers
from trimode.calib.scales.modelopt import run_modelopt
from trimode.calib.scales.settings import QuantizeSettings
from trimode.formats.contract import ModelInfo
from trimode.graphs.decoder.trunk import LowRankLinear, TriModeTrunk


class BranchOutside(nn.Module):
    """A LowRankLinear whose product with the weight is a plain ``nn.Linear``, ``base``, which alone
    gets quantizers.
    """

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.base = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        self.base.weight = layer.weight
        self.lora_A, self.lora_B, self.scaling = layer.lora_A, layer.lora_B, layer.scaling

    def forward(self, x: Tensor, drafter_scale: Tensor | float | None = None) -> Tensor:
        y: Tensor = self.base(x)
        if drafter_scale is None or self.lora_A is None or self.lora_B is None:
            return y
        return y + self.lora_B(self.lora_A(x) * (drafter_scale * self.scaling))  # type: ignore[no-any-return]


def record(
    trunk: TriModeTrunk, model: ModelInfo, texts: Sequence[list[int]], settings: QuantizeSettings
) -> list[Episode]:
    session = RecordingSession(trunk, settings.modes)
    return merged(
        [
            episode
            for text in texts
            for episode in answer(session, model, text, settings.modes, settings.max_new_tokens)
        ]
    )


@torch.no_grad()
def replay(trunk: TriModeTrunk, episodes: Sequence[Episode], *, needs_head: bool = False) -> None:
    for episode in episodes:
        text = TorchCache()
        for forward in forwards_of(episode):
            positions = torch.arange(forward.past_length, forward.past_length + len(forward.ids))[
                None
            ]
            hidden = trunk(
                torch.tensor([forward.ids]),
                positions,
                pattern_for(forward, text),
                forward.drafter_scale or None,
            )
            if needs_head:
                trunk.head(hidden[:, forward.first_logits_row :])


def quantize_whole_trunk(
    trunk: TriModeTrunk, episodes: Sequence[Episode], settings: QuantizeSettings
) -> dict[str, nn.Linear]:
    """The quantized layers, by the checkpoint's names."""
    for layer in trunk.encoder.layers:
        layer.self_attn.o_proj = BranchOutside(layer.self_attn.o_proj)
    shapes, block_size = quantized_layers(trunk.config, settings)
    modules = {name.removesuffix(".base"): module for name, module in trunk.named_modules()}
    modules |= {
        name.removesuffix(".base"): module
        for name, module in trunk.named_modules()
        if name.endswith(".base")
    }
    linears = {name: modules[name] for name in shapes}
    run_modelopt(
        trunk,
        linears,
        block_size,
        settings,
        lambda t: replay(t, episodes, needs_head=settings.quantizes_head),
    )  # type: ignore[arg-type]
    return linears  # type: ignore[return-value]

"""Runs the model in parts: decoder layers, then the head.

One part is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trimode.calib.reference.episodes import Episode, ReplayedForward, forwards_of, pattern_for
from trimode.calib.reference.mapped import float32_tensor, load_layer
from trimode.calib.reference.torch_session import TorchCache
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.decoder.trunk import Rope
from trimode.graphs.numerics.scales import HEAD

Hidden = NDArray[np.float32]
"""Hidden states of all rows of all forwards in the order of the replay, ``(rows, hidden_size)``."""


class Step(NamedTuple):
    """Holds a forward's inputs and outputs in a part.

    Inputs are those of the layers to quantize, ``(rows, in)`` by name; outputs are ``(rows,
    hidden_size)``.
    """

    inputs: dict[str, Tensor]
    outputs: Tensor


class Part(Protocol):
    """Computes a piece of the model, in float32.

    Attributes:
        device: Device of the part.
        linears: Layers of it to quantize, by the checkpoint's names.
    """

    device: str
    linears: dict[str, nn.Linear]

    def run(self, forward: ReplayedForward, x: Tensor, text: TorchCache) -> Step:
        """Take ``x (rows, hidden_size)`` through the part.

        ``text`` is the episode's cache of this part.
        """
        ...


class DecoderPart:
    """Computes one decoder layer."""

    def __init__(
        self, checkpoint: Checkpoint, index: int, rope: Rope, quantized: Container[str]
    ) -> None:
        self.device = rope.cos.device.type
        self._layer, self._rope = load_layer(checkpoint, index, self.device), rope
        named = (
            (f"encoder.layers.{index}.{name}", module)
            for name, module in self._layer.named_modules()
        )
        self.linears = {
            name: module
            for name, module in named
            if isinstance(module, nn.Linear) and name in quantized
        }
        self._inputs = captured = dict[str, Tensor]()
        for name, linear in self.linears.items():
            linear.register_forward_pre_hook(
                lambda _module, inputs, name=name: captured.__setitem__(name, inputs[0])
            )

    def run(self, forward: ReplayedForward, x: Tensor, text: TorchCache) -> Step:
        """Run the layer on a forward."""
        positions = torch.arange(
            forward.past_length, forward.past_length + len(forward.ids), device=x.device
        )[None]
        outputs = self._layer(
            x, self._rope(positions), pattern_for(forward, text), forward.drafter_scale or None
        )
        inputs = dict(self._inputs)
        self._inputs.clear()
        return Step(inputs, outputs)


class HeadPart:
    """Computes the last norm and the head on rows with logits.

    Nothing reads its outputs, so it has none.
    """

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        config = checkpoint.config
        self.device = device
        self._norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, device="meta")
        self._norm.weight = nn.Parameter(
            float32_tensor(checkpoint.tensors["encoder.norm.weight"], device), requires_grad=False
        )
        self.linears = {
            HEAD: linear_of(float32_tensor(checkpoint.tensors[f"{HEAD}.weight"], device))
        }

    def run(self, forward: ReplayedForward, x: Tensor, text: TorchCache) -> Step:  # noqa: ARG002
        """Run the norm and give the head's inputs."""
        return Step({HEAD: self._norm(x)[forward.first_logits_row :]}, x[:0])


def linear_of(weight: Tensor) -> nn.Linear:
    """Make a linear layer without bias from a weight ``(out, in)``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = (
        weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    )
    return linear


@torch.no_grad()
def replay(
    part: Part, episodes: Sequence[Episode], hidden: Hidden
) -> Iterator[tuple[ReplayedForward, Step]]:
    """Run every forward of the episodes through a part.

    ``hidden`` are the states that enter the part.
    """
    begin = 0
    for episode in episodes:
        text = TorchCache()
        for forward in forwards_of(episode):
            end = begin + len(forward.ids)
            yield (
                forward,
                part.run(forward, torch.tensor(hidden[begin:end], device=part.device), text),
            )
            begin = end

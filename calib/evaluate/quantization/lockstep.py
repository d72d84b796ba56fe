"""Runs the original and a quantized trunk side by side.

Both read the same tokens; each attends to the keys and values that it computed itself. They share
one cache object: the second trunk's layers are numbered behind the first one's. Nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimode.calib.evaluate.quantization.fidelity import Fidelity, ProbabilityDivergence
from trimode.calib.reference.episodes import Episode, ReplayedForward, forwards_of, pattern_for
from trimode.calib.reference.torch_session import TorchCache
from trimode.formats.contract import GraphName
from trimode.graphs.decoder.attention import AttentionPattern
from trimode.graphs.decoder.trunk import TriModeTrunk

Advance = Callable[[int], None]
ByGraph = dict[GraphName, Fidelity]


class Lockstep(nn.Module):
    """Runs two trunks as one, and measures their difference by graph.

    Args:
        original: Trunk in float32.
        quantized: Quantized copy, whose layers are numbered anew.
        layers: Quantized layers whose own error is measured: their output given the *original's*
            input, against the original's output.
        first_block: First decoder block with a quantized layer; those before it are run once for
            both.
        outputs_alone: Whether to leave hidden states out.

    Attributes:
        local: Fidelity of each layer's output, in drafts with the adapter's branch.
        accumulated: Fidelity of the hidden states after each decoder block, everything before being
            quantized.
        outputs: Divergence of the probabilities, over the rows whose logits a graph returns.
    """

    def __init__(
        self,
        original: TriModeTrunk,
        quantized: TriModeTrunk,
        layers: Sequence[str] = (),
        *,
        first_block: int = 0,
        outputs_alone: bool = False,
    ) -> None:
        super().__init__()
        self._outputs_alone = outputs_alone
        self._original, self._twin, self._layers, self._first_block = (
            original,
            quantized,
            layers,
            first_block,
        )
        self._graph_name: GraphName | None = None
        blocks = len(original.encoder.layers)
        for index, block in enumerate(quantized.encoder.layers):
            cast("Any", block).self_attn.index = blocks + index - first_block
        self.local: dict[str, ByGraph] = {name: {} for name in layers}
        self.accumulated: list[ByGraph] = [{} for _ in range(blocks)]
        self.outputs: dict[GraphName, ProbabilityDivergence] = {}

    @torch.no_grad()
    def run(self, episodes: Sequence[Episode], advance: Advance) -> None:
        """Run every forward of the episodes again; ``advance(1)`` after each episode."""
        with self._hooked():
            for episode in episodes:
                text = TorchCache()
                for forward in forwards_of(episode):
                    self._run(forward, pattern_for(forward, text))
                advance(1)

    def _run(self, forward: ReplayedForward, attend: TorchCache) -> None:
        device = self._original.diffusion_head.weight.device
        self._graph_name = forward.graph_name
        positions = torch.arange(
            forward.past_length, forward.past_length + len(forward.ids), device=device
        )[None]
        hidden = self(
            torch.tensor([forward.ids], device=device),
            positions,
            attend,
            forward.drafter_scale or None,
        )
        self.head(hidden[:, forward.first_logits_row :])

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: AttentionPattern,
        drafter_scale: float | None = None,
    ) -> Tensor:
        """Return the hidden states of both, ``(B, T, 2 * hidden_size)``."""
        rotation = self._original.rope(positions)
        x = y = self._original.encoder.embed_tokens(input_ids).flatten(0, 1)
        blocks = zip(self._original.encoder.layers, self._twin.encoder.layers, strict=True)
        for index, (block, other) in enumerate(blocks):
            y = other(y, rotation, attend, drafter_scale) if index >= self._first_block else None
            x = block(x, rotation, attend, drafter_scale)
            y = x if y is None else y
            if not self._outputs_alone:
                self._meter(self.accumulated[index]).add(x, y)
        both = torch.cat((self._original.encoder.norm(x), self._twin.encoder.norm(y)), -1)
        return both.reshape(*input_ids.shape, -1)

    def head(self, hidden: Tensor) -> Tensor:
        """Return the original's logits; measure how far the other's are."""
        x, y = hidden.chunk(2, -1)
        logits = self._original.head(x)
        assert self._graph_name is not None
        self.outputs.setdefault(self._graph_name, ProbabilityDivergence()).add(
            logits, self._twin.head(y)
        )
        return logits

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = [
            self._original.get_submodule(name).register_forward_hook(self._hook_of(name))
            for name in self._layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook_of(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        quantized = self._twin.get_submodule(name)

        def observe(_layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            self._meter(self.local[name]).add(output, quantized(*inputs))

        return observe

    def _meter(self, by_graph: ByGraph) -> Fidelity:
        assert self._graph_name is not None
        return by_graph.setdefault(self._graph_name, Fidelity())

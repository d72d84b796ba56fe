"""Runs the runtime's ``Session`` over the torch trunk, eager and in float32.

Its cache grows by concatenation.

Calibration runs the decoders over it, and verification takes it as the reference: it shares the
trunk's weights and position tables with the graphs, but neither their operators nor their cache.
Attention is torch's, K/V are concatenated and cropped, tokens are chosen by a softmax over the
whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Container
from typing import cast

import numpy as np
import torch
from torch import Tensor

from trimode.formats.contract import GRAPH_NAMES, TOP_K, DType, GraphName
from trimode.graphs.checkpoint import Checkpoint, Read
from trimode.graphs.decoder.attention import GrowingCacheAttention
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.numerics.stored import stored_as
from trimode.runtime.sessions.base import Array, Ids, KVCache

LayerSlots = tuple[Tensor, Tensor]
"""Keys and values of one layer, each ``(1, G, n, D)``."""


def load_trunk(
    checkpoint: Checkpoint,
    num_positions: int,
    stored: DType = "float32",
    read: Read | None = None,
    exact: Container[str] = (),
) -> TriModeTrunk:
    """Load a checkpoint's trunk in float32, ready for inference.

    It takes four bytes of memory a parameter.

    Args:
        checkpoint: Opened checkpoint.
        num_positions: Rows of the position tables.
        stored: Type that weights are rounded to first, as a bundle stores them.
        read: Function that reads the tensors, in the checkpoint's order; None = the checkpoint's
            own. A :class:`trimode.graphs.identity.SourceDigest` has seen all of it afterwards.
        exact: Names of the weights that are not rounded, because something else will be done to
            them: those that a bundle quantizes.

    Raises:
        CheckpointError: a file of the checkpoint ends too early.
        BuildError: a weight is too large for ``stored``.
    """
    trunk, read = blank_trunk(checkpoint, num_positions), read or checkpoint.read
    weights = {}
    for name, entry in checkpoint.tensors.items():
        dtype: DType = "float32" if name in exact else stored
        raw = bytearray().join(stored_as(dtype, name, entry, read(name)))
        weights[name] = (
            torch.frombuffer(raw, dtype=getattr(torch, dtype)).float().reshape(entry.shape)
        )
    trunk.load_state_dict(weights, assign=True)
    return trunk.eval().requires_grad_(False)


def blank_trunk(checkpoint: Checkpoint, num_positions: int) -> TriModeTrunk:
    """Make a trunk of the checkpoint's shape, without memory for its weights."""
    rank, alpha = drafter_shape(checkpoint)
    with torch.device("meta"):  # no weight is drawn that would be replaced at once
        return TriModeTrunk(
            checkpoint.config, num_positions, drafter_rank=rank, drafter_alpha=alpha
        )


def drafter_shape(checkpoint: Checkpoint) -> tuple[int, float]:
    """Return rank and alpha of the drafter; 0 without one."""
    drafter = checkpoint.drafter
    return (drafter.rank, drafter.alpha) if drafter else (0, 0.0)


class TorchCache(GrowingCacheAttention):
    """Holds what has been run; it is itself the attention pattern.

    It is a :class:`trimode.runtime.sessions.base.KVCache`.
    """

    @property
    def capacity(self) -> int:
        """Slots in use; there are no others."""
        return self.length

    def reserve(self, length: int) -> None:
        """Do nothing: the cache grows as it is written."""

    @property
    def layers(self) -> list[LayerSlots]:
        """Keys and values, layer by layer."""
        return [self._cache[i] for i in range(len(self._cache))]

    def replace(self, layers: list[LayerSlots]) -> None:
        """Hold these contents instead."""
        self._cache = dict(enumerate(layers))

    @classmethod
    def of(cls, layers: list[LayerSlots]) -> TorchCache:
        """Make a cache with these contents."""
        cache = cls()
        cache.replace(layers)
        return cache


class TorchSession:
    """Runs a :class:`trimode.runtime.sessions.base.Session` over the trunk.

    It runs on the device where the weights are.
    """

    max_prefill_rows = None

    def __init__(self, trunk: TriModeTrunk) -> None:
        self.trunk = trunk

    def check_block_length(
        self, block_length: int, graph_names: tuple[GraphName, ...] = GRAPH_NAMES
    ) -> None:
        """Accept any length."""

    def close(self) -> None:
        """Do nothing: Python counts the references."""

    def new_cache(self) -> TorchCache:
        """Give an empty cache."""
        return TorchCache()

    def run(
        self,
        graph_name: GraphName,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        """Run a graph; the outputs are the caller's own."""
        return self.forward(
            graph_name, cast("TorchCache", cache), input_ids, past_length, drafter_scale
        )

    @torch.inference_mode()
    def forward(
        self,
        graph_name: GraphName,
        cache: TorchCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
        input_length: int | None = None,
    ) -> tuple[Array, ...]:
        """Run like :meth:`run`.

        ``input_length`` says how many of the rows are real where a prompt chunk is padded on the
        right.
        """
        if graph_name == "quadratic":
            return self._quadratic(cache, input_ids, past_length)
        assert past_length <= cache.length, (past_length, cache.length)
        cache.crop(past_length)
        cache.is_causal = graph_name != "draft"
        ids = torch.from_numpy(np.ascontiguousarray(input_ids)).to(
            self.trunk.encoder.norm.weight.device
        )
        positions = torch.arange(past_length, past_length + ids.shape[1], device=ids.device)[None]
        scale = drafter_scale if graph_name == "draft" and drafter_scale else None
        hidden = self.trunk(ids, positions, cache, scale)  # (1, T, hidden_size)
        if graph_name == "ar":
            last = ids.shape[1] if input_length is None else input_length
            logits = self.trunk.head(hidden[:, last - 1]).float()
            return logits.argmax(-1).numpy(force=True), logits.numpy(force=True)
        logits = self.trunk.head(hidden).float()
        if graph_name == "verify":
            greedy = logits.argmax(-1).numpy(force=True)
            return greedy, accepted_lengths(greedy, input_ids), logits.numpy(force=True)
        best = logits.softmax(-1).topk(min(TOP_K, logits.shape[-1]), -1)
        return best.indices.numpy(force=True), best.values.numpy(force=True)

    def _quadratic(self, cache: TorchCache, input_ids: Ids, past_length: int) -> tuple[Array, ...]:
        """Run a causal forward, then a bidirectional one behind it.

        The second runs masked slots, which follow what the causal one accepts. The K/V of the first
        are kept.
        """
        greedy, accepted, logits = self.forward("verify", cache, input_ids, past_length)
        kept = cache.layers
        ids, probabilities = self.drafts_behind(
            cache, past_length + int(accepted[0]) + 1, input_ids.shape[1]
        )
        cache.replace(kept)
        return (
            greedy,
            accepted,
            logits,
            *led_by_causal(ids, probabilities, logits[:, int(accepted[0])]),
        )

    def drafts_behind(self, cache: TorchCache, past_length: int, rows: int) -> tuple[Array, Array]:
        """Draft masked slots behind ``past_length`` tokens.

        Returns candidates and probabilities, ``(1, rows, 5)``; their K/V end up in the cache.
        """
        masked = np.full((1, rows), self.trunk.config.mask_token_id, np.int64)
        ids, probabilities = self.forward("draft", cache, masked, past_length)
        return ids, probabilities


def led_by_causal(ids: Array, probabilities: Array, logits: Array) -> tuple[Array, Array]:
    """Replace the first slot's candidates by those of causal logits.

    Candidates and probabilities of slots are ``(B, T, 5)``, the logits ``(B, V)``.
    """
    best = torch.from_numpy(logits).softmax(-1).topk(ids.shape[-1], -1)
    ids[:, 0], probabilities[:, 0] = best.indices.numpy(), best.values.numpy()
    return ids, probabilities


def accepted_lengths(greedy_ids: Ids, input_ids: Ids) -> Ids:
    """Count the drafts in a row that equal the greedy ids.

    The drafts are ``input_ids[:, 1:]``: ``(B, T)``, ``(B, T)`` -> ``(B,)``.
    """
    agrees = greedy_ids[:, :-1] == input_ids[:, 1:]
    lengths: Ids = np.cumprod(agrees, 1).sum(1).astype(np.int64)
    return lengths

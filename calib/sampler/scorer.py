"""Scores slots by the network in PyTorch, as a bundle's graph does."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from trimode.graphs.sampler.network import BlockSampler
from trimode.runtime.decode.unmasking import Slots
from trimode.runtime.sessions.base import Array, Ids


class TorchScorer:
    """Implements :class:`trimode.runtime.decode.unmasking.Scorer` over the network."""

    def __init__(self, sampler: BlockSampler) -> None:
        self._sampler = sampler.eval()

    @torch.inference_mode()
    def score(
        self, block: Ids, masked: Slots, ids: Array, probabilities: Array
    ) -> NDArray[np.float32]:
        """Score every slot of a block, ``(L,)`` float32."""
        device = self._sampler.feature_mean.device
        arrays = (
            block.astype(np.int64),
            masked,
            ids.astype(np.int64),
            probabilities.astype(np.float32),
        )
        scores: NDArray[np.float32] = self._sampler(
            *(torch.from_numpy(array)[None].to(device) for array in arrays)
        )[0].numpy(force=True)
        return scores

"""Trains the trunk on chats: next tokens first, then jointly.

All that is drawn is drawn on the CPU, so that a seed means the same on every device, and moved to
where the trunk is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trimode.calib.demo.data import Chats, batches, noisy_window
from trimode.calib.demo.tasks import examples
from trimode.calib.demo.tokenizer import MASK, SPECIAL_IDS
from trimode.calib.demo.training import Training
from trimode.calib.training.objective import Corruption, JointLoss, joint_loss, joint_mask
from trimode.graphs.decoder.attention import MaskedAttention
from trimode.graphs.decoder.trunk import TriModeTrunk

AUTOREGRESSIVE_SHARE = 0.15


class JointTraining(Training):
    """Trains on next tokens for a while, then on the joint objective."""

    def _begin(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._source = batches(examples(seed, "train"), self.tokenizer, self.settings.batch_size)

    def _loss(self, share: float) -> JointLoss:
        chats = next(self._source)
        return (
            autoregressive_loss(self.trunk, chats)
            if share < AUTOREGRESSIVE_SHARE
            else denoising_loss(self.trunk, chats, self._generator)
        )


def autoregressive_loss(trunk: TriModeTrunk, chats: Chats) -> JointLoss:
    """Compute the objective without its noisy half."""
    chats = chats.to(device_of(trunk))
    logits = causal_logits(trunk, chats)
    nothing = torch.zeros(chats.ids.shape[0], 0, device=chats.ids.device)
    empty, weights = Corruption(nothing.bool(), nothing), chats.target_weights()
    return joint_loss(logits[:, :0], nothing.long(), empty, logits, chats.ids, weights)


def causal_logits(trunk: TriModeTrunk, chats: Chats) -> Tensor:
    """Compute causal logits, ``(B, N, V)``."""
    length = chats.ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=chats.ids.device).tril()
    return trunk.head(trunk(chats.ids, chats.positions, MaskedAttention(causal)))


def denoising_loss(trunk: TriModeTrunk, chats: Chats, generator: torch.Generator) -> JointLoss:
    """Compute the joint objective on one random window per chat."""
    block_size = trunk.config.block_size
    window = noisy_window(chats, block_size, generator)
    corruption = window.corrupt(generator)
    noisy_ids = window.targets.masked_fill(corruption.masked, SPECIAL_IDS[MASK])
    mask = joint_mask(window.positions, chats.positions, window.first_boundary, block_size)
    return loss_of(
        trunk, Noisy(noisy_ids, window.positions, window.targets, corruption), chats, mask
    )


class Noisy(NamedTuple):
    """Holds the noisy half of a forward, and which slots are masked.

    ``ids``, ``positions`` and uncorrupted ``targets`` are all ``(B, W)`` int64.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    corruption: Corruption

    def to(self, device: torch.device) -> Noisy:
        """Move all of it to a device."""
        ids, positions, targets = (part.to(device) for part in self[:3])
        masked, rate = (part.to(device) for part in self.corruption)
        return Noisy(ids, positions, targets, Corruption(masked, rate))


def loss_of(
    trunk: TriModeTrunk,
    noisy: Noisy,
    chats: Chats,
    mask: Tensor,
    *,
    texts: Chats | None = None,
    diffusion_weight: float = 0.3,
    see: Callable[[Tensor], None] | None = None,
) -> JointLoss:
    """Compute the joint objective on the trunk's device.

    Args:
        trunk: Trunk that is trained.
        noisy: Noisy half of the forward.
        chats: Clean half of the forward.
        mask: Attention mask, (B, 1, W + N, W + N) bool.
        texts: Texts for next-token prediction, in a forward of their own; None = ``chats``, in the
            same one.
        diffusion_weight: Weight of the noisy half.
        see: Function that is given the logits ``(B, W, V)`` of the noisy half.
    """
    device = device_of(trunk)
    noisy, chats, mask = noisy.to(device), chats.to(device), mask.to(device)
    noisy_hidden, clean_hidden = split_forward(
        trunk, noisy.ids, chats.ids, noisy.positions, chats.positions, mask
    )
    noisy_logits = trunk.head(noisy_hidden)
    if see is not None:
        see(noisy_logits)
    if texts is None:
        clean_logits = trunk.head(clean_hidden)
    else:
        chats = texts.to(device)
        clean_logits = causal_logits(trunk, chats)
    return joint_loss(
        noisy_logits,
        noisy.targets,
        noisy.corruption,
        clean_logits,
        chats.ids,
        chats.target_weights(),
        diffusion_weight=diffusion_weight,
    )


def device_of(trunk: TriModeTrunk) -> torch.device:
    """Return the device of the trunk's weights."""
    return trunk.encoder.norm.weight.device


def split_forward(
    trunk: TriModeTrunk,
    noisy_ids: Tensor,
    clean_ids: Tensor,
    noisy_positions: Tensor,
    clean_positions: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run one forward over ``[noisy | clean]``.

    Returns hidden states of the halves, ``(B, W, H)`` and ``(B, N, H)``.
    """
    ids, positions = (
        torch.cat((noisy_ids, clean_ids), 1),
        torch.cat((noisy_positions, clean_positions), 1),
    )
    hidden = trunk(ids, positions, MaskedAttention(mask))
    return hidden[:, : noisy_ids.shape[1]], hidden[:, noisy_ids.shape[1] :]

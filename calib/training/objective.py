"""Computes the joint objective from one forward over ``[noisy | clean]``.

It is next-token prediction and block denoising.

Both halves carry the same positions. A clean token sees the clean tokens up to itself; a noisy
token sees its own block of the noisy half and the clean tokens of strictly earlier blocks, which is
what a denoising forward sees at inference. With ``blk(p) = (p - first) // size``:

====================  ======================
noisy -> noisy        ``blk(q) == blk(k)``
noisy -> clean        ``blk(q) > blk(k)``
clean -> clean        ``q >= k``
clean -> noisy        never
====================  ======================

The noisy half may be any window of positions, per sequence, because a slot outside of the loss need
not be computed. Shapes: B batch, W noisy slots, N clean tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Corruption(NamedTuple):
    """Holds the masked slots, and the rate of masking.

    ``masked`` (B, W) bool is True where the mask token stands. ``rate`` (B, W) float is the
    probability with which it was put there.
    """

    masked: Tensor
    rate: Tensor


class JointLoss(NamedTuple):
    """Holds the scalar to minimise, and its two parts.

    The parts are means over their own tokens (``diffusion`` keeps its ``1 / rate`` weights).
    """

    total: Tensor
    autoregressive: Tensor
    diffusion: Tensor


def joint_mask(
    noisy_positions: Tensor, clean_positions: Tensor, first_boundary: Tensor | int, block_size: int
) -> Tensor:
    """Return the mask of who sees whom; rows are queries.

    Its shape is ``(B, 1, W + N, W + N)``, bool.

    Args:
        noisy_positions: Positions of the noisy slots, (B, W) int64.
        clean_positions: Positions of the clean tokens, (B, N) int64.
        first_boundary: Start of a block, (B, 1) or a number; blocks begin at ``first_boundary +
            i * block_size`` for every integer i.
        block_size: Tokens in a block.
    """
    noisy_block = torch.div(noisy_positions - first_boundary, block_size, rounding_mode="floor")
    clean_block = torch.div(clean_positions - first_boundary, block_size, rounding_mode="floor")
    noisy_noisy = noisy_block[:, :, None] == noisy_block[:, None, :]
    noisy_clean = noisy_block[:, :, None] > clean_block[:, None, :]
    clean_clean = clean_positions[:, :, None] >= clean_positions[:, None, :]
    clean_noisy = torch.zeros_like(noisy_clean).transpose(1, 2)
    top, bottom = torch.cat((noisy_noisy, noisy_clean), 2), torch.cat((clean_noisy, clean_clean), 2)
    return torch.cat((top, bottom), 1)[:, None]


def corrupt(
    trainable: Tensor, generator: torch.Generator, *, least_rate: float = 1e-3
) -> Corruption:
    """Mask trainable slots independently, at one rate per sequence.

    The rate is uniform in ``[least_rate, 1)``.

    Args:
        trainable: Slots that may be masked, (B, W) bool.
        generator: Source of randomness.
        least_rate: Lower end of the rate; 1 masks everything.
    """
    t = torch.rand((trainable.shape[0], 1), generator=generator)
    rate = ((1 - least_rate) * t + least_rate).expand(trainable.shape)
    return Corruption((torch.rand(trainable.shape, generator=generator) < rate) & trainable, rate)


def joint_loss(
    noisy_logits: Tensor,
    noisy_targets: Tensor,
    corruption: Corruption,
    clean_logits: Tensor,
    clean_ids: Tensor,
    clean_weights: Tensor,
    *,
    diffusion_weight: float = 0.3,
) -> JointLoss:
    """Compute the joint loss of both halves.

    It is ``(alpha * sum CE(noisy) / rate + sum w * CE(clean)) / (masked slots + sum w)``.

    A noisy row predicts its own token; a clean row predicts the next one.

    Args:
        noisy_logits: Logits of the noisy slots, (B, W, V).
        noisy_targets: Uncorrupted tokens, (B, W) int64.
        corruption: Slots that count, and their weights.
        clean_logits: Logits of the clean tokens, (B, N, V).
        clean_ids: Clean tokens, (B, N) int64.
        clean_weights: Weight of token i as a target, (B, N) float; that of token 0 is not used.
        diffusion_weight: Weight of the noisy half, alpha.
    """
    diffusion = (
        _cross_entropy(noisy_logits, noisy_targets)[corruption.masked]
        / corruption.rate[corruption.masked]
    )
    weights = clean_weights[:, 1:]
    autoregressive = (_cross_entropy(clean_logits[:, :-1], clean_ids[:, 1:]) * weights).sum()
    num_masked, num_clean = corruption.masked.sum(), weights.sum()
    total = (diffusion_weight * diffusion.sum() + autoregressive) / (num_masked + num_clean)
    return JointLoss(total, autoregressive / num_clean, diffusion.sum() / num_masked.clamp(min=1))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), reduction="none"
    ).view(targets.shape)

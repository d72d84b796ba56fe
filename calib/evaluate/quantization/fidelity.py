"""Measures how far a quantized computation is from the original one.

Sums are in float64 and added to as rows come; no row is kept.

The formulas, over all rows ``x`` of the original and ``y`` of the other:

- signal-to-noise ratio ``10 log10(sum |x|^2 / sum |x - y|^2)`` in decibels: one ratio of sums, so
  large rows weigh more
- cosine, the mean over rows of ``x . y / (|x| |y|)``: every row weighs alike; 1 where both are
  zero, 0 where one is
- divergence of Kullback and Leibler (1951), the mean over rows of ``sum_v p_v (ln p_v - ln q_v)``
  in nats, ``p`` and ``q`` the softmax of the original's logits and of the other's
- top-1 agreement, the share of rows whose largest logit is of the same token
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimode.calib.scales.statistics import LOSSLESS_DB
from trimode.errors import CheckpointError

_ROWS_AT_A_TIME = 64
"""Rows of logits in float64: with 131072 tokens, 64 MiB."""


class Fidelity:
    """Sums up the signal-to-noise ratio and the cosine of one tensor."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._signal = self._noise = self._cosines = 0.0

    def add(self, original: Tensor, other: Tensor) -> None:
        """Add two tensors ``(..., n)``; rows are along the last axis."""
        x, y = (tensor.flatten(0, -2).double() for tensor in (original, other))
        self.num_rows += x.shape[0]
        self._signal += float(x.square().sum())
        self._noise += float((x - y).square().sum())
        norms = x.norm(dim=-1), y.norm(dim=-1)
        both_zero = (norms[0] == 0) & (norms[1] == 0)
        cosines = (x * y).sum(-1) / (norms[0] * norms[1]).clamp(min=torch.finfo(torch.float64).tiny)
        self._cosines += float(torch.where(both_zero, 1.0, cosines).sum())

    @property
    def snr_db(self) -> float:
        """Ratio in decibels, from -LOSSLESS_DB to LOSSLESS_DB.

        :data:`~trimode.calib.scales.statistics.LOSSLESS_DB` also stands for no difference.

        Raises:
            CheckpointError: something is not finite.
        """
        signal, noise = _finite(self._signal), _finite(self._noise)
        if not noise:
            return LOSSLESS_DB
        return min(LOSSLESS_DB, 10 * math.log10(signal / noise)) if signal else -LOSSLESS_DB

    @property
    def cosine(self) -> float:
        """Mean cosine of the rows, -1 to 1.

        Raises:
            CheckpointError: something is not finite.
        """
        return max(-1.0, min(1.0, _finite(self._cosines) / self.num_rows))


class ProbabilityDivergence:
    """Sums up the divergence and top-1 agreement of next-token probabilities."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._nats = 0.0
        self._num_same = 0

    def add(self, original: Tensor, other: Tensor) -> None:
        """Add the logits ``(..., vocab_size)`` of both."""
        for p, q in zip(
            *(torch.split(logits.flatten(0, -2), _ROWS_AT_A_TIME) for logits in (original, other)),
            strict=True,
        ):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            # Never negative but by rounding.
            self._nats += float((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).sum())
            self._num_same += int((p.argmax(-1) == q.argmax(-1)).sum())
            self.num_rows += p.shape[0]

    @property
    def kl_nats(self) -> float:
        """Mean divergence of a row, in nats.

        Raises:
            CheckpointError: a logit is not finite.
        """
        return _finite(self._nats) / self.num_rows

    @property
    def top1_agreement(self) -> float:
        """Share of rows, 0 to 1."""
        return self._num_same / self.num_rows


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise CheckpointError(
            "expected finite hidden states and logits, found infinite ones or NaN",
            "weights or scales are damaged: download the checkpoint, or calibrate it, again",
        )
    return value

"""Trains the drafter, a low-rank branch on ``o_proj``.

The rest of the model is frozen. The branch acts while a block is drafted.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimode.calib.drafter.windows import (
    Answers,
    DrafterLoss,
    draft_forward,
    drafter_loss,
    window_lengths,
    window_starts,
)
from trimode.calib.training.budget import Budget, rate_at
from trimode.calib.training.checkpoint_writer import required_adapter_layers
from trimode.calib.training.optimizer import descend, set_rate
from trimode.graphs.decoder.trunk import TriModeTrunk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrafterSettings:
    """Holds the settings of a drafter's training.

    Attributes:
        learning_rate: Peak of the learning rate.
        warm_up, decay: Shares of the budget over which the learning rate rises and falls.
        noisy_slots: Slots of the noisy half per text, W; a window of L slots comes W / L times.
        token_weight: Weight of the cross-entropy to the verifier's token.
        distribution_weight: Weight of KL(verifier || drafter).
        seed: Seed of a fresh adapter and of the windows.
        autocast: Whether to compute in bfloat16 where that is safe.
        block_length: Slots of a drafted block; None = the model's block size.
    """

    learning_rate: float = 2e-3
    warm_up: float = 0.05
    decay: float = 0.6
    noisy_slots: int = 128
    token_weight: float = 10.0
    distribution_weight: float = 1.0
    seed: int = 0
    autocast: bool = True
    block_length: int | None = None


@dataclass
class DrafterProgress:
    """Counts what a training has done; the losses are running means."""

    step: int = 0
    seconds: float = 0.0
    first_loss: float = 0.0
    loss: float = 0.0
    accepted: float = 0.0


Report = Callable[[DrafterProgress, float], None]


def train_drafter(
    trunk: TriModeTrunk,
    answers: Iterator[Answers],
    budget: Budget,
    settings: DrafterSettings | None = None,
    report: Report = lambda _progress, _share: None,
) -> DrafterProgress:
    """Train the trunk's adapter from scratch, in place; no other weight changes.

    ``report`` is called after each step.

    The trunk has to hold the weights it will be used with, rounded if they will be.

    Raises:
        UsageError: the trunk has no adapter.
    """
    return DrafterTraining(trunk, settings).run(answers, budget, report)


class DrafterTraining:
    """Trains the trunk's adapter in place, interruptible after any step.

    Args:
        trunk: Trunk with an adapter, as for :func:`train_drafter`.
        settings: Settings of the training.
        from_scratch: Whether to begin with a fresh adapter, not with the trunk's.

    Raises:
        UsageError: the trunk has no adapter.
    """

    def __init__(
        self,
        trunk: TriModeTrunk,
        settings: DrafterSettings | None = None,
        *,
        from_scratch: bool = True,
    ) -> None:
        self.trunk, self.settings = trunk, settings or DrafterSettings()
        self.progress = DrafterProgress()
        self._weights = (
            reset_adapter(trunk, self.settings.seed) if from_scratch else adapter_weights(trunk)
        )
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=self.settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self._generator, self._rng = (
            torch.Generator().manual_seed(self.settings.seed),
            random.Random(self.settings.seed),
        )
        self._lengths = window_lengths(self.settings.block_length or trunk.config.block_size)

    def run(
        self,
        answers: Iterator[Answers],
        budget: Budget,
        report: Report = lambda _progress, _share: None,
    ) -> DrafterProgress:
        """Train until the budget is used up; earlier use of it counts.

        ``report`` is called after each step.
        """
        progress, started = self.progress, time.monotonic() - self.progress.seconds
        with _learning(self.trunk, self._weights):
            while (share := budget.progress(progress.seconds, progress.step)) < 1:
                loss = self._step(next(answers), share)
                _record(progress, loss)
                progress.seconds = time.monotonic() - started
                report(progress, share)
        log.info(
            "drafter: %d steps, loss %.3f, %.2f slots accepted",
            progress.step,
            progress.loss,
            progress.accepted,
        )
        return progress

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes up.

        Its types are those that ``torch.load(weights_only=True)`` reads. Tensors are not copied.
        """
        return {
            "weights": [weight.detach() for weight in self._weights],
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "rng": self._rng.getstate(),
            "progress": vars(self.progress),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue a training of the same settings.

        The next step is the one that it would have made, given the next answers.
        """
        with torch.no_grad():
            for weight, saved in zip(self._weights, state["weights"], strict=True):
                weight.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        version, words, gauss = state["rng"]
        self._rng.setstate((version, tuple(words), gauss))
        self.progress = DrafterProgress(**state["progress"])

    def _step(self, batch: Answers, share: float) -> DrafterLoss:
        settings, length = self.settings, self._rng.choice(self._lengths)
        starts = window_starts(batch, max(1, settings.noisy_slots // length), self._generator)
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=settings.autocast):
            forward = draft_forward(self.trunk, batch, starts, length)
        loss = drafter_loss(
            forward,
            token_weight=settings.token_weight,
            distribution_weight=settings.distribution_weight,
        )
        rate = rate_at(share, warm_up=settings.warm_up, decay=settings.decay)
        set_rate(self._optimizer, settings.learning_rate * rate)
        descend(self._optimizer, loss.total, self._weights)
        return loss


def adapter_weights(trunk: TriModeTrunk) -> list[nn.Parameter]:
    """Return the weights of the branch, layer by layer.

    Raises:
        UsageError: the trunk has no adapter.
    """
    return [
        weight
        for layer in required_adapter_layers(trunk)
        for name, weight in layer.named_parameters()
        if name != "weight"
    ]


def reset_adapter(trunk: TriModeTrunk, seed: int) -> list[nn.Parameter]:
    """Make the branch a fresh one, which changes nothing yet.

    Its down projection is random and its up projection zero. Returns its weights.
    """
    weights = adapter_weights(trunk)
    generator = torch.Generator().manual_seed(seed)
    for down, up in zip(weights[::2], weights[1::2], strict=True):
        bound = down.shape[1] ** -0.5
        drawn = torch.rand(down.shape, generator=generator) * 2 * bound - bound
        with torch.no_grad():
            down.copy_(drawn)
            up.zero_()
    return weights


@contextmanager
def _learning(trunk: TriModeTrunk, weights: list[nn.Parameter]) -> Iterator[None]:
    """Let only these weights take gradients; restore the others afterwards."""
    needed_grad = {p: p.requires_grad for p in trunk.parameters()}
    trunk.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, needed in needed_grad.items():
            parameter.requires_grad_(needed)
            parameter.grad = None


def _record(progress: DrafterProgress, loss: DrafterLoss) -> None:
    total, accepted = loss.total.item(), loss.accepted.item()
    if progress.step == 0:
        progress.first_loss, progress.loss, progress.accepted = total, total, accepted
    progress.step += 1
    progress.loss += 0.02 * (total - progress.loss)
    progress.accepted += 0.02 * (accepted - progress.accepted)

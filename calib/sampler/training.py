"""Trains a sampler's network on states: binary cross-entropy over the masked slots.

There are many states of each text and few texts, whose mistakes a network soon knows by heart. So
it has dropout and weight decay, and what is kept are the weights under which the loss on other
texts was lowest, the untrained ones among them: those score a slot by its probability.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trimode.calib.sampler.trajectories import States
from trimode.calib.training.budget import Budget, rate_at
from trimode.calib.training.optimizer import descend, set_rate
from trimode.graphs.sampler.network import BlockSampler, SamplerShape

LEAST_STD = 1e-4
"""A feature that varies less is a constant, and rounding its variation."""
LOSS_WINDOW = 100
CHECKS = 20
"""Number of times that the weights are tried on other texts."""
MAX_CHECKED = 4096
"""States of a block length that they are tried on."""


@dataclass
class SamplerProgress:
    """Counts what a training has done so far.

    Attributes:
        first_loss, loss: Means over :data:`LOSS_WINDOW` steps, or all if there were fewer.
        untrained_loss, best_loss: Losses on the states that decide, of the untrained weights and of
            the best so far.
        best_step: Number of steps that the best weights have been trained.
        checks: Number of times that weights have been tried.
    """

    step: int = 0
    seconds: float = 0.0
    first_loss: float = 0.0
    loss: float = 0.0
    untrained_loss: float = math.nan
    best_loss: float = math.inf
    best_step: int = 0
    checks: int = 0


Report = Callable[[SamplerProgress, float], None]


def new_sampler(
    shape: SamplerShape,
    token_table: Tensor,
    states: Mapping[int, States],
    mask_token_id: int,
    seed: int,
) -> BlockSampler:
    """Return an untrained network, its features standardised over these states.

    Args:
        shape: Sizes of the network.
        token_table: Semantics of the tokens, ``(V, 32)`` float16.
        states: States by block length.
        mask_token_id: Token that marks masked slots.
        seed: Seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampler = BlockSampler(shape, len(token_table))
    sampler.token_table.copy_(token_table)
    mean, std = _feature_statistics(sampler, states, mask_token_id)
    sampler.feature_mean.copy_(mean)
    sampler.feature_std.copy_(torch.where(std < LEAST_STD, 1.0, std))
    return sampler


def _feature_statistics(
    sampler: BlockSampler, states: Mapping[int, States], mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the features over all slots, float64."""
    count = 0
    total, squares = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for part in states.values():
        for start in range(0, len(part.blocks), 4096):
            chunk = States(*(tensor[start : start + 4096] for tensor in part))
            features = sampler.features(*_inputs(chunk, mask_token_id)).flatten(0, 1).double()
            count += len(features)
            total, squares = total + features.sum(0), squares + features.square().sum(0)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


def sampler_loss(sampler: BlockSampler, states: States, mask_token_id: int) -> Tensor:
    """Compute the mean binary cross-entropy over slots with a label.

    It is 0 if no slot has one.
    """
    labels, counts = states.labels(mask_token_id)
    logits = sampler.logits(*_inputs(states, mask_token_id))
    losses = functional.binary_cross_entropy_with_logits(
        logits, labels.to(logits.dtype), reduction="none"
    )
    return (losses * counts).sum() / counts.sum().clamp(min=1)


class SamplerTraining:
    """Trains a network in place, interruptible after any step.

    Args:
        sampler: Network to train.
        states: States by block length; each step draws one length and a batch of its states.
        validation: States of other texts, which decide what weights are kept.
        mask_token_id: Token that marks masked slots.
        learning_rate: Peak of the learning rate.
        batch_size: Slots in a step, so that steps take the same time at every block length.
        seed: Seed of the steps' data.
    """

    def __init__(
        self,
        sampler: BlockSampler,
        states: Mapping[int, States],
        validation: Mapping[int, States],
        mask_token_id: int,
        *,
        learning_rate: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.sampler, self.progress = sampler, SamplerProgress()
        self._states, self._mask, self._rate, self._batch_size = (
            dict(sorted(states.items())),
            mask_token_id,
            learning_rate,
            batch_size,
        )
        self._validation = {
            length: _some(part, MAX_CHECKED) for length, part in sorted(validation.items())
        }
        self._seed, self._generator = seed, torch.Generator().manual_seed(seed)
        self._best: dict[str, Tensor] = {}
        self._optimizer = torch.optim.AdamW(
            sampler.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1
        )

    def run(
        self, budget: Budget, report: Report = lambda _progress, _share: None
    ) -> SamplerProgress:
        """Train until the budget is used up, and leave the best weights.

        Earlier use of the budget counts. ``report`` is called after each step.
        """
        progress, started = self.progress, time.monotonic() - self.progress.seconds
        while (share := budget.progress(progress.seconds, progress.step)) < 1:
            if share * CHECKS >= progress.checks:
                self._check()
            self._record(self._step(share))
            progress.seconds = time.monotonic() - started
            report(progress, share)
        self._check()
        self.sampler.load_state_dict(self._best)
        return progress

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes up.

        Its types are those that ``torch.load(weights_only=True)`` reads. Tensors are not copied.
        """
        return {
            "sampler": self.sampler.state_dict(),
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "progress": vars(self.progress),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue a training with the step that it would have made."""
        self.sampler.load_state_dict(state["sampler"])
        self._best = dict(state["best"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self.progress = SamplerProgress(**state["progress"])

    def _step(self, share: float) -> float:
        lengths = list(self._states)
        length = lengths[int(torch.randint(len(lengths), (), generator=self._generator))]
        states = self._states[length]
        chosen = torch.randint(
            len(states.blocks), (max(1, self._batch_size // length),), generator=self._generator
        )
        device = self.sampler.feature_mean.device
        batch = States(*(tensor[chosen].to(device) for tensor in states))
        set_rate(self._optimizer, self._rate * rate_at(share, warm_up=0.05, decay=0.7))
        self.sampler.train()
        # dropout draws by the step alone, so that a run that is taken up draws the same
        with torch.random.fork_rng():
            torch.manual_seed((self._seed << 32) + self.progress.step)
            loss = sampler_loss(self.sampler, batch, self._mask)
        descend(self._optimizer, loss, self.sampler.parameters())
        return loss.item()

    def _check(self) -> None:
        """Try the weights on the states that decide; keep the best."""
        progress = self.progress
        parts = [
            validation_loss(self.sampler, states, self._mask)
            for states in self._validation.values()
        ]
        loss = sum(parts) / len(parts)
        progress.checks += 1
        if progress.step == 0:
            progress.untrained_loss = loss
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step = loss, progress.step
            self._best = {
                name: tensor.detach().clone() for name, tensor in self.sampler.state_dict().items()
            }

    def _record(self, loss: float) -> None:
        """Count a step; means begin plain, then forget as their window."""
        progress = self.progress
        progress.step += 1
        progress.loss += (loss - progress.loss) / min(progress.step, LOSS_WINDOW)
        if progress.step <= LOSS_WINDOW:
            progress.first_loss = progress.loss


def _inputs(states: States, mask_token_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the network takes."""
    return (
        states.blocks.long(),
        states.blocks == mask_token_id,
        states.ids.long(),
        states.probabilities,
    )


def _some(states: States, count: int) -> States:
    """Keep at most ``count`` of the states, evenly spread."""
    every = -(-len(states.blocks) // count)
    return States(*(tensor[::every] for tensor in states))


@torch.inference_mode()
def validation_loss(sampler: BlockSampler, states: States, mask_token_id: int) -> float:
    """Compute :func:`sampler_loss` without dropout, over all states."""
    labels, counts = states.labels(mask_token_id)
    scores = score_states(sampler, states, mask_token_id)[counts].double()
    return float(functional.binary_cross_entropy(scores, labels[counts].double()))


@torch.inference_mode()
def score_states(sampler: BlockSampler, states: States, mask_token_id: int) -> Tensor:
    """Score every slot, ``(N, L)``, on the CPU."""
    sampler.eval()
    device = sampler.feature_mean.device
    parts = zip(*(torch.split(tensor, 1024) for tensor in states), strict=True)
    chunks = (States(*(tensor.to(device) for tensor in part)) for part in parts)
    return torch.cat([sampler(*_inputs(chunk, mask_token_id)).cpu() for chunk in chunks])

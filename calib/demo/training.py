"""Runs a training that can be interrupted and resumed.

It has a learning rate, an optimizer, running means, and a state to go on from.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from trimode.calib.training.budget import Budget, rate_at
from trimode.calib.training.objective import JointLoss
from trimode.calib.training.optimizer import descend, set_rate
from trimode.graphs.decoder.trunk import TriModeTrunk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Holds the settings of a training run."""

    seed: int = 0
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warm_up: float = 0.02
    decay: float = 0.45
    save_every_s: float = 180.0


@dataclass
class DemoProgress:
    """Counts what a training run has done so far.

    Attributes:
        seconds: Wall-clock time, which other work on the machine makes longer.
        processor_seconds: Time on all cores together, which it hardly changes.
        losses: Running means, and other figures that a stage keeps.
    """

    step: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


Report = Callable[[DemoProgress, float], None]


class Training(ABC):
    """Trains, stops and goes on again, on what a subclass says.

    Args:
        trunk: Trunk to train in place, on its device; its drafter adapter is left alone.
        tokenizer: Tokenizer of the checkpoint.
        settings: Settings of the run.
        state: File that holds the run's state, written whole or not at all.
    """

    def __init__(
        self, trunk: TriModeTrunk, tokenizer: Tokenizer, settings: Settings, state: Path
    ) -> None:
        self.trunk, self.tokenizer, self.settings, self.state = trunk, tokenizer, settings, state
        self.progress = DemoProgress()
        weights = [p for n, p in trunk.named_parameters() if "lora_" not in n]
        groups = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.device = weights[0].device
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-8
        )

    def run(self, budget: Budget, report: Report = lambda _progress, _share: None) -> DemoProgress:
        """Train until the budget is used up; earlier use of it counts.

        ``report`` is called after each step.
        """
        seed = f"{self.settings.seed} {self.progress.step}"
        self._begin(hash_seed(seed))
        before, saved = (
            (
                time.monotonic() - self.progress.seconds,
                time.process_time() - self.progress.processor_seconds,
            ),
            time.monotonic(),
        )
        while (share := budget.progress(self.progress.seconds, self.progress.step)) < 1:
            loss = self._step(share)
            self.progress.step += 1
            self.progress.seconds, self.progress.processor_seconds = (
                time.monotonic() - before[0],
                time.process_time() - before[1],
            )
            self._record(loss)
            report(self.progress, share)
            if time.monotonic() - saved > self.settings.save_every_s:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.progress

    def save(self) -> None:
        """Write the state atomically."""
        trained = {
            name: tensor for name, tensor in self.trunk.state_dict().items() if ".lora_" not in name
        }
        state = {
            "trunk": trained,
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
        }
        temporary = self.state.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.state)
        log.info("step %d: saved %s", self.progress.step, self.state)

    def load(self) -> None:
        """Take up the run that the state file holds."""
        state: dict[str, Any] = torch.load(self.state, map_location="cpu", weights_only=True)
        own = self.trunk.state_dict()
        adapter = {name: tensor for name, tensor in own.items() if ".lora_" in name}
        self.trunk.load_state_dict({**state["trunk"], **adapter})
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = DemoProgress(**state["progress"])

    @abstractmethod
    def _begin(self, seed: int) -> None:
        """Start drawing examples."""

    @abstractmethod
    def _loss(self, share: float) -> JointLoss:
        """Compute the loss of the next step, at ``share`` of the budget."""

    def _step(self, share: float) -> JointLoss:
        settings = self.settings
        rate = rate_at(share, warm_up=settings.warm_up, decay=settings.decay)
        set_rate(self.optimizer, settings.learning_rate * rate)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self._loss(share)
        descend(self.optimizer, loss.total, self.optimizer.param_groups[0]["params"])
        return loss

    def _record(self, loss: JointLoss) -> None:
        for name, value in (("autoregressive", loss.autoregressive), ("diffusion", loss.diffusion)):
            if value > 0:
                self._count(name, value.item())

    def _count(self, name: str, value: float) -> None:
        """Keep running means that forget with a time constant of 50 values."""
        mean = self.progress.losses.get(name, value)
        self.progress.losses[name] = mean + 0.02 * (value - mean)


def hash_seed(text: str) -> int:
    """Derive a seed below 2**31 from a text, alike in every process."""
    return int.from_bytes(text.encode(), "big") % (2**31 - 1)

"""Trains the trunk on chats: next-token prediction alone first, then the joint objective, on a budget of time or of steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trimode.calib.budget import Budget, rate_at
from trimode.calib.demo.data import Chats, batches, noisy_window
from trimode.calib.demo.tasks import examples
from trimode.calib.demo.tokenizer import MASK, SPECIAL_IDS
from trimode.calib.objective import Corruption, JointLoss, joint_loss, joint_mask
from trimode.graphs.attention import MaskedAttention
from trimode.graphs.trunk import TriModeTrunk

log = logging.getLogger(__name__)

AUTOREGRESSIVE_SHARE, WARM_UP_SHARE, DECAY_SHARE = 0.15, 0.02, 0.45


@dataclass(frozen=True)
class Settings:
    """What a training run is told."""

    seed: int = 0
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    save_every_s: float = 180.0


@dataclass
class Progress:
    """What a training run has done so far."""

    step: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


Report = Callable[[Progress, float], None]


class JointTraining:
    """A run that can be stopped and taken up again.

    Args:
        trunk: trained in place; its drafter adapter is left alone.
        tokenizer: of the checkpoint.
        settings: of the run.
        state: file that holds the run's state, written whole or not at all.
    """

    def __init__(self, trunk: TriModeTrunk, tokenizer: Tokenizer, settings: Settings, state: Path) -> None:
        self.trunk, self.tokenizer, self.settings, self.state = trunk, tokenizer, settings, state
        self.progress = Progress()
        weights = [p for n, p in trunk.named_parameters() if "lora_" not in n]
        groups = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-8)

    def run(self, budget: Budget, report: Report = lambda _progress, _share: None) -> Progress:
        """Train until the budget is used up, counting what an earlier run has used; ``report`` is called after each step."""
        seed = f"{self.settings.seed} {self.progress.step}"
        generator = torch.Generator().manual_seed(hash_seed(seed))
        source = batches(examples(hash_seed(seed), "train"), self.tokenizer, self.settings.batch_size)
        started, before, saved = time.monotonic(), self.progress.seconds, time.monotonic()
        while (share := budget.progress(self.progress.seconds, self.progress.step)) < 1:
            loss = self._step(next(source), generator, share)
            self.progress.step += 1
            self.progress.seconds = before + time.monotonic() - started
            self._record(loss)
            report(self.progress, share)
            if time.monotonic() - saved > self.settings.save_every_s:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.progress

    def save(self) -> None:
        """Write the state atomically."""
        state = {"trunk": self.trunk.state_dict(), "optimizer": self.optimizer.state_dict(), "progress": vars(self.progress)}
        temporary = self.state.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.state)
        log.info("step %d: saved %s", self.progress.step, self.state)

    def load(self) -> None:
        """Take up the run that the state file holds."""
        state: dict[str, Any] = torch.load(self.state, weights_only=True)
        self.trunk.load_state_dict(state["trunk"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def _step(self, chats: Chats, generator: torch.Generator, share: float) -> JointLoss:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate_at(share, warm_up=WARM_UP_SHARE, decay=DECAY_SHARE)
        with torch.autocast("cpu", torch.bfloat16):
            loss = autoregressive_loss(self.trunk, chats) if share < AUTOREGRESSIVE_SHARE else denoising_loss(self.trunk, chats, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        return loss

    def _record(self, loss: JointLoss) -> None:
        """Keep running means that forget with a time constant of 50 steps."""
        for name, value in (("autoregressive", loss.autoregressive), ("diffusion", loss.diffusion)):
            if value > 0:
                mean = self.progress.losses.get(name, value.item())
                self.progress.losses[name] = mean + 0.02 * (value.item() - mean)


def hash_seed(text: str) -> int:
    """A seed below 2**31 from a text, the same in every process."""
    return int.from_bytes(text.encode(), "big") % (2**31 - 1)


def autoregressive_loss(trunk: TriModeTrunk, chats: Chats) -> JointLoss:
    """The objective without its noisy half."""
    length = chats.ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    logits = trunk.head(trunk(chats.ids, chats.positions, MaskedAttention(causal)))
    nothing = torch.zeros(chats.ids.shape[0], 0)
    empty = Corruption(nothing.bool(), nothing)
    return joint_loss(logits[:, :0], nothing.long(), empty, logits, chats.ids, chats.target_weights())


def denoising_loss(trunk: TriModeTrunk, chats: Chats, generator: torch.Generator) -> JointLoss:
    """The joint objective on one random window per chat."""
    block_size = trunk.config.block_size
    window = noisy_window(chats, block_size, generator)
    corruption = window.corrupt(generator)
    noisy_ids = window.targets.masked_fill(corruption.masked, SPECIAL_IDS[MASK])
    mask = joint_mask(window.positions, chats.positions, window.first_boundary, block_size)
    noisy_logits, clean_logits = split_forward(trunk, noisy_ids, chats.ids, window.positions, chats.positions, mask)
    return joint_loss(noisy_logits, window.targets, corruption, clean_logits, chats.ids, chats.target_weights())


def split_forward(
    trunk: TriModeTrunk, noisy_ids: Tensor, clean_ids: Tensor, noisy_positions: Tensor, clean_positions: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """One forward over ``[noisy | clean]``; logits of the halves, ``(B, W, V)`` and ``(B, N, V)``."""
    ids, positions = torch.cat((noisy_ids, clean_ids), 1), torch.cat((noisy_positions, clean_positions), 1)
    logits = trunk.head(trunk(ids, positions, MaskedAttention(mask)))
    return logits[:, : noisy_ids.shape[1]], logits[:, noisy_ids.shape[1] :]

"""Trains the drafter, a low-rank branch on ``o_proj``, the rest of the model frozen.

The branch acts while a block is drafted.

Two forwards a step. The first is the text, causal and without the branch or gradients: its logits
are what the verifier would say at each slot. The second holds several windows, each drawn up as a
draft forward sees it: a known first token, mask tokens after it, and the clean text before it.

Only what self-speculation would use counts: the accepted prefix of a window and the first slot that
the verifier would reject. Shapes: B texts, K windows of L slots, W = K * L, N tokens of text, V
vocabulary.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimode.calib.training.budget import Budget, rate_at
from trimode.calib.training.checkpoint_writer import adapter_layers
from trimode.errors import UsageError
from trimode.graphs.decoder.trunk import TriModeTrunk

log = logging.getLogger(__name__)


class Answers(Protocol):
    """Holds B texts from position 0, each with an answer in it.

    The answer is best written by the model itself (greedy).

    ``ids (B, N)`` int64, anything after the answer; ``answer_start (B, 1)``, position of the
    answer's first token; ``end (B, 1)``, position of its last token, which comes later than the
    first.
    """

    @property
    def ids(self) -> Tensor:
        """(B, N) int64."""

    @property
    def answer_start(self) -> Tensor:
        """(B, 1) int64."""

    @property
    def end(self) -> Tensor:
        """(B, 1) int64."""


@dataclass(frozen=True)
class DrafterSettings:
    """What the training of a drafter is told.

    Attributes:
        noisy_slots: slots of the noisy half per text, W; a window of L slots comes W / L times.
        token_weight, distribution_weight: of the cross-entropy to the verifier's token, and of
        KL(verifier || drafter).
        warm_up, decay: shares of the budget over which the learning rate rises and falls.
        autocast: computes in bfloat16 where that is safe.
        block_length: slots of a block that will be drafted; None = the model's.
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


class DraftForward(NamedTuple):
    """Windows of L slots, each without its known first slot.

    ``draft_logits (B, K, L - 1, V)``; ``verifier_logits``, the same of the causal model at each
    slot; ``written (B, K, L - 1)`` int64, the text's tokens; ``inside (B, K, L - 1)`` bool, slots
    up to the answer's end.
    """

    draft_logits: Tensor
    verifier_logits: Tensor
    written: Tensor
    inside: Tensor


class DrafterLoss(NamedTuple):
    """Holds the scalars of a step: the loss to minimise, its two parts, ``accepted``.

    ``accepted`` is the mean number of slots a window would get accepted.
    """

    total: Tensor
    token: Tensor
    distribution: Tensor
    accepted: Tensor


@dataclass
class DrafterProgress:
    """What a drafter's training has done so far; the losses are running means."""

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
    """Trains the trunk's adapter in place; stops after any step and goes on again.

    Args:
        trunk: Trunk with an adapter, as for :func:`train_drafter`.
        settings: Settings of the training.
        from_scratch: begin with a fresh adapter; otherwise with the one that the trunk has.

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
        """Train until the budget is used up, counting what has been used before.

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
        """Give what :meth:`load` takes up.

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
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate_at(
                share, warm_up=settings.warm_up, decay=settings.decay
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        return loss


def adapter_weights(trunk: TriModeTrunk) -> list[nn.Parameter]:
    """The weights of the branch, layer by layer.

    Raises:
        UsageError: the trunk has no adapter.
    """
    weights = [
        weight
        for layer in adapter_layers(trunk)
        for name, weight in layer.named_parameters()
        if name != "weight"
    ]
    if not weights:
        raise UsageError(
            "expected a trunk with a drafter adapter, found one without",
            "give TriModeTrunk a drafter_rank",
        )
    return weights


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


def window_lengths(block_size: int) -> tuple[int, ...]:
    """List lengths to draw a step's windows from.

    They are mostly the model's block, now and then half, a quarter or double of it.
    """
    return (max(2, block_size // 4), max(2, block_size // 2), *[block_size] * 5, 2 * block_size)


def window_starts(answers: Answers, num_windows: int, generator: torch.Generator) -> Tensor:
    """Draw where windows begin, (B, K) int64.

    A window begins where an answer does, as in the first cycle of every generation, or anywhere
    before its last token.
    """
    length = (answers.end - answers.answer_start).cpu()
    inside = (torch.rand((length.shape[0], num_windows), generator=generator) * length).long()
    inside[:, 0] = 0
    return answers.answer_start + inside.to(answers.ids.device)


def draft_mask(starts: Tensor, length: int, num_clean: int) -> Tensor:
    """Say who sees whom, ``(B, 1, W + N, W + N)`` bool.

    It is :func:`trimode.calib.training.objective.joint_mask` for windows that may overlap.

    A slot sees its own window and the clean tokens before it begins; a clean token sees the clean
    tokens up to itself.

    Args:
        starts: (B, K) int64, position of each window's first slot.
        length: slots of a window, L.
        num_clean: N.
    """
    batch, num_windows = starts.shape
    window = torch.arange(num_windows, device=starts.device).repeat_interleave(length)
    position = torch.arange(num_clean, device=starts.device)
    noisy_noisy = (window[:, None] == window).expand(batch, -1, -1)
    noisy_clean = starts.repeat_interleave(length, 1)[:, :, None] > position
    clean_clean = (position[:, None] >= position).expand(batch, -1, -1)
    top = torch.cat((noisy_noisy, noisy_clean), 2)
    bottom = torch.cat((torch.zeros_like(noisy_clean).transpose(1, 2), clean_clean), 2)
    return torch.cat((top, bottom), 1)[:, None]


def counted_slots(drafted: Tensor, verified: Tensor, written: Tensor, inside: Tensor) -> Tensor:
    """Mark each window's accepted prefix and the slot after it, (B, K, L - 1) bool.

    A slot is reached if the drafter said what the verifier says at every slot before it. The text
    has to say the same there, for otherwise the verifier's later logits follow a prefix that it
    would not have written.

    Args:
        drafted: (B, K, L - 1) int64, greedy tokens of the drafter, without the known first slot.
        verified: Same of the verifier.
        written: Same of the text.
        inside: (B, K, L - 1) bool, slots up to the answer's end.
    """
    agrees = (drafted == verified) & (written == verified)
    reached = torch.ones_like(agrees)
    reached[..., 1:] = agrees[..., :-1].cumprod(-1).bool()
    return reached & inside


def drafter_loss(
    forward: DraftForward, *, token_weight: float = 10.0, distribution_weight: float = 1.0
) -> DrafterLoss:
    """Average a weighted loss over :func:`counted_slots`.

    It is ``token_weight * CE(to the verifier's greedy token) + distribution_weight * KL(verifier ||
    drafter)``.
    """
    drafted, verified = forward.draft_logits.argmax(-1), forward.verifier_logits.argmax(-1)
    counted = counted_slots(drafted, verified, forward.written, forward.inside)
    count = counted.sum().clamp(min=1)
    draft = functional.log_softmax(forward.draft_logits[counted].float(), -1)
    verifier = functional.log_softmax(forward.verifier_logits[counted].detach().float(), -1)
    token = functional.nll_loss(draft, verified[counted], reduction="sum") / count
    distribution = functional.kl_div(draft, verifier, reduction="sum", log_target=True) / count
    accepted = (counted & (drafted == verified)).sum() / forward.inside.any(-1).sum().clamp(min=1)
    return DrafterLoss(
        token_weight * token + distribution_weight * distribution, token, distribution, accepted
    )


def draft_forward(
    trunk: TriModeTrunk, answers: Answers, starts: Tensor, length: int
) -> DraftForward:
    """Draft windows of ``length`` slots at ``starts (B, K)`` and verify the text there."""
    batch, num_clean = answers.ids.shape
    device = starts.device
    clean_positions = torch.arange(num_clean, device=device).expand(batch, -1)
    slots = starts[:, :, None] + torch.arange(length, device=device)  # (B, K, L)
    tokens = _at(answers.ids, slots)
    drafting = torch.full_like(tokens, trunk.config.mask_token_id)
    drafting[..., 0] = tokens[..., 0]
    attention = _TextAttention(draft_mask(starts, length, num_clean)[:, :, : slots[0].numel()])
    with torch.no_grad():  # the row before a slot predicts it
        clean = trunk(answers.ids, clean_positions, attention)
        rows = (slots[..., 1:] - 1).clamp(max=num_clean - 1)
        verifier_logits = trunk.head(clean[torch.arange(batch, device=device)[:, None, None], rows])
    noisy = trunk(drafting.flatten(1), slots.flatten(1), attention, 1.0).unflatten(
        1, slots.shape[1:]
    )
    return DraftForward(
        trunk.head(noisy[:, :, 1:]),
        verifier_logits,
        tokens[..., 1:],
        slots[..., 1:] <= answers.end[:, :, None],
    )


@contextmanager
def _learning(trunk: TriModeTrunk, weights: list[nn.Parameter]) -> Iterator[None]:
    """Only these weights take gradients; afterwards all is as before."""
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


class _TextAttention:
    """Attends causally over a text, then lets windows see it.

    The second forward's windows see the first one's keys and values beside their own.

    The text needs no gradient, for the branch is idle there; apart from the windows it also costs
    no backward pass.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self._text: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer not in self._text:
            self._text[layer] = k, v
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        text_k, text_v = self._text[layer]
        k, v = torch.cat((k, text_k), 2), torch.cat((v, text_v), 2)
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self._mask, enable_gqa=True
        )


def _record(progress: DrafterProgress, loss: DrafterLoss) -> None:
    total, accepted = loss.total.item(), loss.accepted.item()
    if progress.step == 0:
        progress.first_loss, progress.loss, progress.accepted = total, total, accepted
    progress.step += 1
    progress.loss += 0.02 * (total - progress.loss)
    progress.accepted += 0.02 * (accepted - progress.accepted)


def _at(ids: Tensor, slots: Tensor) -> Tensor:
    """Tokens at positions ``(B, K, L)``; after the last position, the last token."""
    flat = slots.flatten(1).clamp(max=ids.shape[1] - 1)
    return ids.gather(1, flat).view(slots.shape)

"""Drafts windows of answers and verifies them: the loss of a drafter.

A step runs two forwards. The first is the text, causal and without the branch or gradients: its
logits are what the verifier would say at each slot. The second holds several windows, each drawn up
as a draft forward sees it: a known first token, mask tokens after it, and the clean text before it.

Only what self-speculation would use counts: the accepted prefix of a window and the first slot that
the verifier would reject. Shapes: B texts, K windows of L slots, W = K * L, N tokens of text, V
vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from trimode.graphs.decoder.trunk import TriModeTrunk


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
    """Holds the loss to minimise, its two parts, and ``accepted``.

    ``accepted`` is the mean number of slots a window would get accepted.
    """

    total: Tensor
    token: Tensor
    distribution: Tensor
    accepted: Tensor


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
    """Return the mask of who sees whom; rows are queries.

    Its shape is ``(B, 1, W + N, W + N)``, bool. It is
    :func:`trimode.calib.training.objective.joint_mask` for windows that may overlap. A slot sees
    its own window and the clean tokens before it begins; a clean token sees the clean tokens up to
    itself.

    Args:
        starts: Position of each window's first slot, (B, K) int64.
        length: Slots of a window, L.
        num_clean: Tokens of the text, N.
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
    """Mark the accepted prefix of each window and the slot after it.

    A slot is reached if the drafter said what the verifier says at every slot before it. The text
    has to say the same there, for otherwise the verifier's later logits follow a prefix that it
    would not have written.

    Args:
        drafted: Greedy tokens of the drafter, without the known first slot, (B, K, L - 1) int64.
        verified: Greedy tokens of the verifier, likewise.
        written: Tokens of the text, likewise.
        inside: Slots up to the answer's end, (B, K, L - 1) bool.

    Returns:
        Slots that count, (B, K, L - 1) bool.
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
    """Draft windows of ``length`` slots at ``starts (B, K)``, and verify them."""
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


def _at(ids: Tensor, slots: Tensor) -> Tensor:
    """Return tokens at positions ``(B, K, L)``, padded with the last."""
    flat = slots.flatten(1).clamp(max=ids.shape[1] - 1)
    return ids.gather(1, flat).view(slots.shape)

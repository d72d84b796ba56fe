"""Makes batches of chats.

A chat is the frame and the question, the answer, its end token, and end tokens up to the common
length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trimode.calib.demo.tasks import Example
from trimode.calib.demo.tokenizer import IM_END, SPECIAL_IDS, render_prompt
from trimode.calib.training.objective import Corruption, corrupt

LENGTH_STEP = 16
PROMPT_WEIGHT, TAIL_WEIGHT = 0.2, 0.05
DRAFT_STATE_SHARE = 0.5
LEAST_RATE = 0.1
NUM_BLOCKS = 2


@dataclass(frozen=True)
class Chats:
    """Holds B single-turn chats from position 0.

    Attributes:
        ids: Token ids (B, N) int64, filled with the end token after the answer.
        answer_start: Position of the answer's first token, (B, 1) int64.
        end: Position of the answer's end token, (B, 1) int64.
    """

    ids: Tensor
    answer_start: Tensor
    end: Tensor

    @property
    def positions(self) -> Tensor:
        """(B, N) int64."""
        return torch.arange(self.ids.shape[1], device=self.ids.device).expand(self.ids.shape)

    def to(self, device: torch.device) -> Chats:
        """Move the chats to a device."""
        return Chats(self.ids.to(device), self.answer_start.to(device), self.end.to(device))

    def target_weights(self) -> Tensor:
        """Weight of each token as a target, (B, N) float."""
        weights = torch.full(self.ids.shape, PROMPT_WEIGHT, device=self.ids.device)
        weights[self.positions >= self.answer_start] = 1.0
        weights[self.positions > self.end] = TAIL_WEIGHT
        return weights


@dataclass(frozen=True)
class NoisyWindow:
    """Holds the noisy half of a batch: blocks that begin in answers.

    Attributes:
        positions: Positions of the slots, (B, W) int64.
        targets: Uncorrupted tokens, (B, W) int64.
        trainable: Slots that a denoising forward would meet, (B, W) bool.
        first_boundary: Position at which the first block begins, (B, 1) int64.
    """

    positions: Tensor
    targets: Tensor
    trainable: Tensor
    first_boundary: Tensor

    def corrupt(self, generator: torch.Generator) -> Corruption:
        """Corrupt half of the sequences; mask the others whole.

        The rate of corruption is random. A drafter meets every trainable slot masked.
        """
        random = corrupt(self.trainable, generator, least_rate=LEAST_RATE)
        drafting = torch.rand((self.trainable.shape[0], 1), generator=generator) < DRAFT_STATE_SHARE
        masked = torch.where(drafting, self.trainable, random.masked)
        return Corruption(masked, torch.where(drafting, torch.ones(()), random.rate))


def batches(examples: Iterator[Example], tokenizer: Tokenizer, batch_size: int) -> Iterator[Chats]:
    """Yield batches without end, in the order of the examples."""
    while True:
        yield encode(list(islice(examples, batch_size)), tokenizer)


def encode(examples: list[Example], tokenizer: Tokenizer) -> Chats:
    """Render examples by the chat template; pad them to one length."""
    prompts = [tokenizer.encode(render_prompt(e.prompt)).ids for e in examples]
    answers = [tokenizer.encode(e.answer + IM_END).ids for e in examples]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(examples), -(-longest // LENGTH_STEP) * LENGTH_STEP), SPECIAL_IDS[IM_END])
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    answer_start = torch.tensor([[len(p)] for p in prompts])
    return Chats(ids, answer_start, answer_start + torch.tensor([[len(a) - 1] for a in answers]))


def noisy_window(chats: Chats, block_size: int, generator: torch.Generator) -> NoisyWindow:
    """Place :data:`NUM_BLOCKS` blocks at a random offset into each answer.

    The first slot of a block is known at inference (the causal forward before it predicted it), so
    it is never masked. Slots after the end token are to be filled with end tokens; a block that
    begins at the end token or later is never denoised, so it is no target.
    """
    size = (chats.ids.shape[0], 1)
    offset = torch.randint(block_size, size, generator=generator)
    length = chats.end - chats.answer_start + 1
    offset = offset + block_size * (
        (length > NUM_BLOCKS * block_size) & (torch.rand(size, generator=generator) < 0.5)
    )
    first = chats.answer_start + torch.minimum(offset, length - 2)
    positions = first + torch.arange(NUM_BLOCKS * block_size)
    targets = chats.ids.gather(1, positions.clamp(max=chats.ids.shape[1] - 1))
    targets[positions > chats.end] = SPECIAL_IDS[IM_END]
    block_start = positions - (positions - first) % block_size
    return NoisyWindow(
        positions, targets, (block_start < chats.end) & (positions != block_start), first
    )

"""Trains further on the states that block diffusion visits.

Random corruption hides easy and hard slots alike. A decoder fills the easy ones first, so what it
meets next are the hard ones that are left; a model that has seldom seen that is sure of none of
them and has to guess. Here every block is therefore denoised as at inference: after each training
step the slots that the forward was sure of are revealed (with the true tokens), and the next step
trains on what is left. One forward is both a step of training and a step of decoding, so following
the decoder costs nothing, and a block that takes many forwards is trained on as many times.

Several blocks of an answer, which may overlap, share one clean copy of the text. Next-token
prediction is trained on other texts, each of which comes once: a text that is hard to denoise stays
for more steps, and its wording would pass for a more usual one than it is. Shapes: B chats, K
blocks of L slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.calib.demo.data import LEAST_RATE, batches, encode
from trimode.calib.demo.joint import Noisy, loss_of
from trimode.calib.demo.tasks import FAMILIES, Example, examples
from trimode.calib.demo.tokenizer import MASK, SPECIAL_IDS
from trimode.calib.demo.training import Training, hash_seed
from trimode.calib.drafter.windows import draft_mask
from trimode.calib.training.objective import Corruption, JointLoss

NUM_BLOCKS = 4
ALIGNED_SHARE = 0.8
"""Blocks that begin where diffusion begins one; self-speculation goes on from anywhere."""
MASKED_SHARE = 0.5
"""Blocks that begin wholly masked, as at inference; the others begin at a random rate of
corruption.
"""
THRESHOLDS = 0.6, 0.95
"""Range of the confidence at which a block's slots are revealed."""
FAMILIES_IN_TURN = (
    *FAMILIES,
    "addition",
    "json",
    "sort",
    "addition",
    "table",
    "sort",
    "addition",
    "reverse",
)
"""Families of a step. Those that denoising gets wrong come more often: steps that each need the one
before, and words that have to agree with an earlier one.
"""
DIFFUSION_WEIGHT = 1.0
"""More than in the joint stage, for next-token prediction has little left to learn."""


@dataclass
class Visit:
    """Holds one block on its way through the decoder.

    Attributes:
        start: Tokens of the answer before the block.
        threshold: Confidence at which slots are revealed.
        masked: Slots that hold the mask token, (L,) bool.
        rate: Probability with which they were masked; 1 once they are what a forward left.
        flawless: Whether every slot revealed so far would have been filled with the true token.
    """

    start: int
    threshold: float
    masked: Tensor
    rate: float
    flawless: bool = True


@dataclass
class Row:
    """Holds a chat with the blocks that are denoised in its answer.

    ``waiting`` are those that have not arrived once.
    """

    example: Example
    length: int
    visits: list[Visit]
    waiting: set[int]


class RefinementTraining(Training):
    """Trains by the joint objective on blocks on their way.

    One that has arrived is drawn anew. A chat whose blocks all have makes room for another.
    """

    def _begin(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._source = examples(seed, "train", FAMILIES_IN_TURN)
        self._texts = batches(
            examples(hash_seed(f"{seed} texts"), "train"), self.tokenizer, self.settings.batch_size
        )
        self._rows = [self._new_row() for _ in range(self.settings.batch_size)]

    def _loss(self, share: float) -> JointLoss:  # noqa: ARG002
        chats = encode([row.example for row in self._rows], self.tokenizer)
        size, length = self.trunk.config.block_size, chats.ids.shape[1]
        starts = chats.answer_start + torch.tensor(
            [[v.start for v in row.visits] for row in self._rows]
        )
        slots = starts[:, :, None] + torch.arange(size)  # (B, K, L)
        positions = slots.flatten(1)
        # all end tokens after the answer
        targets = chats.ids.gather(1, positions.clamp(max=length - 1))
        corruption = self._corruption(size)
        noisy_ids = targets.masked_fill(corruption.masked, SPECIAL_IDS[MASK])
        mask = draft_mask(starts, size, length)
        noisy = Noisy(noisy_ids, positions, targets, corruption)

        def see(logits: Tensor) -> None:
            logits = logits.detach().float().cpu().view(*slots.shape, -1)
            before_end, masked = slots <= chats.end[:, :, None], corruption.masked
            self._advance(before_end, targets.view(slots.shape), masked.view(slots.shape), logits)

        return loss_of(
            self.trunk,
            noisy,
            chats,
            mask,
            texts=next(self._texts),
            diffusion_weight=DIFFUSION_WEIGHT,
            see=see,
        )

    def _corruption(self, size: int) -> Corruption:
        """Return the masked slots of the rows' blocks, and their rates."""
        masked = torch.stack([torch.cat([v.masked for v in row.visits]) for row in self._rows])
        rate = torch.tensor([[v.rate for v in row.visits] for row in self._rows])
        return Corruption(masked, rate.repeat_interleave(size, 1))

    def _advance(self, before_end: Tensor, targets: Tensor, masked: Tensor, logits: Tensor) -> None:
        """Reveal what the forward was sure of, and replace what is decided.

        A block is decided up to its answer's end. All tensors are ``(B, K, L)``, logits with V.
        """
        filled = revealed(
            logits,
            masked,
            torch.tensor([[[v.threshold] for v in row.visits] for row in self._rows]),
        )
        wrong = (filled & before_end & (logits.argmax(-1) != targets)).any(-1)
        left = masked & ~filled
        arrived = ~(left & before_end).any(-1)
        for i, row in enumerate(self._rows):
            for k, visit in enumerate(row.visits):
                visit.masked, visit.rate, visit.flawless = (
                    left[i, k],
                    1.0,
                    visit.flawless and not wrong[i, k],
                )
                if arrived[i, k]:
                    self._count("flawless", float(visit.flawless))
                    row.waiting.discard(k)
                    row.visits[k] = self._new_visit(row.length)
            if not row.waiting:
                self._rows[i] = self._new_row()

    def _new_row(self) -> Row:
        example = next(self._source)
        length = len(self.tokenizer.encode(example.answer).ids) + 1
        visits = [self._new_visit(length) for _ in range(NUM_BLOCKS)]
        return Row(example, length, visits, set(range(NUM_BLOCKS)))

    def _new_visit(self, length: int) -> Visit:
        """Draw a block that begins before the answer's last token.

        Its first slot is known and never masked. The answer has ``length`` tokens.
        """
        size = self.trunk.config.block_size
        aligned = self._draw(0, 1) < ALIGNED_SHARE
        start = (
            size * int(self._draw(0, -(-(length - 1) // size)))
            if aligned
            else int(self._draw(0, length - 1))
        )
        rate = 1.0 if self._draw(0, 1) < MASKED_SHARE else self._draw(LEAST_RATE, 1)
        masked = torch.rand(size, generator=self._generator) < rate
        masked[0] = False
        return Visit(start, self._draw(*THRESHOLDS), masked, rate)

    def _draw(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self._generator))


def revealed(logits: Tensor, masked: Tensor, thresholds: Tensor) -> Tensor:
    """Mark the masked slots that a decoder would fill, (B, K, L).

    It fills the most probable one of each block and all that reach the threshold.

    Args:
        logits: Logits of the slots, (B, K, L, V).
        masked: Slots that are masked, (B, K, L) bool.
        thresholds: Threshold of each block, (B, K, 1) float.
    """
    confidence = logits.softmax(-1).amax(-1).masked_fill(~masked, -1.0)
    best = torch.zeros_like(masked).scatter_(-1, confidence.argmax(-1, keepdim=True), True)
    return masked & (best | (confidence >= thresholds))

"""Prompts, split into those to train on and those that are not, answered by the model, and made into batches.

A drafter has to guess what the verifier will say, and that is what the model itself writes, greedily, token after token. An answer from
elsewhere would have the drafter trained on prefixes that never occur.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.calib.quantize.texts import Text, draw_texts
from trimode.errors import UsageError
from trimode.graphs.contract import ModelInfo
from trimode.runtime.decode import Counters, decode_ar
from trimode.runtime.options import DecodeOptions
from trimode.runtime.sequence import Sequence as DecodedSequence
from trimode.runtime.session import Session

LENGTH_STEP = 16
DEFAULT_HELD_OUT, DEFAULT_VALIDATION = 64, 32
SHORTEST_ANSWER = 2
"""Tokens: the first comes from the prompt's own forward, the second is the first that can be drafted."""


@dataclass(frozen=True)
class Split:
    """Prompts, each in one part only.

    Attributes:
        train: to train on.
        validation: decide which adapter is kept.
        held_out: measure it; neither trained on nor decided by.
    """

    train: list[Text]
    validation: list[Text]
    held_out: list[Text]

    @property
    def texts(self) -> list[Text]:
        """All of them."""
        return self.train + self.validation + self.held_out


@dataclass(frozen=True)
class Written:
    """A prompt and what the model wrote after it, the end token included."""

    prompt: Text
    answer: Text


@dataclass(frozen=True)
class AnswerBatch:
    """B texts with answers: :class:`trimode.calib.drafter.Answers`, filled with the last token of each after its end."""

    ids: Tensor
    answer_start: Tensor
    end: Tensor


def split_texts(texts: Sequence[Text], num_samples: int | None, num_held_out: int | None, seed: int, model: ModelInfo) -> Split:
    """Draw the parts by the seed, from prompts that differ: one that occurs twice must not be trained on and held out.

    Args:
        texts: token ids of prompts.
        num_samples: how many to train on and to decide by together; None = all that are not held out.
        num_held_out: None = a quarter, at most :data:`DEFAULT_HELD_OUT`.
        seed: which.
        model: what the ids are for.

    Raises:
        UsageError: too few prompts; an empty one, one without room for an answer, or ids that the model does not have.
    """
    unique = [list(key) for key in dict.fromkeys(tuple(text) for text in draw_texts(texts, None, seed, model))]
    held_out = min(DEFAULT_HELD_OUT, max(1, len(unique) // 4)) if num_held_out is None else num_held_out
    needed = held_out + (2 if num_samples is None else num_samples)
    if len(unique) < needed:
        raise UsageError(f"expected at least {needed} different prompts, {held_out} of them held out, found {len(unique)}",
                         "add prompts, or ask for fewer --held-out or --samples")  # fmt: skip
    random.Random(seed).shuffle(unique)
    rest = unique[held_out:][:num_samples]
    validation = min(DEFAULT_VALIDATION, max(1, len(rest) // 8))
    return Split(train=rest[validation:], validation=rest[:validation], held_out=unique[:held_out])


def write_answer(session: Session, model: ModelInfo, prompt: Text, max_new_tokens: int) -> Text:
    """The model's greedy answer, one token at a time, the end token included."""
    sequence = DecodedSequence(session, model, prompt)
    options = DecodeOptions(max_new_tokens=max_new_tokens)
    return [token for tokens in decode_ar(sequence, options, Counters()) for token in tokens]


def long_enough(written: Sequence[Written], what: str) -> list[Written]:
    """Those of which something can be drafted.

    Raises:
        UsageError: there are none.
    """
    kept = [one for one in written if len(one.answer) >= SHORTEST_ANSWER]
    if not kept:
        raise UsageError(f"expected answers of at least {SHORTEST_ANSWER} tokens to {what}, found {len(written)} that end at the first",
                         "there is nothing to draft; take prompts that the model answers at length")  # fmt: skip
    return kept


def encode(written: Sequence[Written]) -> AnswerBatch:
    """Pad to a common length."""
    texts = [one.prompt + one.answer for one in written]
    longest = -(-max(map(len, texts)) // LENGTH_STEP) * LENGTH_STEP
    ids = torch.tensor([text + text[-1:] * (longest - len(text)) for text in texts])
    start = torch.tensor([[len(one.prompt)] for one in written])
    return AnswerBatch(ids, start, torch.tensor([[len(text) - 1] for text in texts]))


def batches(written: Sequence[Written], batch_size: int, seed: int, device: str, first: int = 0) -> Iterator[AnswerBatch]:
    """Endless batches from the one numbered ``first`` on; every answer once before any comes again, in a new order each time."""
    chosen = _order(len(written), seed)
    for _ in range(first * batch_size):
        next(chosen)
    while True:
        batch = encode([written[next(chosen)] for _ in range(batch_size)])
        yield AnswerBatch(batch.ids.to(device), batch.answer_start.to(device), batch.end.to(device))


def _order(count: int, seed: int) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(range(count), count)

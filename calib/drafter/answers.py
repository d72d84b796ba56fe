"""Has the model answer prompts, and makes batches of the answers.

A drafter has to guess what the verifier will say. That is what the model itself writes, greedily,
token after token. With answers from elsewhere it would learn prefixes that never occur.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.errors import UsageError
from trimode.formats.contract import ModelInfo
from trimode.runtime.decode.algorithms import Counters, decode_ar
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence as DecodedSequence
from trimode.runtime.sessions.base import Session
from trimode.runtime.text.prompts import Text

LENGTH_STEP = 16
SHORTEST_ANSWER = 2
"""Tokens: the first comes from the prompt's own forward, the second is the first that can be
drafted.
"""


@dataclass(frozen=True)
class Written:
    """Holds a prompt and the model's answer, the end token included."""

    prompt: Text
    answer: Text


@dataclass(frozen=True)
class AnswerBatch:
    """Holds B texts with answers, padded with their last tokens.

    It is a :class:`trimode.calib.drafter.windows.Answers`.
    """

    ids: Tensor
    answer_start: Tensor
    end: Tensor


def write_answer(session: Session, model: ModelInfo, prompt: Text, max_new_tokens: int) -> Text:
    """Write the model's greedy answer, the end token included."""
    sequence = DecodedSequence(session, model, prompt)
    options = DecodeOptions(max_new_tokens=max_new_tokens)
    return [token for tokens in decode_ar(sequence, options, Counters()) for token in tokens]


def long_enough(written: Sequence[Written], what: str) -> list[Written]:
    """Keep the answers of which something can be drafted.

    Raises:
        UsageError: there are none.
    """
    kept = [one for one in written if len(one.answer) >= SHORTEST_ANSWER]
    if not kept:
        raise UsageError(
            f"expected answers of at least {SHORTEST_ANSWER} tokens to {what}, "
            f"found {len(written)} that end at the first",
            "there is nothing to draft; take prompts that the model answers at length",
        )
    return kept


def encode(written: Sequence[Written]) -> AnswerBatch:
    """Pad texts to a common length."""
    texts = [one.prompt + one.answer for one in written]
    longest = -(-max(map(len, texts)) // LENGTH_STEP) * LENGTH_STEP
    ids = torch.tensor([text + text[-1:] * (longest - len(text)) for text in texts])
    start = torch.tensor([[len(one.prompt)] for one in written])
    return AnswerBatch(ids, start, torch.tensor([[len(text) - 1] for text in texts]))


def batches(
    written: Sequence[Written], batch_size: int, seed: int, device: str, first: int = 0
) -> Iterator[AnswerBatch]:
    """Yield batches without end, from the one numbered ``first`` on.

    Every answer comes once before any comes again, in a new order each time.
    """
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

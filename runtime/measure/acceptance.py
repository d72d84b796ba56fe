"""Measures how often drafts are accepted, and how long texts are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trimode.runtime.auto.prior import FinishedText

if TYPE_CHECKING:
    from trimode.runtime.model import TriModeModel

MAX_NEW_TOKENS = 128


def write_texts(
    model: TriModeModel, prompts: Iterable[Sequence[int]], block_length: int, *, use_drafter: bool
) -> Iterator[FinishedText]:
    """Yield the text after each prompt, by greedy linear self-speculation.

    It has the number of accepted drafts of each slot. Neither the end of a block nor the end of a
    text counts as a rejection.
    """
    for prompt in prompts:
        tried, accepted = np.zeros((2, block_length - 1), np.int64)
        stream = model.stream(
            [list(prompt)],
            "linear_spec",
            max_new_tokens=MAX_NEW_TOKENS,
            block_length=block_length,
            use_drafter=use_drafter,
        )
        next(stream)  # the first token comes from the prompt's forward
        for chunk in stream:
            count = len(chunk.token_ids) - 1
            accepted[:count] += 1
            tried[: count + (chunk.finish_reason is None)] += 1
        result = stream.result
        yield FinishedText(
            prompt,
            tried,
            accepted,
            len(result.token_ids) if result.finish_reason == "stop" else None,
        )

"""How often drafts are accepted over some prompts: what mode ``auto`` expects of a text before it has seen any of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimode.runtime.model import TriModeModel

MAX_NEW_TOKENS = 128


def acceptance_rate(model: TriModeModel, prompts: Iterable[Sequence[int]], block_length: int, *, use_drafter: bool) -> float | None:
    """Share of the drafts that are accepted, of those whose predecessors in the block were; greedy, by linear self-speculation.

    Neither the end of a block nor the end of a text counts as a rejection. None where no draft was judged.
    """
    tried = accepted = 0
    for prompt in prompts:
        stream = model.stream([list(prompt)], "linear_spec", max_new_tokens=MAX_NEW_TOKENS, block_length=block_length, use_drafter=use_drafter)
        next(stream)  # the first token comes from the prompt's forward
        for chunk in stream:
            accepted += len(chunk.token_ids) - 1
            tried += len(chunk.token_ids) - 1
            tried += len(chunk.token_ids) < block_length and chunk.finish_reason is None
    return accepted / tried if tried else None

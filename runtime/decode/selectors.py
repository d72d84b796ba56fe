"""Finds the token selector that some options need."""

from __future__ import annotations

from trimode.runtime.decode.grammar_choice import GrammarSelector
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence
from trimode.runtime.decode.token_choice import (
    GreedySelector,
    RuledSelector,
    TokenLogprob,
    TokenSelector,
)


def make_token_selector(
    sequence: Sequence, options: DecodeOptions, logprobs: list[TokenLogprob]
) -> TokenSelector:
    """Make the selector for these options.

    It appends to ``logprobs`` where they are asked for.
    """
    if options.is_plain:
        return GreedySelector(sequence)
    if options.structured_outputs is None:
        return RuledSelector(sequence, options, logprobs)
    return GrammarSelector(sequence, options, logprobs)

"""Measures how well an adapter drafts, by the runtime's self-speculation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trimode.calib.drafter.answers import Written
from trimode.formats.contract import ModelInfo
from trimode.formats.drafter import Drafting
from trimode.runtime.decode.algorithms import Counters, decode_linear_spec
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence as DecodedSequence
from trimode.runtime.sessions.base import Session


def measure(
    session: Session,
    model: ModelInfo,
    written: Sequence[Written],
    options: DecodeOptions,
    advance: Callable[[int], None] = lambda _: None,
) -> Drafting:
    """Answer the prompts again by self-speculation, and compare the tokens.

    They are compared with what the model wrote one token at a time.

    Args:
        session: Session over the trunk with the adapter in question.
        model: Facts that decoding needs.
        written: Prompts with the autoregressive answers.
        options: Block length, use of the adapter, and the limit that the answers were written with.
        advance: Function that is called with 1 after each prompt.
    """
    counters, num_tokens, num_unlike = Counters(), 0, 0
    for one in written:
        counters.finish_reason = None
        sequence = DecodedSequence(session, model, one.prompt)
        answer = [
            token for tokens in decode_linear_spec(sequence, options, counters) for token in tokens
        ]
        num_tokens += len(answer)
        num_unlike += answer != one.answer
        advance(1)
    return Drafting(
        num_prompts=len(written),
        num_tokens=num_tokens,
        num_forwards=counters.nfe,
        num_cycles=counters.cycles,
        acceptance_length=counters.cycle_tokens / counters.cycles if counters.cycles else None,
        tokens_per_forward=num_tokens / counters.nfe,
        num_unlike=num_unlike,
    )

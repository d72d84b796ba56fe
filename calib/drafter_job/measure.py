"""How well an adapter drafts: the runtime's self-speculation over the trunk that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from trimode.calib.drafter_job.answers import Written
from trimode.graphs.contract import ModelInfo
from trimode.runtime.decode import Counters, decode_linear_spec
from trimode.runtime.options import DecodeOptions
from trimode.runtime.sequence import Sequence as DecodedSequence
from trimode.runtime.session import Session


class Drafting(BaseModel):
    """Linear self-speculation over some prompts, greedy, a block drafted in one forward.

    Attributes:
        acceptance_length: tokens a draft-and-verify cycle yields; None where there was no cycle.
        tokens_per_forward: new tokens over forwards, which are counted as the reference does: the prefill is one, too.
        num_unlike: answers that differ from the autoregressive ones; a draft cannot change a token, but the rounding of a forward over
            many rows can, where two tokens are equally probable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_prompts: int
    num_tokens: int
    num_forwards: int
    num_cycles: int
    acceptance_length: float | None
    tokens_per_forward: float
    num_unlike: int


def measure(
    session: Session, model: ModelInfo, written: Sequence[Written], options: DecodeOptions, advance: Callable[[int], None] = lambda _: None
) -> Drafting:
    """Answer the prompts again by self-speculation and compare with what the model wrote one token at a time.

    Args:
        session: over the trunk with the adapter in question.
        model: the facts that decoding needs.
        written: prompts with the autoregressive answers.
        options: say the block length, whether the adapter is used, and the limit that the answers were written with.
        advance: told of each prompt that is done.
    """
    counters, num_tokens, num_unlike = Counters(), 0, 0
    for one in written:
        counters.finish_reason = None
        sequence = DecodedSequence(session, model, one.prompt)
        answer = [token for tokens in decode_linear_spec(sequence, options, counters) for token in tokens]
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

"""Holds the common part of all requests: strict, clear fields.

Where one of them is wrong, the error names it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trimode.server.protocol.strict import WHOLE, Strict
from trimode.server.protocol.structured import StructuredOutputs

ModeName = Literal[
    "ar", "diffusion", "linear_spec", "linear-spec", "quadratic_spec", "quadratic-spec", "auto"
]
MOST_TOP_LOGPROBS = 20
MOST_SEED = 2**63 - 1
MOST_TOKENS = 2**31 - 1


class StreamOptions(Strict):
    """Chooses what a stream tells beside the answer.

    Attributes:
        include_usage: Whether a last event has the usage, and the others ``usage: null``.
        continuous_usage_stats: Whether each event has the usage so far.
        include_obfuscation: Accepted for OpenAI's clients; there is none.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Strict):
    """Holds the fields of every request for a text.

    Attributes:
        model: Name that the bundle is served under; None = that one.
        max_tokens: Most tokens of an answer; None = 128, or as many as there is room for.
        min_tokens: Fewest tokens of an answer.
        temperature: Temperature; 0 takes the most probable token. None = 1.
        top_p: Probability that the candidates reach together.
        top_k: Number of candidates; 0 or -1 = all.
        min_p: Least share of the highest probability.
        repetition_penalty: Divisor for logits of tokens of prompt and answer.
        presence_penalty: Taken from the logits of tokens of the answer.
        frequency_penalty: Taken once for each time that the answer has the token.
        logit_bias: Added to the logits of tokens, by token id.
        seed: Seed of the draws; the second of ``n`` answers has the next one.
        stop: Texts that end the answer; they are no part of it.
        stop_token_ids: Tokens that end the answer, beside the model's own.
        ignore_eos: Whether the model's end tokens end nothing.
        n: Number of answers.
        stream: Whether the answer comes in events.
        stream_options: Options of the events.
        user: Accepted, not used.
        mode: Decoding mode; None = the server's.
        block_length: Tokens of a block.
        threshold: Probability from which a draft or a slot is accepted.
        cache_salt: Computed prefixes are shared among requests of one salt only.
        priority: Larger comes first.
        return_token_ids: Whether choices have ``token_ids``.
        max_thinking_tokens: Most tokens of thinking, which is then ended.
        structured_outputs: Form that the answer has to follow.
    """

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        dict[
            Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED), WHOLE] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MOST_TOKENS), WHOLE]] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=1024), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    mode: ModeName | None = None
    block_length: Annotated[int, Field(ge=1, le=1024), WHOLE] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31), WHOLE] | None = None
    return_token_ids: bool | None = None
    max_thinking_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS), WHOLE] | None = None
    structured_outputs: StructuredOutputs | None = None

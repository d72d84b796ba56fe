"""Declares requests for the continuation of a text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trimode.server.protocol.base import MOST_TOKENS, MOST_TOP_LOGPROBS, Sampling
from trimode.server.protocol.strict import WHOLE

TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MOST_TOKENS), WHOLE]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """Asks for the continuation of texts, or of token ids.

    Attributes:
        prompt: Text, token ids, or a list of either. Control tokens in it count as such.
        logprobs: Number of most probable tokens that come with each token's log-probability.
    """

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS), WHOLE] | None = None

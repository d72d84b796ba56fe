"""Writes log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimode.runtime.decode.token_choice import TokenLogprob
from trimode.runtime.text.codec import TextCodec

UNKNOWN = -9999.0
"""Stands for a token whose log-probability no forward has told, as in OpenAI's API."""
_HALF = "\ufffd"


def chat_logprobs(codec: TextCodec, found: Sequence[TokenLogprob] | None) -> Any:
    """Write them as chat completions have them; None where there are none."""
    if found is None:
        return None
    return {"content": [_entry(codec, one) for one in found], "refusal": None}


def completion_logprobs(
    codec: TextCodec, found: Sequence[TokenLogprob] | None, offset: int
) -> dict[str, Any] | None:
    """Write them as completions have them.

    Args:
        codec: Tokenizer.
        found: Log-probabilities; None where they were not asked for.
        offset: Characters of the answer before these tokens.
    """
    if found is None:
        return None
    tokens = [codec.token_text(one.token_id) for one in found]
    offsets = [offset + sum(map(len, tokens[:place])) for place in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [_known(one.logprob) for one in found],
        "top_logprobs": [
            {codec.token_text(token): value for token, value in one.top} for one in found
        ],
        "text_offset": offsets,
    }


def _entry(codec: TextCodec, one: TokenLogprob) -> dict[str, Any]:
    top = [_token(codec, token, value) for token, value in one.top]
    return {**_token(codec, one.token_id, _known(one.logprob)), "top_logprobs": top}


def _token(codec: TextCodec, token: int, logprob: float) -> dict[str, Any]:
    text = codec.token_text(token)
    # A token may be part of a character; its bytes are not known from its text then
    values = None if _HALF in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": values}


def _known(logprob: float | None) -> float:
    return UNKNOWN if logprob is None else logprob

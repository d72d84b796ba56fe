"""Declares the request of a trace."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trimode.server.protocol.base import Sampling


class WatchRequest(Sampling):
    """Asks for a text, and for a trace of its decoding.

    Attributes:
        prompt: Question; the model's chat template is applied where it has one.
        reuse: Whether what was computed for others may be used, and this for others.
    """

    prompt: Annotated[str, Field(min_length=1)]
    reuse: bool = False

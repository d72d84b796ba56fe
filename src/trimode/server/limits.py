"""Bounds what a request may cost before the engine knows of it."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Holds the bounds of requests.

    Attributes:
        max_body_bytes: Most bytes of a body.
        body_timeout_s: Most seconds that a body may take to arrive.
        write_timeout_s: Most seconds in which a client may take nothing of its answer.
        max_messages: Most messages of a conversation.
        max_prompts: Most prompts of one request for completions.
        max_texts: Most answers to all prompts of a request together.
        max_stop: Most stop strings.
        max_stop_characters: Most characters of a stop string.
        max_n: Most answers to one prompt.
        max_biases: Most tokens with a bias.
        max_tools: Most tools.
        ping_s: Seconds without an event after which a comment is sent.
        request_timeout_s: Most seconds from arrival to the end of a text; None = any number.
    """

    max_body_bytes: int = 4 * MIB
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    max_messages: int = 1024
    max_prompts: int = 64
    max_texts: int = 256
    max_stop: int = 16
    max_stop_characters: int = 1024
    max_n: int = 16
    max_biases: int = 1024
    max_tools: int = 128
    ping_s: float = 15.0
    request_timeout_s: float | None = None

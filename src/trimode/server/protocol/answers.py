"""Declares what answers look like, for the OpenAPI schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class Declared(BaseModel, extra="forbid"):
    """Has no other fields than these."""


class PromptDetails(Declared):
    """Counts tokens of the prompt that were not computed again."""

    cached_tokens: int


class CompletionDetails(Declared):
    """Counts tokens of drafts, and of thinking."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int


class Usage(Declared):
    """Counts tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class SpeculativeDecoding(Declared):
    """Counts drafts, under vLLM's names."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: dict[str, int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int


class AnswerMetrics(Declared):
    """Holds counts of how an answer was made."""

    speculative_decoding: SpeculativeDecoding


class Message(Declared):
    """Holds an answer of the assistant."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class TopLogprob(Declared):
    """Holds a token that might have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """Holds a token that came, and those that might have."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Declared):
    """Holds log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class ChatChoice(Declared):
    """Holds one of the answers to a conversation."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class CompletionLogprobs(Declared):
    """Holds log-probabilities of a continuation's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Declared):
    """Holds one of the continuations."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatCompletion(Declared):
    """Answers a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: AnswerMetrics | None = None


class Completion(Declared):
    """Continues texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    metrics: AnswerMetrics | None = None


def answer_response(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Declare an answer in one piece or in events, for OpenAPI."""
    return {
        200: {
            "model": model,
            "description": "Answer in one piece; in events where `stream` is true.",
            "content": {"text/event-stream": {}},
        }
    }

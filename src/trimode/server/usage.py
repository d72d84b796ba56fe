"""Counts what a request took, and what drafting saved it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from trimode.runtime.engine.handle import Handle
from trimode.server.reasoning import count_reasoning, place_after
from trimode.server.records import RequestRecord
from trimode.server.reply import Reply


def usage_so_far(handles: Sequence[Handle]) -> dict[str, Any]:
    """Count the tokens of a request.

    A prompt that several texts share counts once.
    """
    firsts = [handle for handle in handles if handle.choices[0] is handle]
    prompt = sum(handle.usage.prompt_tokens for handle in firsts)
    completion = sum(handle.usage.completion_tokens for handle in handles)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(handle.usage.cached_tokens for handle in firsts)
        },
    }


def ending_of(reply: Reply, end_think: int | None = None) -> dict[str, Any]:
    """Return the usage of an ended request, and its drafts' counts.

    OpenAI counts tokens of a prediction that the client sent. Here the model predicts by itself:
    ``accepted_prediction_tokens`` are drafts that became text, ``rejected_prediction_tokens``
    those that did not.

    Args:
        reply: Texts of the request, which have ended.
        end_think: Token of ``</think>``; None where the tokenizer has none.
    """
    records = reply.records
    accepted = sum(record.drafts.num_accepted for record in records)
    drafted = sum(record.drafts.num_tokens for record in records)
    details = {
        "accepted_prediction_tokens": accepted,
        "rejected_prediction_tokens": drafted - accepted,
        "reasoning_tokens": _reasoning(reply, end_think),
    }
    usage = usage_so_far(reply.handles) | {"completion_tokens_details": details}
    if not any(record.drafts.num_cycles for record in records):
        return {"usage": usage}
    return {"usage": usage, "metrics": {"speculative_decoding": _speculation(records)}}


def _reasoning(reply: Reply, end_think: int | None) -> int:
    """Count the tokens of the thinking of a conversation's answers."""
    if not reply.asked.prompt:
        return 0
    place = place_after(reply.asked.prompt)
    return sum(count_reasoning(one.token_ids, place, end_think) for one in reply.handles)


def _speculation(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Count drafts under vLLM's names."""
    lengths = [length for record in records for length in record.drafts.accepted]
    steps, drafted = len(lengths), sum(record.drafts.num_tokens for record in records)
    accepted = sum(lengths)
    return {
        "mean_acceptance_length": 1 + accepted / steps,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_histogram": {str(n): count for n, count in sorted(Counter(lengths).items())},
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": max(-(-drafted // steps), *lengths),
    }

"""Prints the answers of ``trimode run``, as JSON or for people."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimode.cli.flags import COMMON_FLAGS
from trimode.cli.output import print_json

if TYPE_CHECKING:
    from trimode.cli.answers import Answer
    from trimode.cli.run_request import RunRequest
    from trimode.runtime.decode.stream import Generation
    from trimode.runtime.decode.token_choice import TokenLogprob
    from trimode.runtime.text.prompts import BadLine, Prompt


def show_outcomes(outcomes: Iterator[Answer | BadLine], request: RunRequest) -> bool:
    """Print each outcome in order; return whether all prompts were answered."""
    from trimode.runtime.text.prompts import BadLine

    num_right, num_known, num_bad = 0, 0, 0
    for outcome in outcomes:
        if isinstance(outcome, BadLine):
            num_bad += 1
            _show_bad_line(outcome, request)
            continue
        prompt, result, text = outcome
        if prompt.answers:
            num_known += 1
            num_right += text in prompt.answers
        if request.as_json:
            print_json(as_record(result, text, prompt))
        else:
            sys.stderr.write(summary(result) + "\n")
    if num_known:
        sys.stderr.write(f"exact match: {num_right} of {num_known}\n")
    return not num_bad


def _show_bad_line(bad: BadLine, request: RunRequest) -> None:
    """Report a bad line on stderr and, with --json, on stdout."""
    line, error = bad
    error.rename(COMMON_FLAGS)
    sys.stderr.write(
        f"error: {request.prompts_file}, line {line}: {error.message}\nhint: {error.hint}\n"
    )
    if request.as_json:
        print_json({"line": line, "error": error.message})


def as_record(result: Generation, text: str | None, prompt: Prompt) -> dict[str, Any]:
    """Return the JSON object for one answer."""
    record: dict[str, Any] = {
        "text": text,
        "token_ids": result.token_ids,
        "mode": result.mode.replace("_", "-"),
        "nfe": result.nfe,
        "prefill_forwards": result.prefill_forwards,
        "tokens_per_forward": round(result.tokens_per_forward, 4),
        "acceptance_length": None
        if result.acceptance_length is None
        else round(result.acceptance_length, 4),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "elapsed_s": round(result.elapsed_s, 6),
    }
    if result.picks is not None:
        record["picks"] = result.picks
    if result.forced_tokens is not None:
        record["forced_tokens"] = result.forced_tokens
    if result.logprobs is not None:
        record["logprobs"] = _logprobs(result.logprobs)
    if prompt.answers:
        record["is_exact_match"] = text in prompt.answers
    return record


def _logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": t.token_id, "logprob": t.logprob, "top": [list(pair) for pair in t.top]}
        for t in logprobs
    ]


def summary(result: Generation) -> str:
    """Describe a generation in one line."""
    count = len(result.token_ids)
    parts = [
        f"{result.mode.replace('_', '-')}: {count} tokens",
        f"nfe {result.nfe}",
        f"{result.tokens_per_forward:.2f} tokens per forward",
    ]
    if result.acceptance_length is not None:
        parts.append(f"acceptance length {result.acceptance_length:.2f}")
    if result.picks:
        parts.append(_picks(result.picks))
    if result.forced_tokens is not None:
        parts.append(f"{result.forced_tokens} forced")
    if result.seed is not None:
        parts.append(f"seed {result.seed}")
    speed = count / result.elapsed_s if result.elapsed_s else 0.0
    return ", ".join([*parts, f"{speed:.0f} tokens/s", f"finish {result.finish_reason}"])


def _picks(picks: Mapping[int, int]) -> str:
    from trimode.runtime.auto.policy import AR_STEP

    kinds = {length: "AR" if length == AR_STEP else f"block {length}" for length in picks}
    return "steps " + ", ".join(f"{count} of {kinds[length]}" for length, count in picks.items())

"""Compares greedy answers under load with those of single requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trimode.formats.load import CheckRecord, DifferenceRecord, RequestRecord

Key = tuple[str | None, str, int]
"""Mode, conversation, turn."""
_MOST_SHOWN = 10


@dataclass(frozen=True)
class Reference:
    """Holds the answer that a request has to have."""

    text: str
    output_tokens: int
    finish_reason: str | None


def references(mode: str | None, records: Iterable[RequestRecord]) -> dict[Key, Reference]:
    """Collect the answers of single requests."""
    return {
        (mode, one.question_id, one.turn): Reference(one.text, one.output_tokens, one.finish_reason)
        for one in records
    }


def compare(
    known: Mapping[Key, Reference],
    modes: Mapping[int, str | None],
    records: Iterable[RequestRecord],
) -> CheckRecord:
    """Compare every whole answer with its reference.

    Args:
        known: Answers of single requests.
        modes: Mode of each run, by its index.
        records: Requests of the runs; failed ones are no answers.
    """
    compared, differences = 0, []
    for one in records:
        if one.error:
            continue
        compared += 1
        expected = known[modes[one.run], one.question_id, one.turn]
        if expected != Reference(one.text, one.output_tokens, one.finish_reason):
            differences.append(_difference(one, expected))
    return CheckRecord(
        compared=compared,
        differing=len(differences),
        differences=tuple(differences[:_MOST_SHOWN]),
    )


def _difference(one: RequestRecord, expected: Reference) -> DifferenceRecord:
    return DifferenceRecord(
        run=one.run,
        question_id=one.question_id,
        turn=one.turn,
        expected=_shown(expected),
        found=_shown(Reference(one.text, one.output_tokens, one.finish_reason)),
    )


def _shown(answer: Reference) -> str:
    return f"{answer.text} ({answer.output_tokens} tokens, {answer.finish_reason})"

"""Encodes the prompts of ``trimode run``, and answers them.

They are answered alone or side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trimode.cli.trace_output import traced
from trimode.errors import UsageError

if TYPE_CHECKING:
    from trimode.cli.batch_answers import BatchAnswer
    from trimode.cli.run_request import RunRequest
    from trimode.cli.trace_output import TraceFile
    from trimode.formats.contract import Mode
    from trimode.runtime.decode.stream import Generation, Stream
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.text.prompts import BadLine, Prompt


class EncodedPrompt(NamedTuple):
    """Holds a prompt that the model accepts, and its token ids."""

    prompt: Prompt
    token_ids: list[int]


class Answer(NamedTuple):
    """Holds a result and its text; None without a tokenizer."""

    prompt: Prompt
    result: Generation
    text: str | None


def encode_all(
    model: TriModeModel, prompts: Sequence[Prompt | BadLine]
) -> list[EncodedPrompt | BadLine]:
    """Encode the prompts; a line that is refused becomes a bad line."""
    from trimode.runtime.text.prompts import BadLine, warn_of_plain_text

    encoded = [one if isinstance(one, BadLine) else _encode_one(model, one) for one in prompts]
    warn_of_plain_text(
        [one.prompt for one in encoded if isinstance(one, EncodedPrompt)], lambda: model.codec
    )
    return encoded


def _encode_one(model: TriModeModel, prompt: Prompt) -> EncodedPrompt | BadLine:
    from trimode.runtime.text.prompts import BadLine, encode_checked, encode_prompt

    if prompt.line is None:  # the model says what is wrong with its ids
        return EncodedPrompt(prompt, encode_prompt(prompt, lambda: model.codec))
    try:
        return EncodedPrompt(prompt, encode_checked(prompt, lambda: model.codec, model.model))
    except UsageError as error:
        return BadLine(prompt.line, error)


def one_by_one(
    model: TriModeModel,
    questions: Sequence[EncodedPrompt | BadLine],
    mode: Mode,
    request: RunRequest,
    trace: TraceFile | None = None,
) -> Iterator[Answer | BadLine]:
    """Answer one prompt after another; without --json print text as it arrives."""
    from trimode.runtime.text.prompts import BadLine

    for one in questions:
        if isinstance(one, BadLine):
            yield one
            continue
        prompt, token_ids = one
        # options that cannot be show here, before any answer
        stream = model.stream([token_ids], mode, **request.decoding)
        try:
            with traced(trace, stream, mode, token_ids):
                text = (
                    _drain(model, stream, prompt)
                    if request.as_json
                    else _show_stream(model, stream, prompt)
                )
        except UsageError as error:
            if prompt.line is None:
                raise
            yield BadLine(prompt.line, error)
        else:
            yield Answer(prompt, stream.result, text)


def side_by_side(
    model: TriModeModel,
    questions: Sequence[EncodedPrompt | BadLine],
    mode: Mode,
    request: RunRequest,
    trace: TraceFile | None = None,
) -> Iterator[Answer | BadLine]:
    """Answer several prompts at the same time.

    Answers come in the order of the prompts. Without --json their texts are printed.
    """
    from trimode.cli.batch_answers import BatchQuestion, answer_side_by_side
    from trimode.runtime.text.prompts import BadLine

    asked = [
        BatchQuestion(one.token_ids, _has_text(model, one.prompt))
        for one in questions
        if isinstance(one, EncodedPrompt)
    ]
    outcomes = answer_side_by_side(
        model.new_batch(request.batch), asked, mode, dict(request.decoding), trace
    )
    for one in questions:
        if isinstance(one, BadLine):
            yield one
            continue
        outcome = next(outcomes)
        if isinstance(outcome, UsageError):
            yield BadLine(one.prompt.line or 0, outcome)
            continue
        if not request.as_json:
            _show_whole(outcome)
        yield Answer(one.prompt, *outcome)


def _show_whole(answer: BatchAnswer) -> None:
    shown = _join_ids(answer.result.token_ids) if answer.text is None else answer.text
    sys.stdout.write(shown + "\n")
    sys.stdout.flush()


def _drain(model: TriModeModel, stream: Stream, prompt: Prompt) -> str | None:
    if _has_text(model, prompt):
        return "".join(stream.text())
    stream.finish()
    return None


def _show_stream(model: TriModeModel, stream: Stream, prompt: Prompt) -> str | None:
    if not _has_text(model, prompt):
        sys.stdout.write(_join_ids(stream.finish().token_ids) + "\n")
        return None
    pieces = []
    for piece in stream.text():
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(pieces)


def _join_ids(token_ids: list[int]) -> str:
    return ",".join(map(str, token_ids))


def _has_text(model: TriModeModel, prompt: Prompt) -> bool:
    return prompt.token_ids is None or (model.bundle.path / "tokenizer.json").is_file()

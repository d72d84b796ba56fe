"""Answers in every mode over a trunk, and compares two trunks' answers.

The algorithms are the runtime's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimode.calib.evaluate.quantization.questions import Decoding, Question, ToText
from trimode.calib.reference.episodes import Episode, RecordingSession, merged
from trimode.calib.reference.torch_session import TorchSession
from trimode.formats.contract import GraphName, ModelInfo
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence as DecodedSequence
from trimode.runtime.decode.stream import Generation, Stream
from trimode.runtime.text.prompts import Text

Advance = Callable[[int], None]
Answers = dict[Decoding, list[Generation]]
"""One generation a question, in their order."""


@dataclass(frozen=True)
class Divergence:
    """Records where self-speculation leaves autoregression.

    Attributes:
        question: Number of the question among those drawn, from 0.
        position: Place of the first token that differs in the answer, from 0.
        preference: Logit of AR's token minus that of the other one, by the trunk, after AR's text
            has been read in one forward. The size of a rounding error says that both are equally
            good. None if one text ends before the other.
    """

    question: int
    position: int
    preference: float | None


def answer(
    session: TorchSession,
    model: ModelInfo,
    questions: Sequence[Question],
    decodings: Sequence[Decoding],
    max_new_tokens: int,
    advance: Advance,
) -> Answers:
    """Answer each question in each way; ``advance(1)`` after each answer."""
    answers: Answers = {decoding: [] for decoding in decodings}
    for question in questions:
        for decoding in decodings:
            answers[decoding].append(_generate(session, model, question, decoding, max_new_tokens))
            advance(1)
    return answers


def answer_and_record(
    trunk: TriModeTrunk,
    model: ModelInfo,
    questions: Sequence[Question],
    recorded: Mapping[Decoding, Sequence[GraphName]],
    max_new_tokens: int,
    advance: Advance,
) -> tuple[Answers, list[list[Episode]]]:
    """Answer like :func:`answer`, and record the forwards for a replay.

    Args:
        trunk: Trunk that answers.
        model: Facts that decoding needs.
        questions: Questions to answer.
        recorded: Decodings, each with the graphs whose blocks are kept; without any, the answer's
            text is not kept either.
        max_new_tokens: Longest answer, in tokens.
        advance: Function that is called with 1 after each answer.
    """
    answers: Answers = {decoding: [] for decoding in recorded}
    episodes = []
    for question in questions:
        found = []
        for decoding, graph_names in recorded.items():
            session = RecordingSession(trunk, graph_names)
            generation = _generate(session, model, question, decoding, max_new_tokens)
            answers[decoding].append(generation)
            if graph_names:
                found.append(
                    Episode(
                        [*question.token_ids, *generation.token_ids],
                        len(question.token_ids),
                        session.take(),
                    )
                )
            advance(1)
        episodes.append(merged(found))
    return answers, episodes


def right_answers(
    questions: Sequence[Question], generations: Sequence[Generation], to_text: ToText | None
) -> list[bool | None]:
    """Tell which answers are right, character by character.

    Returns:
        None for a question whose answer is not known.
    """
    return [
        None
        if not question.answers or to_text is None
        else to_text(generation.token_ids) in question.answers
        for question, generation in zip(questions, generations, strict=True)
    ]


def same_tokens(first: Sequence[Generation], second: Sequence[Generation]) -> list[bool]:
    """Tell for each question whether both answers have the same tokens."""
    return [one.token_ids == other.token_ids for one, other in zip(first, second, strict=True)]


def divergences(
    session: TorchSession,
    questions: Sequence[Question],
    autoregressive: Sequence[Generation],
    speculative: Sequence[Generation],
) -> list[Divergence]:
    """Find where self-speculation differs from autoregression over the same trunk."""
    found = []
    for number, (question, ar, other) in enumerate(
        zip(questions, autoregressive, speculative, strict=True)
    ):
        if ar.token_ids == other.token_ids:
            continue
        position = _first_difference(ar.token_ids, other.token_ids)
        preference = None
        if position < min(len(ar.token_ids), len(other.token_ids)):
            logits = _logits_after(session, [*question.token_ids, *ar.token_ids[:position]])
            preference = float(logits[ar.token_ids[position]] - logits[other.token_ids[position]])
        found.append(Divergence(number, position, preference))
    return found


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the first place that differs, at most the shorter length."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _logits_after(session: TorchSession, tokens: Text) -> NDArray[np.float64]:
    """Return the next token's logits (V,), after one forward over a text."""
    text = np.array([tokens], np.int64)
    _, logits = session.run("ar", session.new_cache(), text, 0)
    return np.asarray(logits[0], np.float64)


def _generate(
    session: TorchSession,
    model: ModelInfo,
    question: Question,
    decoding: Decoding,
    max_new_tokens: int,
) -> Generation:
    options = DecodeOptions(
        max_new_tokens, model.block_size, decoding.threshold, decoding.use_drafter
    )
    stream = Stream(DecodedSequence(session, model, question.token_ids), decoding.mode, options)
    for _ in stream:
        pass
    return stream.result

"""Answers in every mode over a trunk, and compares two trunks' answers.

The algorithms are the runtime's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimode.calib.evaluate.quantization.questions import Decoding, Question, ToText
from trimode.calib.reference.episodes import Episode, RecordingSession, merged
from trimode.calib.reference.torch_session import TorchSession
from trimode.formats.contract import ModelInfo, Role
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence as DecodedSequence
from trimode.runtime.decode.stream import Generation, Stream

Advance = Callable[[int], None]
Answers = dict[Decoding, list[Generation]]
"""One generation a question, in their order."""


@dataclass(frozen=True)
class Divergence:
    """Where self-speculation leaves autoregression.

    Attributes:
        question: counted from 0, among those that were drawn.
        position: Place of the first token that differs, counted from 0 in the answer.
        preference: what the trunk's logit of AR's token is above that of the other one, AR's text
            before them being read in one forward; a difference of rounding error says that the two
            are as good as equal. None where one text ends before the other.
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
    recorded: Mapping[Decoding, Sequence[Role]],
    max_new_tokens: int,
    advance: Advance,
) -> tuple[Answers, list[list[Episode]]]:
    """Answer like :func:`answer`, and record the forwards for a replay.

    Args:
        trunk: the model.
        model: Facts that decoding needs.
        questions: Questions to answer.
        recorded: ways to answer them, each with the roles whose blocks are kept; none = the
        answer's text is not kept either.
        max_new_tokens: Longest answer, in tokens.
        advance: Called with 1 after each answer.
    """
    answers: Answers = {decoding: [] for decoding in recorded}
    episodes = []
    for question in questions:
        found = []
        for decoding, roles in recorded.items():
            session = RecordingSession(trunk, roles)
            generation = _generate(session, model, question, decoding, max_new_tokens)
            answers[decoding].append(generation)
            if roles:
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
    """Tell for each answer whether it is right; None where that is not known.

    A right answer is right character by character.
    """
    return [
        None
        if not question.answers or to_text is None
        else to_text(generation.token_ids) in question.answers
        for question, generation in zip(questions, generations, strict=True)
    ]


def same_tokens(first: Sequence[Generation], second: Sequence[Generation]) -> list[bool]:
    """Whether the answers to each question have the same tokens."""
    return [one.token_ids == other.token_ids for one, other in zip(first, second, strict=True)]


def divergences(
    session: TorchSession,
    questions: Sequence[Question],
    autoregressive: Sequence[Generation],
    speculative: Sequence[Generation],
) -> list[Divergence]:
    """Where answers of self-speculation differ from those of autoregression over the same trunk."""
    found = []
    for number, (question, ar, other) in enumerate(
        zip(questions, autoregressive, speculative, strict=True)
    ):
        if ar.token_ids == other.token_ids:
            continue
        shorter = min(len(ar.token_ids), len(other.token_ids))
        position = next(
            (i for i in range(shorter) if ar.token_ids[i] != other.token_ids[i]), shorter
        )
        preference = None
        if position < shorter:
            text = np.array([[*question.token_ids, *ar.token_ids[:position]]], np.int64)
            logits = np.asarray(session.run("ar", session.new_cache(), text, 0)[1], np.float64)[0]
            preference = float(logits[ar.token_ids[position]] - logits[other.token_ids[position]])
        found.append(Divergence(number, position, preference))
    return found


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

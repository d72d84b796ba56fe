"""Reads what `report quantization` and `calibrate sensitivity` answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trimode.calib.evaluate.quantization.candidate import Candidate
    from trimode.calib.evaluate.quantization.questions import Question, ToText
    from trimode.formats.contract import ModelInfo
    from trimode.graphs.checkpoint import Checkpoint
    from trimode.runtime.text.prompts import PromptStyle


class Inputs(NamedTuple):
    """Holds a checkpoint, ways to quantize it, and questions to it.

    Attributes:
        sha256: Digest of the file of questions.
        to_text: Tokenizer's decoder; None if no answer is known.
    """

    checkpoint: Checkpoint
    model: ModelInfo
    candidates: list[Candidate]
    questions: list[Question]
    sha256: str
    to_text: ToText | None


def read_inputs(
    checkpoint_path: Path, calibrations: Sequence[str], data: Path, style: PromptStyle
) -> Inputs:
    """Open the checkpoint and the calibrations, and read the questions."""
    from trimode.calib.evaluate.quantization.candidate import read_candidate
    from trimode.calib.evaluate.quantization.questions import read_questions
    from trimode.formats.files import sha256_of
    from trimode.graphs.checkpoint import describe_model, open_checkpoint

    checkpoint = open_checkpoint(checkpoint_path)
    candidates = [read_candidate(name, checkpoint) for name in calibrations]
    model = describe_model(checkpoint)
    questions, to_text = read_questions(data, style, checkpoint_path, model)
    return Inputs(checkpoint, model, candidates, questions, sha256_of(data), to_text)

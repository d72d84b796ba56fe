"""Runs the training of `calibrate drafter` and `calibrate sampler`.

Both train on the checkpoint's own answers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from trimode.calib.data.prompts import Prompts
from trimode.calib.evaluate.quantization.questions import read_questions
from trimode.calib.training.run_state import state_file
from trimode.cli.console import RichProgress
from trimode.formats.contract import ModelInfo
from trimode.formats.files import sha256_of
from trimode.graphs.checkpoint import Checkpoint, describe_model
from trimode.progress import Progress
from trimode.runtime.text.prompts import USUAL_STYLE, PromptStyle

S_contra = TypeVar("S_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class TrainingRequest:
    """The command line's options that are no settings of the training."""

    data: Path
    calibration: Path | None = None
    resume: bool = False
    as_json: bool = False
    style: PromptStyle = USUAL_STYLE


class TrainingJob(Protocol[S_contra, R_co]):
    """Trains, and writes the folder ``output``; returns its record."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        model: ModelInfo,
        prompts: Prompts,
        output: Path,
        settings: S_contra,
        progress: Progress,
        *,
        calibration: Path | None = None,
        resume: bool = False,
    ) -> R_co:
        """Train on the prompts, write ``output``, and return its record."""
        ...


def train_on_prompts(
    train: TrainingJob[S, R],
    checkpoint: Checkpoint,
    output: Path,
    request: TrainingRequest,
    settings: S,
) -> R:
    """Run the job over a file of prompts, with progress on stderr.

    If it is interrupted, stderr says how to go on.
    """
    model = describe_model(checkpoint)
    questions, to_text = read_questions(request.data, request.style, checkpoint.path, model)
    answers = {
        tuple(question.token_ids): question.answers for question in questions if question.answers
    }
    prompts = Prompts(
        [question.token_ids for question in questions], sha256_of(request.data), answers, to_text
    )
    try:
        with RichProgress() as progress:
            return train(
                checkpoint,
                model,
                prompts,
                output,
                settings,
                progress,
                calibration=request.calibration,
                resume=request.resume,
            )
    except KeyboardInterrupt:
        if state_file(output).is_file():
            sys.stderr.write(
                f"interrupted; the same command with --resume goes on from {state_file(output)}\n"
            )
        raise

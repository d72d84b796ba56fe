"""Runs the trainings of ``calibrate drafter`` and ``calibrate sampler``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from trimode.cli.flags import flags_in_errors

if TYPE_CHECKING:
    from trimode.calib.data.prompts import Prompts
    from trimode.calib.jobs.job import Job, OutputKind
    from trimode.calib.training.run_state import RunState
    from trimode.calib.training.settings import TrainingSettings
    from trimode.formats.contract import ModelInfo
    from trimode.runtime.text.prompts import PromptStyle

R = TypeVar("R")


class TrainingCommand(NamedTuple, Generic[R]):
    """Describes a training, and how its record is shown.

    Attributes:
        job: Class of the job, a :class:`trimode.calib.training.job.TrainingJob`.
        kind: Description of the folder that the job writes.
        show: Function that prints a record as tables.
        in_words: Function that says what became of the folder.
    """

    job: Callable[..., Job[Any, RunState, Any, Any, Any, R]]
    kind: OutputKind[RunState]
    show: Callable[[R], None]
    in_words: Callable[[Path, R], str]


def run_training(
    command: TrainingCommand[R],
    checkpoint_path: Path,
    output: Path,
    data: Path,
    settings: TrainingSettings,
    *,
    style: PromptStyle,
    calibration: Path | None = None,
    resume: bool = False,
    as_json: bool = False,
) -> None:
    """Train on a file of prompts, and print tables or JSON.

    Progress goes to stderr. Errors are raised before anything is written.
    """
    from trimode.cli.console import RichProgress
    from trimode.cli.output import print_json
    from trimode.graphs.checkpoint import describe_model, open_checkpoint

    with flags_in_errors():
        settings.check()
        style.check()
        command.kind.check_run(output, checkpoint_path, data, calibration, resume=resume)
        checkpoint = open_checkpoint(checkpoint_path)
        model = describe_model(checkpoint)
        prompts = _read_prompts(data, style, checkpoint_path, model)
        with says_how_to_resume(command.kind, output), RichProgress() as progress:
            record = command.job(
                checkpoint,
                model,
                prompts,
                output,
                settings,
                progress,
                calibration=calibration,
                resume=resume,
            ).run()
    if as_json:
        print_json(record)
    else:
        command.show(record)
    sys.stderr.write(command.in_words(output, record) + "\n")


@contextmanager
def says_how_to_resume(kind: OutputKind[Any], output: Path) -> Iterator[None]:
    """Say on stderr how to continue the block if it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        if (work := kind.work.beside(output).path).exists():
            sys.stderr.write(
                "interrupted; to continue, repeat the command with --resume\n"
                f"--resume goes on from {work}\n"
            )
        raise


def _read_prompts(data: Path, style: PromptStyle, checkpoint: Path, model: ModelInfo) -> Prompts:
    from trimode.calib.data.prompts import Prompts
    from trimode.calib.evaluate.quantization.questions import read_questions
    from trimode.formats.files import sha256_of

    questions, to_text = read_questions(data, style, checkpoint, model)
    answers = {tuple(one.token_ids): one.answers for one in questions if one.answers}
    return Prompts([one.token_ids for one in questions], sha256_of(data), answers, to_text)

"""Implements ``trimode verify``: compares a bundle with its checkpoint.

Graphs are compared output by output, generations token by token.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import typer

from trimode.cli.flags import VERIFY_FLAGS, flags_in_errors, with_flags
from trimode.cli.options import verify as options
from trimode.cli.options.shared import (
    BundlePath,
    Json,
    Raw,
    RunPrecision,
    RunTarget,
    System,
    Thinking,
    Threads,
)
from trimode.cli.parse import need
from trimode.cli.prompt_options import prompt_style
from trimode.errors import BundleError, DependencyError, DeviceError

if TYPE_CHECKING:
    from trimode.formats.verification import Verification
    from trimode.progress import Progress
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.text.prompts import PromptStyle


class VerifyChoices(TypedDict, total=False):
    """Holds the options that :func:`trimode.compiler.verify.run.verify` takes as they are."""

    calibration: Path | None
    sampler: Path | None
    prompts_file: Path | None
    style: PromptStyle
    seed: int
    long: int | None
    max_new_tokens: int


def verify(
    bundle: BundlePath,
    *,
    against: options.Against,
    precision: RunPrecision = None,
    target: RunTarget = None,
    calibration: options.Calibration = None,
    prompts_file: options.PromptsFile = None,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    seed: options.Seed = 0,
    drafter: options.Drafter = None,
    sampler: options.Sampler = None,
    long: options.Long = None,
    max_new_tokens: options.MaxNewTokens = 64,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle with its checkpoint in PyTorch.

    The exit code is 1 if they differ.
    """
    need("the reference", "verify", "torch", "polygraphy", "onnxruntime")
    passed = run_verify(
        bundle,
        against,
        precision=precision,
        target=target,
        calibration=calibration,
        prompts_file=prompts_file,
        style=prompt_style(raw, system, enable_thinking),
        seed=seed,
        drafter=drafter,
        sampler=sampler,
        long=long,
        max_new_tokens=max_new_tokens,
        threads=threads,
        as_json=as_json,
    )
    if not passed:
        raise typer.Exit(1)


def run_verify(
    bundle: Path,
    checkpoint: Path,
    *,
    precision: str | None = None,
    target: str | None = None,
    drafter: Path | None = None,
    threads: int | None = None,
    as_json: bool = False,
    **choices: Unpack[VerifyChoices],
) -> bool:
    """Verify, write ``verification.json``, and tell whether all passed.

    What was found is printed. An earlier ``verification.json`` stays as it is where an error is
    raised.

    Raises:
        UsageError: an option is out of range, the bundle has no such precision or target, or
            another calibration; or the checkpoint is of another shape.
        CheckpointError: the checkpoint or the calibration cannot be read.
        BundleError, DeviceError, DependencyError: the target cannot run here.
    """
    from trimode.cli.console import RichProgress
    from trimode.cli.output import print_json
    from trimode.cli.verify_output import show_verification
    from trimode.formats.verification import check_verification_place, write_verification

    with flags_in_errors(VERIFY_FLAGS):
        _check(**choices)
        model = _open_target(bundle, precision, target, threads)
        check_verification_place(bundle)
        with RichProgress() as progress:
            found = _verify(model, checkpoint, drafter, progress, **choices)
        notes = tuple(with_flags(note, VERIFY_FLAGS) for note in found.notes)
        verification = found.model_copy(update={"notes": notes})
        path = write_verification(verification, bundle)
    if as_json:
        print_json(verification, indent=1)
    else:
        show_verification(verification, checkpoint)
    sys.stderr.write(f"wrote {path}\n")
    return verification.passed


def _check(**choices: Unpack[VerifyChoices]) -> None:
    """Check numbers and prompts before anything is opened."""
    from trimode.cli.prompt_options import check_prompt_options
    from trimode.compiler.verify.checks import check_numbers
    from trimode.runtime.text.prompts import USUAL_STYLE

    check_numbers(choices.get("seed", 0), choices.get("max_new_tokens", 1))
    check_prompt_options(choices.get("prompts_file"), choices.get("style", USUAL_STYLE))


def _verify(
    model: TriModeModel,
    checkpoint: Path,
    drafter: Path | None,
    progress: Progress,
    **choices: Unpack[VerifyChoices],
) -> Verification:
    from trimode.compiler.verify.run import verify
    from trimode.graphs.checkpoint import open_checkpoint

    return verify(model, open_checkpoint(checkpoint, drafter), **choices, progress=progress)


def _open_target(
    bundle: Path, precision: str | None, target: str | None, threads: int | None
) -> TriModeModel:
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.sessions.select import PORTABLE

    try:
        model = TriModeModel.from_pretrained(
            bundle, precision=precision, target=target, num_threads=threads
        )
    except (BundleError, DeviceError, DependencyError) as error:
        raise type(error)(f"nothing was verified: {error.message}", error.hint) from error
    names = model.bundle.chosen.targets
    if model.target == PORTABLE and target != PORTABLE and names:
        # Generating may fall back to the portable graphs; saying that a GPU's engines are right
        # because these are may not.
        raise DeviceError(
            "nothing was verified: expected one of the bundle's targets to run here "
            f"({', '.join(names)}), found that none does",
            "verify on the machine with the GPU, or pass --target portable for the portable "
            "graphs alone",
        )
    return model

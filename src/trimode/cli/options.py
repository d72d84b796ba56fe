"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trimode.runtime.text.prompts import PromptStyle

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder written by `trimode build`.")
]
RunPrecision = Annotated[
    str | None,
    typer.Option(
        "--precision", help="One of the bundle's; the one that was built first if left out."
    ),
]
CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Hugging Face checkpoint.")
]
TrainingData = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="JSON lines with `prompt`, `messages` or `token_ids`; the model writes the answers.",
    ),
]
ServedDtype = Annotated[
    str,
    typer.Option(
        help="What the bundle computes in: float32 (cpu), bfloat16 or float16. Weights are rounded to it."
    ),
]
TrainingSamples = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Prompts to train on, drawn by the seed; all that are not held out if left out.",
    ),
]
HeldOut = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Prompts set aside to measure with; a quarter, at most 64, if left out."
    ),
]
AnswerLength = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Device = Annotated[str, typer.Option(help="Where the checkpoint runs: cpu or cuda.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the same command where it was interrupted.")
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw",
        help="Take texts as they are, without the chat template; a model that has none does so anyway.",
    ),
]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Begin each conversation with this system message."),
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--enable-thinking/--no-enable-thinking",
        help="Tell the chat template; what a line says itself goes first.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def usual_style() -> PromptStyle:
    """The chat template's own ways: the default of requests, looked up when one is made."""
    from trimode.runtime.text.prompts import USUAL_STYLE

    return USUAL_STYLE

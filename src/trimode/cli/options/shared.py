"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder written by `trimode build`.")
]
CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Hugging Face checkpoint.")
]
RunPrecision = Annotated[
    str | None, typer.Option("--precision", help="Precision to run; default: the first one built.")
]
RunTarget = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Target to run on, or portable; default: the one that fits this machine.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="Threads per operator; default: one for each core.")
]
RuntimeCache = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder for files prepared for this machine.")
]
Raw = Annotated[
    bool,
    typer.Option("--raw", help="Pass texts to the model as they are, without a chat template."),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System message that begins each conversation.")
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--enable-thinking/--no-enable-thinking",
        help="Turn thinking on or off in the chat template; a prompt's own setting wins.",
    ),
]
Device = Annotated[str, typer.Option(help="Device that runs the checkpoint: cpu or cuda.")]
NoFigure = Annotated[
    bool, typer.Option("--no-figure", help="Draw no figure; figures need matplotlib.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

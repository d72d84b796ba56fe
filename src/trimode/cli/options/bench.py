"""Declares the options of ``trimode bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Rows = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...",
        help="Tokens per forward; default: 1,4,8,12,16,24,32 and the model's block size.",
    ),
]
Past = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="Tokens cached before a forward; default: 64,512,2048."),
]
Batch = Annotated[
    str | None, typer.Option(metavar="N,N,...", help="Sequences per forward; default: 1.")
]
Repeats = Annotated[
    int | None,
    typer.Option(help="Rounds to measure; default: 20, or fewer to stay within two minutes."),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        help="File of prompts, JSON lines with `prompt`, `messages` or `token_ids`; "
        "measures the acceptance of their drafts too."
    ),
]
SpeedOfLight = Annotated[
    bool,
    typer.Option(
        "--speed-of-light",
        help="Count forwards instead of milliseconds: the fewest possible, and those of each mode.",
    ),
]
BlockLength = Annotated[
    int | None,
    typer.Option(help="Tokens per block with --speed-of-light; default: the model's block size."),
]
Thresholds = Annotated[
    str | None,
    typer.Option(
        metavar="P,P,...",
        help="Diffusion thresholds to try with --speed-of-light; default: 0.5,0.7,0.9,0.95.",
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Most tokens of each answer with --speed-of-light; default: 128.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="PLACE",
        help="File that the table is written to as well; with --speed-of-light a folder.",
    ),
]

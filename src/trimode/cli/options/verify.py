"""Declares the options of ``trimode verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Against = Annotated[
    Path, typer.Option(metavar="CHECKPOINT", help="Checkpoint that the bundle was built from.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Calibration to compare the bundle's scales with; rtn scales are always compared.",
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        help="File of prompts, JSON lines with `prompt`, `messages` or `token_ids`; "
        "default: random tokens."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed for random tokens.")]
Drafter = Annotated[
    Path | None,
    typer.Option(
        metavar="ADAPTER",
        help="Drafter adapter that the bundle was built with; default: the checkpoint's.",
    ),
]
Sampler = Annotated[
    Path | None,
    typer.Option(
        metavar="SAMPLER",
        help="Learned sampler that the bundle was built with; without it none is compared.",
    ),
]
Long = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Position for long-context comparisons; "
        "default: past the original RoPE length, where affordable.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate for each comparison.")]

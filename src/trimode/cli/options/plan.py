"""Declares the options of ``trimode plan``."""

from __future__ import annotations

from typing import Annotated

import typer

Targets = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="GPU to plan for, repeatable; `trimode targets` lists them."),
]
Precision = Annotated[
    str | None,
    typer.Option(help="Precision to plan: fp16, bf16, fp8, int8, int4 or nvfp4."),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Calibration of the build; default: all linear layers but the head are quantized.",
    ),
]

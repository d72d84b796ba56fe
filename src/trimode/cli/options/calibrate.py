"""Declares the options of ``trimode calibrate`` and ``trimode report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CalibrationOutput = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        metavar="CALIBRATION",
        help="Folder to write, or a calibration to replace.",
    ),
]
ReportOutput = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="REPORT", help="Folder to write, or a report to replace."
    ),
]
AdapterOutput = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        metavar="ADAPTER",
        help="Folder to write, or a trained adapter to replace.",
    ),
]
SamplerOutput = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        metavar="SAMPLER",
        help="Folder to write, or a trained sampler to replace.",
    ),
]
Prompts = Annotated[
    Path,
    typer.Option(
        metavar="FILE", help="File of prompts, JSON lines with `prompt`, `messages` or `token_ids`."
    ),
]
Questions = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="File of prompts, JSON lines with `prompt`, `messages` or `token_ids`; "
        "`answer` is optional.",
    ),
]
TrainingPrompts = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="File of prompts, JSON lines with `prompt`, `messages` or `token_ids`; "
        "the model writes the answers.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(metavar="N", help="Prompts to pick at random by the seed; default: all."),
]
TrainingSamples = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Prompts to train on, picked by the seed; default: all that are not held out.",
    ),
]
HeldOut = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Prompts held out for measuring; default: a quarter, at most 64."
    ),
]
RankingSamples = Annotated[
    int, typer.Option(metavar="N", help="Prompts among the samples whose rows rank the layers.")
]
Graphs = Annotated[
    str,
    typer.Option(metavar="MODE,...", help="Graphs that the scales must fit: ar, draft and verify."),
]
AnswerModes = Annotated[
    str,
    typer.Option(
        metavar="MODE,...", help="Modes that answer the prompts: ar, diffusion, linear-spec."
    ),
]
BudgetModes = Annotated[
    str,
    typer.Option(
        metavar="MODE,...",
        help="Modes that must stay within --max-drop: ar, diffusion, linear-spec.",
    ),
]
DecodedTokens = Annotated[
    int, typer.Option(help="Tokens to decode after each prompt, in each mode.")
]
AnswerLength = Annotated[int, typer.Option(help="Most tokens of an answer.")]
SamplingSeed = Annotated[int, typer.Option(help="Seed for picking prompts.")]
DrafterSeed = Annotated[
    int, typer.Option(help="Seed for picking prompts, a fresh adapter and training.")
]
SamplerSeed = Annotated[
    int, typer.Option(help="Seed for picking prompts, the initial network and training.")
]
ScalesPrecision = Annotated[
    str, typer.Option(help="Precision to calibrate: fp8, int8 (SmoothQuant), int4 (AWQ) or nvfp4.")
]
BlockSize = Annotated[
    int | None, typer.Option(help="Most inputs that share a scale, for int4 only; default: 128.")
]
PerChannel = Annotated[
    bool,
    typer.Option(
        "--per-channel", help="Use one scale for each weight row, for fp8 only, not one for all."
    ),
]
QuantizeHead = Annotated[
    bool, typer.Option("--quantize-head", help="Quantize the output head too.")
]
Memory = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        help="Most memory for float32 weights; larger weights are read from the files; "
        "default: half of the free memory.",
    ),
]
Calibrations = Annotated[
    list[str],
    typer.Option(
        metavar="FOLDER",
        help="Calibration to measure, repeatable; "
        "rtn-int8, rtn-int4 and rtn-nvfp4 round to nearest.",
    ),
]
BaseCalibration = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER", help="Calibration to start from, written by `trimode calibrate`."
    ),
]
DrafterCalibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Calibration of the bundle that the drafter is for; default: no quantization.",
    ),
]
SamplerCalibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Calibration of the bundle that the sampler is for; default: no quantization.",
    ),
]
MaxDrop = Annotated[
    float,
    typer.Option(
        metavar="POINTS", help="Most percentage points of exact match that a mode may lose."
    ),
]
ServedDtype = Annotated[
    str,
    typer.Option(
        help="Data type that the bundle computes in: float32 (cpu), bfloat16 or float16; "
        "weights are rounded to it."
    ),
]
ScalesResume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an interrupted run of the same command; "
        "otherwise its files in CALIBRATION.work are deleted.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run of the same command.")
]

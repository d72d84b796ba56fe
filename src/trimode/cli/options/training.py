"""Declares the options of training a drafter or a sampler."""

from __future__ import annotations

from typing import Annotated

import typer

DrafterSteps = Annotated[
    int | None, typer.Option(help="Training steps; default: 300 without --minutes.")
]
SamplerSteps = Annotated[
    int | None, typer.Option(help="Training steps; default: 2000 without --minutes.")
]
DrafterMinutes = Annotated[
    float | None, typer.Option(help="Minutes to train; writing answers and measuring come on top.")
]
SamplerMinutes = Annotated[
    float | None, typer.Option(help="Minutes to train; writing states and measuring come on top.")
]
BlockLength = Annotated[
    int | None, typer.Option(help="Tokens per drafted block; default: the model's block size.")
]
Rank = Annotated[
    int | None,
    typer.Option(help="Rank of a fresh adapter; required if the checkpoint has no adapter."),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        help="Alpha of a fresh adapter, which is scaled by alpha / rank; default: 4 times the rank."
    ),
]
FromScratch = Annotated[
    bool, typer.Option("--from-scratch", help="Start from a fresh adapter, not the checkpoint's.")
]
DrafterLearningRate = Annotated[
    float | None,
    typer.Option(
        help="Peak learning rate; default: 2e-3 for a fresh adapter, 5e-4 for an existing one."
    ),
]
SamplerLearningRate = Annotated[float, typer.Option(help="Peak learning rate.")]
TextBatch = Annotated[int, typer.Option(help="Texts per training step.")]
SlotBatch = Annotated[int, typer.Option(help="Slots per training step.")]
LabelTarget = Annotated[
    str,
    typer.Option(
        help="Tokens that count as right: those of serial or leftmost denoising, "
        "or of autoregression (ar)."
    ),
]
BlockLengths = Annotated[str, typer.Option(metavar="N,N,...", help="Block lengths to train on.")]
ModelWidth = Annotated[int, typer.Option(help="Width of the network.")]
Layers = Annotated[int, typer.Option(help="Layers of the network.")]
Heads = Annotated[int, typer.Option(help="Attention heads per layer.")]
FeedForward = Annotated[int, typer.Option(help="Width of the feed-forward layers.")]

"""Declares the options of ``trimode bench serve`` and ``trimode report serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Url = Annotated[
    str, typer.Argument(metavar="URL", help="Server to ask, such as http://127.0.0.1:8000.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="PLACE",
        help="File of conversations, JSON lines with `turns`, `messages`, `prompt` or `token_ids`; "
        "`question_id` and `category` as in SPEED-Bench. Or a folder of such files.",
    ),
]
RandomInput = Annotated[
    int | None,
    typer.Option(metavar="N", help="Tokens of each random prompt, instead of --data."),
]
RandomOutput = Annotated[
    int, typer.Option(metavar="N", help="Tokens of each answer to a random prompt.")
]
RandomRange = Annotated[
    float,
    typer.Option(metavar="X", help="Spread of random lengths: from 1 - X to 1 + X times these."),
]
SharedPrefix = Annotated[
    int,
    typer.Option(metavar="N", help="Words, or token ids, that begin every conversation alike."),
]
Modes = Annotated[
    str | None,
    typer.Option(
        metavar="MODE,...",
        help="Modes to compare, for servers of trimode: ar, diffusion, linear-spec, auto.",
    ),
]
Concurrency = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="Clients that each wait for their answer; default: 1."),
]
Rate = Annotated[
    str | None,
    typer.Option(
        metavar="R,R,...", help="Conversations begun per second, instead of --concurrency."
    ),
]
Burstiness = Annotated[
    float | None,
    typer.Option(
        metavar="B", help="Shape of the gaps with --rate: 1 is Poisson, below 1 comes in bursts."
    ),
]
Warmup = Annotated[
    float, typer.Option(metavar="SECONDS", help="Time under load before requests count.")
]
Duration = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Time in which requests count.")
]
NumPrompts = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Conversations that count, instead of --duration; default: 100."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of each answer.")]
Temperature = Annotated[float, typer.Option(help="Temperature; 0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Seed for order, lengths, gaps and sampling.")]
Limits = Annotated[
    str | None,
    typer.Option(
        metavar="LIMITS",
        help="Milliseconds that a good request keeps, such as ttft:500 tpot:50 e2el:2000.",
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check", help="Compare greedy answers with those of the same requests sent alone."
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="Model to ask; default: the first one listed.")
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File with the API key; default: OPENAI_API_KEY, if set."),
]
Timeout = Annotated[
    float, typer.Option(metavar="SECONDS", help="Time without news after which a request failed.")
]
ServerPid = Annotated[
    int | None,
    typer.Option(
        metavar="PID", help="Process whose memory is watched; default: the local one that listens."
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
        help="Folder for result.json, requests.jsonl and report.html.",
    ),
]
Results = Annotated[
    list[Path],
    typer.Argument(metavar="RESULT...", help="Folders that `trimode bench serve` wrote."),
]
Page = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Page to write, in HTML."),
]

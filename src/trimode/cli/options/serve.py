"""Declares the options of ``trimode serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Host = Annotated[str | None, typer.Option(help="Address to listen on; default: 127.0.0.1.")]
Port = Annotated[int | None, typer.Option(help="Port; 0 takes a free one; default: 8000.")]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File with one API key a line; default: no key is asked."),
]
ServedModelName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Name of the model; default: the bundle's folder."),
]
Mode = Annotated[
    str | None,
    typer.Option(
        help="Mode of requests that name none: ar, diffusion, linear-spec or auto (default)."
    ),
]
MaxRows = Annotated[
    int | None, typer.Option(metavar="N", help="Most texts that run at a time; default: 8.")
]
MaxQueue = Annotated[
    int | None, typer.Option(metavar="N", help="Most texts that wait for a row; default: 256.")
]
KvBytes = Annotated[
    int | None,
    typer.Option(metavar="B", help="Most bytes kept of texts that have ended; default: 1 GiB."),
]
DrainTimeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS", help="Most seconds for requests at work after SIGTERM; default: 30."
    ),
]
LogFormat = Annotated[
    str | None, typer.Option(metavar="FORMAT", help="Lines of the log: text (default) or json.")
]
LogPrompts = Annotated[
    bool | None,
    typer.Option("--log-prompts", help="Log prompts and answers, which are left out otherwise."),
]
OtlpTracesEndpoint = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Send OpenTelemetry traces over HTTP to this address."),
]
Watch = Annotated[
    bool | None, typer.Option("--watch", help="Serve the page /watch, which shows decoding.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="TOML file with options of these names; the command line wins."
    ),
]

"""Shows errors and progress bars of the demo's two commands on stderr."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trimode.errors import TrimodeError, exit_with

_FLAGS = {"device": "--device", "resume": "--resume"}
"""Flags that errors name instead of parameters."""


def run_command(command: Callable[..., Any]) -> None:
    """Run a typer command.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app()
    except TrimodeError as error:
        error.rename(_FLAGS)
        exit_with(error)


class StageProgress:
    """Shows a bar a stage, with figures; silent unless entered."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._stages: dict[str, TaskID] = {}

    def __enter__(self) -> StageProgress:
        """Start drawing, and send the log through the same console."""
        logging.basicConfig(
            level=logging.INFO,
            format="%(message)s",
            handlers=[RichHandler(console=self._console, show_path=False)],
        )
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def update(self, stage: str, share: float, figures: str = "") -> None:
        """Say how far a stage is, 0 to 1."""
        if stage not in self._stages:
            self._stages[stage] = self._bars.add_task(stage, total=1.0, figures=figures)
        self._bars.update(self._stages[stage], completed=share, figures=figures)

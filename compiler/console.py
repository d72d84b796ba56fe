"""Progress on the terminal (stderr)."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


class RichProgress:
    """Shows the stages of a build as bars; where stderr is no terminal, one line a stage."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:<16}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console, disable=self._plain
        )
        self._task: TaskID | None = None

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int) -> None:
        """A stage begins."""
        if self._plain:
            sys.stderr.write(f"{name} ...\n")
        self._task = self._bars.add_task(name, total=total)

    def advance(self, steps: int) -> None:
        """The stage made progress."""
        if self._task is not None:
            self._bars.advance(self._task, steps)

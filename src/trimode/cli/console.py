"""Progress on the terminal (stderr)."""

from __future__ import annotations

import sys
from functools import partial
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from trimode.progress import Advance


class RichProgress:
    """Shows stages as bars, or as lines if stderr is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=self._plain,
        )

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int) -> Advance:
        if self._plain:
            sys.stderr.write(f"{name} ...\n")
        return partial(self._bars.advance, self._bars.add_task(name, total=total))

"""Keeps the work of a training in a file.

It holds what the model has written so far, and the training as it was after a step.
"""

from __future__ import annotations

import io
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from trimode.calib.jobs.work import Contents, Facts, Work
from trimode.errors import UsageError
from trimode.formats.disk import disk_errors
from trimode.formats.files import replace_bytes
from trimode.formats.places import companion
from trimode.runtime.text.prompts import Text

SAVE_EVERY_S = 120.0


class RunState(Work):
    """Keeps the state of a training in a file.

    Attributes:
        written: Entries that the model has written so far, one for each prompt, in their order.
        training: State of the training; None before it begins. Like ``written``, of types that
            ``torch.load(weights_only=True)`` reads.
    """

    what = "run"
    is_replaced = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.facts: Facts = {}
        self.written: list[Any] = []
        self.training: dict[str, Any] | None = None
        self._saved = time.monotonic()

    @classmethod
    def beside(cls, output: Path) -> RunState:
        """Return the state of the run that writes ``output``."""
        return cls(state_file(output))

    def contents(self) -> Contents:
        """Tell what lies there; a damaged file shows when it is read."""
        if self.path.is_file():
            return "work"
        return "something else" if self.path.exists() else "nothing"

    def begin(self, facts: Facts) -> None:
        """Remember the facts; the file appears when there is something to save."""
        self.facts = facts

    def take_up(self) -> dict[str, Any]:
        """Read the file; return the facts of the interrupted run.

        Raises:
            UsageError: the file is no state of a run.
        """
        try:
            state: dict[str, Any] = torch.load(self.path, weights_only=True)
            self.facts, self.written = state["identity"], state["written"]
            self.training = state["training"]
        except (
            OSError,
            RuntimeError,
            EOFError,
            KeyError,
            TypeError,
            pickle.UnpicklingError,
        ) as error:
            raise UsageError(
                f"{self.path}: expected the state of an earlier run, found a file that is none",
                f"delete {self.path}, and leave out `resume`",
            ) from error
        return dict(self.facts)

    def save(self) -> None:
        """Write the file, or leave the one before.

        Raises:
            BuildError: it cannot be written.
        """
        state = {"identity": self.facts, "written": self.written, "training": self.training}
        whole = io.BytesIO()  # to a file, torch.save hides what the system says of a full disk
        torch.save(state, whole)
        with disk_errors(self.path):
            replace_bytes(self.path, whole.getbuffer())
        self._saved = time.monotonic()

    def save_now_and_then(self) -> None:
        """Write the file if that was long ago."""
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save()

    def discard(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def state_file(output: Path) -> Path:
    """Return the file that keeps the state of a run."""
    return companion(output, ".state.pt")


def keep(state: RunState, *, interrupted: bool) -> None:
    """Save the state now and then, and before an interrupt takes effect."""
    if interrupted:
        state.save()
        raise KeyboardInterrupt
    state.save_now_and_then()


def write_missing(
    state: RunState,
    texts: Sequence[Text],
    write: Callable[[int, Text], Any],
    advance: Callable[[int], None],
) -> None:
    """Write an entry for every text that ``state`` has none of.

    Args:
        state: State of the run. It is saved at the end, since an interrupt before the first step of
            the training must not cost what was written.
        texts: Texts in the order of the entries.
        write: Function that makes the entry of a text, from its number and the text.
        advance: Function that is called after each entry, and at once for those there.
    """
    first = len(state.written)
    advance(first)
    with held_interrupts() as is_interrupted:
        for number, text in enumerate(texts[first:], first):
            state.written.append(write(number, text))
            advance(1)
            keep(state, interrupted=is_interrupted())
    state.save()


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back, so that a step is made whole.

    Yields a function that tells whether there was one. A second Ctrl-C acts at once.
    """
    pressed = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            signal.default_int_handler(number, frame)
        pressed.set()

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed.is_set  # somebody else decides what an interrupt does
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

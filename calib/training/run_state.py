"""Keeps the state of an interrupted run in a file.

It holds what was written so far, and the training as it was after a step.
"""

from __future__ import annotations

import contextlib
import io
import json
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

from trimode.errors import UsageError
from trimode.formats.calibration import Calibration
from trimode.formats.disk import disk_errors
from trimode.formats.places import companion
from trimode.runtime.text.prompts import Text

SAVE_EVERY_S = 120.0


def state_file(output: Path) -> Path:
    """Where a run that writes ``output`` keeps its state."""
    return companion(output, ".state.pt")


class RunState:
    """Holds the state of a run.

    Args:
        file: File of the state; written whole or not at all.
        identity: Facts of the run, as JSON values: a state of another run is not taken up.
        resume: take up the state in ``file``; without it, that file must not exist.

    Attributes:
        written: Entries that the model has written so far, one a prompt, in their order.
        training: whatever the training needs to go on; None before it begins. Both of types that
            ``torch.load(weights_only=True)`` reads.

    Raises:
        UsageError: there is a state and ``resume`` is not set, or the other way round, or it is of
            another run.
    """

    def __init__(self, file: Path, identity: dict[str, Any], *, resume: bool) -> None:
        self.file, self.identity = file, json.loads(json.dumps(identity))
        self.written: list[Any] = []
        self.training: dict[str, Any] | None = None
        self._saved = time.monotonic()
        check_state(file, resume=resume)
        if resume:
            self._load()

    def save(self) -> None:
        """Write the file, or leave the one before.

        Raises:
            BuildError: it cannot be written.
        """
        whole = io.BytesIO()  # to a file, torch.save hides what the system says of a full disk
        torch.save(
            {"identity": self.identity, "written": self.written, "training": self.training}, whole
        )
        partial = self.file.with_name(f".{self.file.name}.partial")
        with disk_errors(self.file), contextlib.ExitStack() as stack:
            partial.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(partial.unlink, missing_ok=True)
            partial.write_bytes(whole.getbuffer())
            partial.replace(self.file)
        self._saved = time.monotonic()

    def save_now_and_then(self) -> None:
        """Write the file if that was long ago."""
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save()

    def discard(self) -> None:
        """The run is done."""
        self.file.unlink(missing_ok=True)

    def _load(self) -> None:
        try:
            state: dict[str, Any] = torch.load(self.file, weights_only=True)
            identity, self.written, self.training = (
                state["identity"],
                state["written"],
                state["training"],
            )
        except (
            OSError,
            RuntimeError,
            EOFError,
            KeyError,
            TypeError,
            pickle.UnpicklingError,
        ) as error:
            raise UsageError(
                f"{self.file}: expected the state of an earlier run, found a file that is none",
                "delete it and begin anew, without --resume",
            ) from error
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise UsageError(
                    f"{self.file}: expected the state of a run with {name} {value}, "
                    f"found one with {identity.get(name)}",
                    "resume with the options and data of the run that was interrupted",
                )


def check_state(file: Path, *, resume: bool) -> None:
    """Raise :class:`UsageError` where there is a state that is not asked for, or none that is."""
    with disk_errors(file):
        is_there, is_state = file.exists(), file.is_file()
    if resume and not is_state:
        raise UsageError(
            f"{file}: expected the state of an earlier run, found none",
            "leave out --resume to begin anew",
        )
    if is_there and not resume:
        raise UsageError(
            f"{file}: expected no earlier run, found one that was interrupted",
            "pass --resume to take it up, or delete that file",
        )


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
        state: of the run; it is saved at the end, since an interrupt before the first step of the
        training must not cost what was written.
        texts: Texts in the order of the entries.
        write: the entry, from the number of a text and the text.
        advance: Called after each entry, and at once for those that are there.
    """
    first = len(state.written)
    advance(first)
    with held_interrupts() as is_interrupted:
        for number, text in enumerate(texts[first:], first):
            state.written.append(write(number, text))
            advance(1)
            keep(state, interrupted=is_interrupted())
    state.save()


def identity_of(
    settings: dict[str, Any],
    checkpoint_sha256: str,
    calibration: Calibration | None,
    data_sha256: str,
) -> dict[str, Any]:
    """List what has to be the same for a run to be taken up.

    A device may change, though the bytes will then differ.
    """
    scales = calibration.scales_sha256 if calibration else None
    rest = {name: value for name, value in settings.items() if name != "device"}
    return {"checkpoint": checkpoint_sha256, "scales": scales, "data": data_sha256, **rest}


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back, so that a step is made whole.

    Yields a function that tells whether there was one. A second one acts at once.
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

"""All or nothing: a file or folder is written beside its destination and renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trimode.errors import UsageError


def check_replaceable(folder: Path, marker: str, what: str) -> None:
    """Raise :class:`UsageError` where ``folder`` exists, is not empty and has no file ``marker``, by which ``what`` it may replace is known."""
    if folder.exists() and not (folder.is_dir() and ((folder / marker).is_file() or not any(folder.iterdir()))):
        raise UsageError(f"{folder}: expected a new or empty folder, or {what} to replace, found something else", "name another folder")


@contextlib.contextmanager
def staged_replacement(destination: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``destination`` when the block ends well and vanishes when it does not.

    The caller sees to it that nobody else is writing the same destination.
    """
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    recover(destination)
    staged = Path(tempfile.mkdtemp(prefix=_prefix(destination), dir=destination.parent))
    try:
        yield staged
        staged.chmod(0o777 & ~_umask())
        _swap(staged, destination)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def replace_text(destination: Path, text: str) -> None:
    """Write a UTF-8 file, or leave the one that is there as it is. Makes the folder.

    Raises:
        OSError: it cannot be written.
    """
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_prefix(destination), dir=destination.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        partial.chmod(0o666 & ~_umask())
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)


def recover(destination: Path) -> None:
    """Clear what a killed run left behind; where it was killed between its two renames, put the old folder back."""
    old = _set_aside(destination)
    if old.exists() and not destination.exists():
        old.rename(destination)
    for leftover in destination.parent.glob(f"{_prefix(destination)}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.partial-"


def _set_aside(destination: Path) -> Path:
    return destination.with_name(f"{_prefix(destination)}old")


def _swap(staged: Path, destination: Path) -> None:
    old = _set_aside(destination)
    if destination.exists():
        destination.rename(old)
    try:
        staged.rename(destination)
    except OSError:
        if old.exists():
            old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

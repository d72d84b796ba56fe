"""Exchanges the contents of a folder that cannot itself be renamed.

The marker, the file by which a folder counts as whole, leaves first and comes last. So a run that
is killed in between leaves a folder without it, and from the names within the next run sees how to
go on.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from trimode.formats.places import PARTIAL, visible_entries

_LEAVING = f"{PARTIAL}leaving"
"""The old entries while they are moved away."""
_COMING = f"{PARTIAL}coming"
"""There once all of the old entries are moved away: what is visible now is new."""


def exchange(staged: Path, folder: Path, marker: str) -> None:
    """Replace the entries of ``folder`` by those of ``staged``.

    The folder is made if it is missing.

    Raises:
        OSError: an entry cannot be moved; then the old ones are back.
    """
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        _move_in_and_out(staged, folder, marker)
    except BaseException:
        finish_exchange(folder, marker)
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finish_exchange(folder, marker)


def is_interrupted(folder: Path) -> bool:
    """Whether a run was killed amid an exchange of these contents."""
    return (folder / _LEAVING).is_dir()


def finish_exchange(folder: Path, marker: str) -> None:
    """Finish an interrupted exchange, or undo it.

    The new contents win if they are all there. Anything else that was left is cleared.
    """
    leaving, coming = folder / _LEAVING, folder / _COMING
    is_whole = coming.exists() and (folder / marker).exists()
    if leaving.is_dir() and not is_whole:
        if coming.exists():
            for entry in visible_entries(folder):
                _remove(entry)
            coming.unlink()  # before the old ones are back, lest they be taken for new
        _put_back(leaving, folder, marker)
    _remove(leaving)  # before the sign that what is there is new
    for leftover in folder.glob(f"{PARTIAL}*"):
        _remove(leftover)


def _move_in_and_out(staged: Path, folder: Path, marker: str) -> None:
    leaving = folder / _LEAVING
    leaving.mkdir()
    for entry in reversed(_marker_last(visible_entries(folder), marker)):
        _move(entry, leaving / entry.name)
    (folder / _COMING).touch()
    for entry in _marker_last(list(staged.iterdir()), marker):
        _move(entry, folder / entry.name)


def _put_back(old: Path, folder: Path, marker: str) -> None:
    for entry in _marker_last(list(old.iterdir()), marker):
        # else it is a copy, made by a move that failed half-way
        if not (folder / entry.name).exists():
            _move(entry, folder / entry.name)


def _move(entry: Path, to: Path) -> None:
    """Rename an entry, or copy and delete it where that is refused."""
    shutil.move(entry, to)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()


def _marker_last(entries: list[Path], marker: str) -> list[Path]:
    return sorted(entries, key=lambda entry: entry.name == marker)

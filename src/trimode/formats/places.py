"""Finds where an output goes, and where it is filled first.

A new folder is filled beside its place and renamed. That is not possible where the folder is there
already and cannot be renamed: a mount point, a folder in a parent that is read-only, the folder
that the command runs in. Such a folder is filled within, out of sight, and its contents are
exchanged.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trimode.errors import UsageError
from trimode.formats.disk import disk_errors

PARTIAL = ".partial-"
"""How the names of what is being written begin within a folder."""
KEPT = ".trimode"
"""How the names begin of what belongs to an output and lies within it for want of a place
beside.
"""
_FOREIGN = "lost+found"  # a fresh file system has it
_RESERVE = 32  # letters that are added to a name: `.partial`, a random part
_USUAL_NAME_MAX = 255


@dataclass(frozen=True)
class Place:
    """Says where an output goes.

    Attributes:
        folder: Folder of the output, absolute, with links followed.
        is_beside: True if it is filled beside and renamed, False if it is filled within.
    """

    folder: Path
    is_beside: bool

    @property
    def staging(self) -> Path:
        """The folder in which it is filled."""
        return self.folder.parent if self.is_beside else self.folder

    @property
    def prefix(self) -> str:
        """How the name begins of the folder that is filled."""
        return partial_prefix(self.folder) if self.is_beside else PARTIAL


def resolved(path: Path) -> Path:
    """Return the absolute path, with all links followed.

    A write to the last link replaces what it points to.

    Raises:
        UsageError: links lead in a circle, or the path is none.
        BuildError: the folder that the command runs in is gone.
    """
    try:
        with disk_errors(path):
            found = Path(os.path.realpath(path))
            is_circle = found.is_symlink()
    except ValueError as error:  # a NUL byte
        raise UsageError(
            f"expected a path, found {str(path)!r}: {error}", "name another place"
        ) from error
    if is_circle:
        raise UsageError(
            f"{path}: expected a place to write, found links that lead in a circle",
            "name another place",
        )
    return found


def find_place(output: Path) -> Place:
    """Decide where an output is filled, by trying it; leaves nothing behind.

    Raises:
        UsageError: it is a file.
        BuildError: nothing can be written there.
    """
    folder = resolved(output)
    with disk_errors(folder):
        if not folder.exists():
            _try_to_write(nearest_folder(folder))
            return Place(folder, is_beside=True)
        if not folder.is_dir():
            raise UsageError(
                f"{output}: expected a folder, found something else", "name another folder"
            )
        if visible_entries(folder) and not _holds_cwd(folder) and _can_be_renamed(folder):
            return Place(folder, is_beside=True)
        _try_to_write(folder)
        return Place(folder, is_beside=False)


def visible_entries(folder: Path) -> list[Path]:
    """List a folder, without entries of a run or the file system."""
    return [entry for entry in folder.iterdir() if not is_hidden(entry.name)]


def is_hidden(name: str) -> bool:
    """Whether this is not part of an output."""
    return name.startswith((PARTIAL, KEPT)) or name == _FOREIGN


def partial_prefix(path: Path) -> str:
    """How the name begins of what becomes ``path``; it lies beside it."""
    return short_name(path.parent, f".{path.name}", ".partial-")


def companion(output: Path, suffix: str, *, is_hidden: bool = False) -> Path:
    """Return the path of a file that belongs to an output.

    It is no part of the output: a lock, or the state of a run.

    Beside the output; within it where that is a mount point or its parent is read-only.
    """
    folder = resolved(output)
    with disk_errors(folder):
        if folder.is_dir() and not _has_room_beside(folder):
            return folder / f"{KEPT}{suffix}"
        return folder.with_name(
            short_name(folder.parent, f"{'.' if is_hidden else ''}{folder.name}", suffix)
        )


def short_name(parent: Path, name: str, suffix: str) -> str:
    """Join ``name`` and ``suffix``, short enough for the file system.

    A digest replaces the end of a name that is too long.
    """
    limit = _name_max(parent) - _RESERVE
    if len(os.fsencode(f"{name}{suffix}")) <= limit:
        return f"{name}{suffix}"
    suffix = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{suffix}"
    while name and len(os.fsencode(f"{name}{suffix}")) > limit:
        name = name[:-1]
    return f"{name}{suffix}"


def nearest_folder(path: Path) -> Path:
    """Return the nearest folder above ``path`` that exists.

    Raises :class:`NotADirectoryError` if that is a file.
    """
    above = path.parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    return above


def _name_max(parent: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return max(64, os.pathconf(nearest_folder(parent / "name"), "PC_NAME_MAX"))
    return _USUAL_NAME_MAX


def _try_to_write(folder: Path) -> None:
    """Write a file and a folder, as the work will do."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as name:
        (Path(name) / "try").write_bytes(b"x")


def _has_room_beside(folder: Path) -> bool:
    parent = folder.parent
    return os.access(parent, os.W_OK | os.X_OK) and parent.stat().st_dev == folder.stat().st_dev


def _holds_cwd(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return Path.cwd().is_relative_to(folder)
    return False


def _can_be_renamed(folder: Path) -> bool:
    """Try to rename an empty folder over it.

    A folder with entries refuses; the kind of refusal tells a mount point apart.
    """
    try:
        probe = tempfile.mkdtemp(prefix=partial_prefix(folder), dir=folder.parent)
    except OSError:
        return False
    try:
        os.rename(probe, folder)  # noqa: PTH104
    except OSError as error:
        return error.errno in (errno.ENOTEMPTY, errno.EEXIST)
    else:
        return True
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(probe)  # noqa: PTH106

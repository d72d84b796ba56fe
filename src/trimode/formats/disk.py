"""Says what is wrong with a disk in words that name it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from trimode.errors import BuildError
from trimode.formats.texts import reason_of

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
"""Error numbers of file systems without locks."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_HINTS = {
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EROFS: "choose a place that is not read-only",
    errno.ENOTDIR: "choose a place in a folder, not in a file",
}


def is_full(error: OSError) -> bool:
    """Whether a write failed for want of room.

    That may be the disk's, a quota's, or that of a limit on files.
    """
    return error.errno in _FULL


def mount_of(path: Path) -> Path:
    """Return the mount point of the file system that holds ``path``.

    The path need not exist yet.
    """
    found = Path(os.path.realpath(path))
    while not os.path.ismount(found) and found != found.parent:
        found = found.parent
    return found


def what_is_wrong(error: OSError, place: Path) -> str:
    """Describe an error of the system; a full disk is named.

    Args:
        error: Error of the system.
        place: File or folder being written, in case the error does not name it.
    """
    if not is_full(error):
        return reason_of(error)
    return f"the disk full ({mount_of(_place_in(error, place))}): {reason_of(error)}"


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn file system errors into :class:`BuildError`.

    ``place`` is what is being written.

    Raises:
        BuildError: a file cannot be read or written, or the disk is full; it is named.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, BrokenPipeError):
            raise
        raise _as_build_error(error, place) from error


def _as_build_error(error: OSError, place: Path) -> BuildError:
    reason = what_is_wrong(error, place)
    if is_full(error):
        hint = "free some space or choose another disk; nothing was left behind"
        return BuildError(f"{place}: expected room to write, found {reason}", hint)
    hint = _HINTS.get(error.errno or 0, "check the path and its permissions")
    found = f"{_place_in(error, place)}: expected to be able to read and write, found: {reason}"
    return BuildError(found, hint)


def _place_in(error: OSError, place: Path) -> Path:
    # a copy names its source first
    named = error.filename2 if is_full(error) and error.filename2 else error.filename
    return Path(os.fsdecode(named)) if isinstance(named, str | bytes) else place

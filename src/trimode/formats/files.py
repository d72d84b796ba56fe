"""Writes files and folders out of sight, then puts them in place.

So an output is whole, or not there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trimode.errors import UsageError
from trimode.formats.disk import disk_errors
from trimode.formats.exchange import exchange, finish_exchange, is_interrupted
from trimode.formats.places import (
    find_place,
    nearest_folder,
    partial_prefix,
    resolved,
    visible_entries,
)

_NO_EXCHANGE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system says where a file may be written but not exchanged for another."""


def check_replaceable(folder: Path, marker: str, what: str) -> None:
    """Check before the work that an output can be written.

    Args:
        folder: The output.
        marker: File in it by which an output that may be replaced is known.
        what: Name of the output, for messages.

    Raises:
        UsageError: ``folder`` exists, is not empty and has no ``marker``.
        BuildError: nothing can be written there.
    """
    place = resolved(folder)
    with disk_errors(place):
        if place.exists() and not _is_replaceable(place, marker):
            found = (
                f"{folder}: expected a new or empty folder, or {what} to replace, found "
                "something else"
            )
            raise UsageError(found, "name another folder")
    find_place(folder)


def check_apart(output: Path, source: Path | None, *others: Path | None) -> None:
    """Check that ``output`` overlaps no file that is read.

    Replacing it deletes nothing that is read, and nothing is written into ``source``.

    Args:
        output: Folder that will be written.
        source: Folder that is read, which must not get the output into it.
        others: Files and folders that are read.

    Raises:
        UsageError: they lie in each other.
    """
    place = resolved(output)
    if source is not None and place.is_relative_to(resolved(source)):
        raise UsageError(
            f"{output}: expected a folder outside {source}, which is read, found one in it",
            "name another output",
        )
    for path in (source, *others):
        if path is not None and resolved(path).is_relative_to(place):
            found = f"{output}: expected a folder without what is read, found that it holds {path}"
            raise UsageError(found, "name another output: this one would be replaced whole")


def check_file_place(path: Path) -> None:
    """Check before the work that a file can be written.

    Raises:
        UsageError: it is a folder.
        BuildError: it cannot be written.
    """
    place = resolved(path)
    with disk_errors(place):
        if place.is_dir():
            raise UsageError(f"{path}: expected a file to write, found a folder", "name a file")
        if _is_special(place):
            return
        try:
            with tempfile.NamedTemporaryFile(
                prefix=partial_prefix(place), dir=nearest_folder(place)
            ) as stream:
                stream.write(b"x")
        except OSError:
            if not place.exists():
                raise
            with place.open("r+b"):  # a file that may be written in a folder that may not
                pass


@contextlib.contextmanager
def staged_replacement(destination: Path, marker: str) -> Iterator[Path]:
    """Yield an empty folder that replaces ``destination`` at the end.

    It vanishes if the block fails.

    The caller sees to it that nobody else is writing the same destination.

    Args:
        destination: A new folder, an empty one, or one that may be replaced; where it is a link,
        what that points to.
        marker: File by which the result is known to be whole: it comes last where a rename
            cannot bring all at once.

    Raises:
        UsageError: ``destination`` is a file.
        BuildError: a file cannot be written, or the disk is full.
    """
    folder = resolved(destination)
    with disk_errors(folder), made_parents(folder):
        recover(folder, marker)
        place = find_place(folder)
        staged = Path(tempfile.mkdtemp(prefix=place.prefix, dir=place.staging))
        try:
            yield staged
            staged.chmod(0o777 & ~_umask())
            if not (place.is_beside and _swap(staged, folder)):
                exchange(staged, folder, marker)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def replace_text(destination: Path, text: str) -> None:
    """Write a UTF-8 file whole, or leave the old one unchanged.

    The folder is made if it is missing.

    Raises:
        OSError: it cannot be written.
    """
    replace_bytes(destination, text.encode())


def replace_bytes(destination: Path, data: bytes | memoryview) -> None:
    """Write a file whole, or leave the old one as it is.

    Makes the folder. If the file is a link, writes what that points to.

    A file that cannot be exchanged (a mount point, a file in a read-only folder) is written in
    place; so is a device or pipe.

    Raises:
        OSError: it cannot be written.
    """
    place = resolved(destination)
    if _is_special(place):
        place.write_bytes(data)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        _rename_over(place, data)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE or not place.is_file():
            raise  # of a full disk, say: what is there stays
        _write_in_place(place, data)


def recover(destination: Path, marker: str) -> None:
    """Clear what a killed run left behind.

    If it was killed amid the exchange of old and new, the old is put back.
    """
    old = _set_aside(destination)
    if old.exists() and not destination.exists():
        old.rename(destination)
    if not destination.parent.is_dir():
        return
    prefix = partial_prefix(destination)
    for leftover in (
        list(destination.parent.iterdir()) if os.access(destination.parent, os.R_OK) else []
    ):
        if leftover.name.startswith(prefix):
            shutil.rmtree(leftover, ignore_errors=True)
    if destination.is_dir() and _is_replaceable(destination, marker):
        finish_exchange(destination, marker)


def _is_replaceable(folder: Path, marker: str) -> bool:
    if not folder.is_dir():
        return False
    return (folder / marker).is_file() or is_interrupted(folder) or not visible_entries(folder)


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, which nothing may replace."""
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return False


def _rename_over(place: Path, data: bytes | memoryview) -> None:
    handle, name = tempfile.mkstemp(prefix=partial_prefix(place), dir=place.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        partial.chmod(0o666 & ~_umask())
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def _write_in_place(place: Path, data: bytes | memoryview) -> None:
    before = place.read_bytes()
    try:
        place.write_bytes(data)
    except OSError:
        with contextlib.suppress(OSError):
            place.write_bytes(before)
        raise


def _set_aside(destination: Path) -> Path:
    return destination.with_name(f"{partial_prefix(destination)}old")


def _swap(staged: Path, folder: Path) -> bool:
    """Exchange by two renames.

    Returns False if the file system refuses; then all is as before.
    """
    old = _set_aside(folder)
    try:
        if folder.exists():
            folder.rename(old)
        staged.rename(folder)
    except OSError:
        if old.exists() and not folder.exists():
            old.rename(folder)
        return False
    shutil.rmtree(old, ignore_errors=True)
    return True


@contextlib.contextmanager
def made_parents(folder: Path) -> Iterator[None]:
    """Make the folders above; they vanish again if the block fails."""
    missing = [path for path in folder.parents if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 digest of a file.

    The file is mapped, so that its pages are shared with later readers. It is read as a stream
    where mappings do not work.
    """
    with path.open("rb") as stream:
        try:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # no mappings on this file system; an empty file
            return hashlib.file_digest(stream, "sha256").hexdigest()
        with data, memoryview(data) as view:
            return hashlib.sha256(view).hexdigest()

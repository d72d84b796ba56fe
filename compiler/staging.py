"""Where a bundle may be written: never over something else, never by two builds at once, never half."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from trimode.errors import BuildError, UsageError
from trimode.files import recover, staged_replacement
from trimode.runtime.manifest import MANIFEST


@contextlib.contextmanager
def staged_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` when the block ends well and vanishes when it does not.

    Raises:
        UsageError: ``output`` exists and ``force`` is not given, or it is no bundle and so is never replaced.
        BuildError: another build is writing the same output, or the disk is full or not writable.
    """
    output = output.absolute()
    with _disk_errors(output):
        check_destination(output, force=force)
        output.parent.mkdir(parents=True, exist_ok=True)
        with _lock(output):
            recover(output)
            check_destination(output, force=force)
            with staged_replacement(output) as staging:
                yield staging


def check_destination(output: Path, *, force: bool) -> None:
    """Refuse an existing output unless it is a bundle and ``force`` is given."""
    if not output.exists():
        return
    if not (output / MANIFEST).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output}: expected a new folder or a bundle, found something else", "choose another output; it will not be touched")
    if not force and (output / MANIFEST).is_file():
        raise UsageError(f"{output}: expected a new folder, found a bundle", "pass --force to replace it")


def check_space(output: Path, num_bytes: int) -> None:
    """Fail before writing when the disk of ``output`` cannot hold ``num_bytes``."""
    free = shutil.disk_usage(output.absolute().parent).free
    if free < num_bytes:
        found = f"{output}: expected {num_bytes / 1e6:.1f} MB of free disk, found {free / 1e6:.1f} MB"
        raise BuildError(found, "free some space or choose another disk")


@contextlib.contextmanager
def _lock(output: Path) -> Iterator[None]:
    lock = FileLock(output.parent / f".{output.name}.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        found = f"{output}: expected to be alone, found another build writing there"
        raise BuildError(found, "wait for it to end, or choose another output") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            found = f"{output}: expected room for the bundle, found the disk full"
            raise BuildError(found, "free some space or choose another disk; nothing was left behind") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            found = f"{error.filename or output}: expected to be able to read and write, found: {error.strerror}"
            raise BuildError(found, "check the path and its permissions") from error
        raise

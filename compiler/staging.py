"""Where a bundle may be written: never over something else, never by two builds at once, never half."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from trimode.errors import BuildError, UsageError
from trimode.files import recover, staged_replacement
from trimode.runtime.bundle import read_manifest
from trimode.runtime.manifest import MANIFEST, Manifest

_ADDITION = ".partial-"


@contextlib.contextmanager
def staged_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` when the block ends well and vanishes when it does not.

    Raises:
        UsageError: ``output`` exists and ``force`` is not given, or it is no bundle and so is never replaced.
        BuildError: another build is writing the same output, or the disk is full or not writable.
    """
    output = output.absolute()
    with _disk_errors(output):
        _check_free(output, force=force)
        output.parent.mkdir(parents=True, exist_ok=True)
        with _lock(output):
            recover(output)
            _check_free(output, force=force)
            with staged_replacement(output) as staging:
                yield staging


@contextlib.contextmanager
def added_to_bundle(output: Path, base: Manifest, rest: Manifest, folders: list[str]) -> Iterator[Path]:
    """Yield an empty folder whose files become part of the bundle when the block ends well, the manifest last.

    ``base`` is the bundle's manifest as the build was planned on it. ``folders`` are those of the targets that are added: they take the place
    of what is there. ``rest`` describes the bundle without these targets: it holds while their files are being replaced, so that a bundle
    which is interrupted there lacks them and has nothing half. Other files than theirs must be new to the bundle.

    Raises:
        BuildError: another build is writing the same bundle or has changed it since, or the disk is full or not writable.
    """
    output = output.absolute()
    with _disk_errors(output), _lock(output):
        if read_manifest(output) != base:  # planned before the lock was taken: writing now would undo what was added since
            raise BuildError(f"{output}: expected the bundle as it was read, found that another build has changed it", "run the build again")
        for leftover in output.glob(f"{_ADDITION}*"):  # of a build that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        staged = Path(tempfile.mkdtemp(prefix=_ADDITION, dir=output))
        try:
            yield staged
            _publish(staged, output, rest, folders)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def check_destination(output: Path) -> None:
    """Refuse an existing output unless it is a bundle or an empty folder."""
    if output.exists() and not (output / MANIFEST).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output}: expected a new folder or a bundle, found something else", "choose another output; it will not be touched")


def check_space(output: Path, num_bytes: int) -> None:
    """Fail before writing when the disk of ``output`` cannot hold ``num_bytes``."""
    free = shutil.disk_usage(output.absolute().parent).free
    if free < num_bytes:
        found = f"{output}: expected {num_bytes / 1e6:.1f} MB of free disk, found {free / 1e6:.1f} MB"
        raise BuildError(found, "free some space or choose another disk")


def _check_free(output: Path, *, force: bool) -> None:
    check_destination(output)
    if (output / MANIFEST).is_file() and not force:
        raise UsageError(f"{output}: expected a new folder, found a bundle", "pass --force to replace it")


def _publish(staged: Path, output: Path, rest: Manifest, folders: list[str]) -> None:
    if any((output / folder).exists() for folder in folders):
        _replace_manifest(output, rest.model_dump_json(indent=1) + "\n")
    for folder in folders:
        new, old = staged / folder, output / folder
        if old.exists():
            shutil.rmtree(old)
        if new.exists():  # a target that runs the portable graphs has no files of its own
            old.parent.mkdir(exist_ok=True)
            new.rename(old)
    for file in staged.iterdir():  # of a precision that is added: nothing knows them before the manifest does
        if file.is_file() and file.name != MANIFEST:
            file.replace(output / file.name)
    _replace_manifest(output, (staged / MANIFEST).read_text(encoding="utf-8"))


def _replace_manifest(output: Path, text: str) -> None:
    new = output / f"{_ADDITION}{MANIFEST}"
    new.write_text(text, encoding="utf-8")
    new.replace(output / MANIFEST)


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

"""Writes bundles whole.

Nothing else is overwritten, no two builds write at once, and nothing is left half done.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from trimode.errors import BuildError, UsageError
from trimode.formats.disk import NO_LOCKS, disk_errors, mount_of
from trimode.formats.files import (
    check_apart,
    check_replaceable,
    made_parents,
    recover,
    staged_replacement,
)
from trimode.formats.manifest import MANIFEST, Manifest
from trimode.formats.places import PARTIAL, companion, nearest_folder, resolved
from trimode.formats.texts import is_whole_text, whole_text
from trimode.runtime.bundle.open import read_manifest

logger = logging.getLogger("trimode.compiler")


@contextlib.contextmanager
def staged_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output``.

    It does so when the block ends well, and vanishes when it does not.

    Raises:
        UsageError: ``output`` exists and ``force`` is not given, or it is no bundle and so is never
            replaced.
        BuildError: another build is writing the same output, or the disk is full or not writable.
    """
    output = resolved(output)
    with disk_errors(output):
        _check_free(output, force=force)
        with made_parents(output), _lock(output):
            recover(output, MANIFEST)
            _check_free(output, force=force)
            with staged_replacement(output, MANIFEST) as staging:
                yield staging


@contextlib.contextmanager
def added_to_bundle(
    output: Path, base: Manifest, rest: Manifest, folders: list[str]
) -> Iterator[Path]:
    """Yield an empty folder whose files join the bundle.

    They do so when the block ends well, the manifest last.

    ``base`` is the bundle's manifest as the build was planned on it. ``folders`` are those of the
    targets that are added: they take the place of what is there. ``rest`` describes the bundle
    without these targets: it holds while their files are being replaced, so that a bundle which is
    interrupted there lacks them and has nothing half. Other files than theirs must be new to the
    bundle.

    Raises:
        BuildError: another build is writing the same bundle or has changed it since, or the disk is
            full or not writable.
    """
    output = resolved(output)
    with disk_errors(output), _lock(output):
        recover(output, MANIFEST)
        # planned before the lock was taken: writing now would undo what was added since
        if read_manifest(output) != base:
            raise BuildError(
                f"{output}: expected the bundle as it was read,"
                " found that another build has changed it",
                "run the build again",
            )
        staged = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=output))
        try:
            yield staged
            _publish(staged, output, rest, folders)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def check_destination(output: Path, checkpoint: Path | None = None, *others: Path | None) -> None:
    """Check, before the work, that a bundle can be written.

    A bundle that is there can be added to.

    Args:
        output: A new folder, an empty one, or a bundle.
        checkpoint: Source of the bundle; the output may not lie in it.
        others: Files and folders that are read.

    Raises:
        UsageError: it is something else, or holds what is read.
        BuildError: nothing can be written there.
    """
    if not is_whole_text(str(resolved(output))):
        raise UsageError(
            f"{whole_text(str(output))}: expected a path in UTF-8, which ONNX's libraries need,"
            " found other bytes",
            "choose another name",
        )
    check_replaceable(output, MANIFEST, "a bundle")
    if checkpoint is not None:
        check_apart(output, checkpoint, *others)


def check_space(output: Path, num_bytes: int) -> None:
    """Fail before writing when the disk of ``output`` cannot hold ``num_bytes``."""
    folder = resolved(output)
    free = shutil.disk_usage(folder if folder.is_dir() else nearest_folder(folder)).free
    if free < num_bytes:
        disk = mount_of(folder)
        raise BuildError(
            f"{output}: expected {num_bytes / 1e6:.1f} MB of free disk,"
            f" found {free / 1e6:.1f} MB ({disk})",
            "free some space or choose another disk",
        )


def _check_free(output: Path, *, force: bool) -> None:
    check_destination(output)
    if (output / MANIFEST).is_file() and not force:
        raise UsageError(
            f"{output}: expected a new folder, found a bundle", "pass `force` to replace it"
        )


def _publish(staged: Path, output: Path, rest: Manifest, folders: list[str]) -> None:
    if any((output / folder).exists() for folder in folders):
        _replace_manifest(output, rest.model_dump_json(indent=1) + "\n")
    for folder in folders:
        new, old = staged / folder, output / folder
        if old.exists():
            shutil.rmtree(old)
        if new.exists():  # a target that runs the portable graphs has no files of its own
            old.parent.mkdir(exist_ok=True)
            shutil.move(new, old)
    # of a precision that is added: nothing knows them before the manifest does
    for file in staged.iterdir():
        if file.is_file() and file.name != MANIFEST:
            _move_over(file, output / file.name)
    _replace_manifest(output, (staged / MANIFEST).read_text(encoding="utf-8"))


def _replace_manifest(output: Path, text: str) -> None:
    new = output / f"{PARTIAL}{MANIFEST}"
    new.write_text(text, encoding="utf-8")
    _move_over(new, output / MANIFEST)


def _move_over(new: Path, old: Path) -> None:
    """In one step, but for file systems that cannot."""
    try:
        new.replace(old)
    except OSError:
        shutil.copyfile(new, old)
        new.unlink()


@contextlib.contextmanager
def _lock(output: Path) -> Iterator[None]:
    lock = FileLock(companion(output, ".lock", is_hidden=True), blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        found = f"{output}: expected to be alone, found another build writing there"
        raise BuildError(found, "wait for it to end, or choose another output") from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        logger.warning(
            "%s: this file system has no locks; see to it that no other build writes there", output
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

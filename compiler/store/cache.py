"""Caches what is slow to make: traced graphs and engines.

An entry's name is the digest of everything that it depends on, so an entry is right or absent,
never stale. Entries appear by renaming, carry a digest of their bytes that is checked on every use,
and are made under a lock: two builds that need the same one make it once.

The cache is a help, never a need. Where it cannot be read or written, one warning says so and the
work goes on without. What is made is made where it is wanted and copied into the cache afterwards,
so that an error of making it is never taken for one of the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimode.formats.disk import what_is_wrong
from trimode.formats.files import sha256_of

DEFAULT_LIMIT_BYTES = 10 * 10**9
_CHUNK_BYTES = 1 << 20

logger = logging.getLogger("trimode.compiler")


def key_of(**facts: Any) -> str:
    """Return a digest of all facts that an entry depends on.

    Values are anything that JSON can hold.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class ContentCache:
    """Keeps files by key in one folder.

    Args:
        folder: Folder of the entries; it is made with the first.
        limit_bytes: Size that :meth:`prune` cuts the cache to; it deletes the entries unused for
            longest.
    """

    def __init__(self, folder: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._has_warned = False

    def fetch(self, key: str, destination: Path, make: Callable[[Path], None]) -> bool:
        """Copy the entry ``key`` to ``destination``.

        Where there is none, ``make(destination)`` writes it first.

        Returns whether it was there. What ``make`` raises goes through, as does what writing
        ``destination`` raises, and leaves neither an entry nor a file.
        """
        with self._locked(key) as is_usable, _nothing_half(destination):
            if is_usable and self._hand_out(self._entry(key), destination):
                return True
            make(destination)
            if is_usable:
                self._keep(self._entry(key), destination)
            return False

    def warn(self, error: OSError, place: Path | None = None) -> None:
        """Say, once, that the cache is of no use.

        ``place`` is what could not be read or written, if the error does not tell.
        """
        if not self._has_warned:
            self._has_warned = True
            reason = what_is_wrong(error, place or self.folder)
            logger.warning(
                "the cache %s cannot be used, the work goes on without it: %s", self.folder, reason
            )

    def prune(self) -> int:
        """Delete the entries unused for longest until the rest fits.

        Returns how many. Entries in use stay.
        """
        try:
            deleted, error = self._delete_oldest(self.limit_bytes)
        except OSError as unreadable:
            deleted, error = 0, unreadable
        if error is not None:
            self.warn(error)
        return deleted

    def clear(self) -> int:
        """Delete every entry that nobody is making; returns how many.

        Raises:
            OSError: one of them cannot be deleted; the others are.
        """
        deleted, error = self._delete_oldest(0)
        if error is not None:
            raise error
        return deleted

    def usage(self) -> tuple[int, int]:
        """Number of entries and their bytes."""
        sizes = [stat.st_size for _, stat in self._entries()]
        return len(sizes), sum(sizes)

    def _entry(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("??/*"):
            if len(path.name) == 64:
                with contextlib.suppress(FileNotFoundError):  # another process prunes too
                    yield path, path.stat()

    def _hand_out(self, entry: Path, destination: Path) -> bool:
        """Copy an entry; False if there is none with the right digest."""
        try:
            wanted = _digest_file(entry).read_bytes()
            source = entry.open("rb")
        except (FileNotFoundError, IsADirectoryError):
            return False
        except OSError as error:
            self.warn(error)
            return False
        with source:
            found = self._copy(source.read, destination)
        if found is None or found.encode() != wanted:
            return False
        with contextlib.suppress(OSError):
            os.utime(entry)  # prune deletes what was used longest ago
        return True

    def _copy(self, read: Callable[[int], bytes], destination: Path) -> str | None:
        """Copy what is read, and return its digest.

        None where reading fails. An error of writing is raised.
        """
        digest = hashlib.sha256()
        with destination.open("wb") as target:
            while True:
                try:
                    chunk = read(_CHUNK_BYTES)
                except OSError as error:
                    self.warn(error)
                    return None
                if not chunk:
                    return digest.hexdigest()
                digest.update(chunk)
                target.write(chunk)

    def _keep(self, entry: Path, made: Path) -> None:
        """Copy what was made into the cache, if that is possible."""
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            # of a process that was killed: nobody else has the lock
            for leftover in entry.parent.glob(f"{entry.name}.*partial"):
                _remove(leftover)
            _put(entry, made)
        except OSError as error:
            self.warn(error)

    def _delete_oldest(self, limit_bytes: int) -> tuple[int, OSError | None]:
        """How many entries were deleted, and why one could not be."""
        entries = sorted(self._entries(), key=lambda item: item[1].st_mtime)
        size = sum(stat.st_size for _, stat in entries)
        deleted, failed = 0, None
        for path, stat in entries:
            if size <= limit_bytes:
                break
            try:
                with self._lock_of(path.name, timeout=0):
                    _remove(_digest_file(path))
                    _remove(path)
            except Timeout:
                continue
            except (NotImplementedError, OSError) as error:
                failed = _as_os_error(error)
                continue
            size -= stat.st_size
            deleted += 1
        return deleted, failed

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[bool]:
        """Hold an entry's lock, and yield whether the cache can be used.

        Without the lock it cannot.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._lock_of(key))
            except (NotImplementedError, OSError) as error:
                self.warn(_as_os_error(error))
                is_usable = False
            else:
                is_usable = True
            yield is_usable

    def _lock_of(self, key: str, timeout: float = -1) -> FileLock:
        """Give the lock of a key.

        Locks are shared by keys with the same first two digits and never deleted: a deleted lock
        can be held twice.
        """
        folder = self.folder / key[:2]
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / "lock", timeout=timeout)


@contextlib.contextmanager
def _nothing_half(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if path.is_file():  # nothing else is ever taken away: it may be a device
            path.unlink()
        raise


def _put(entry: Path, made: Path) -> None:
    handle, name = tempfile.mkstemp(prefix=f"{entry.name}.", suffix=".partial", dir=entry.parent)
    os.close(handle)
    partial = Path(name)
    try:
        shutil.copyfile(made, partial)
        for damaged in (entry, _digest_file(entry)):
            if damaged.is_dir():  # a file cannot be renamed over it
                shutil.rmtree(damaged)
        _digest_file(entry).write_text(sha256_of(partial), encoding="utf-8")
        partial.replace(entry)
    finally:
        partial.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _as_os_error(error: Exception) -> OSError:
    return error if isinstance(error, OSError) else OSError(str(error))


def _digest_file(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.sha256")

"""A content-addressed cache of what is slow to make: traced graphs and engines.

An entry's name is the digest of everything that it depends on, so an entry is right or absent, never stale. Entries appear by renaming,
carry a digest of their bytes that is checked on every use, and are made under a lock: two builds that need the same one make it once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimode.runtime.bundle import sha256_of

DEFAULT_LIMIT_BYTES = 10 * 10**9


def key_of(**facts: Any) -> str:
    """Digest of everything an entry depends on; values are anything JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class ContentCache:
    """Files by key in one folder.

    Args:
        folder: where entries lie; made when the first is.
        limit_bytes: :meth:`prune` deletes the entries unused for longest until the rest is smaller.
    """

    def __init__(self, folder: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def fetch(self, key: str, destination: Path, make: Callable[[Path], None]) -> bool:
        """Copy the entry ``key`` to ``destination``; where there is none, ``make(path)`` writes it first.

        Returns whether it was there. What ``make`` raises goes through, and leaves no entry.
        """
        with self._locked(key):
            entry = self._entry(key)
            found = self._is_whole(entry)
            if not found:
                self._fill(entry, make)
            os.utime(entry)  # prune deletes what was used longest ago
            shutil.copyfile(entry, destination)
        return found

    def prune(self) -> int:
        """Delete the entries unused for longest until the rest fits the limit; returns how many. Entries in use stay."""
        entries = sorted(self._entries(), key=lambda item: item[1].st_mtime)
        size = sum(stat.st_size for _, stat in entries)
        deleted = 0
        for path, stat in entries:
            if size <= self.limit_bytes:
                break
            with contextlib.suppress(Timeout), self._locked(path.name, timeout=0):
                _digest_file(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                size -= stat.st_size
                deleted += 1
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

    def _is_whole(self, entry: Path) -> bool:
        try:
            return _digest_file(entry).read_text() == sha256_of(entry)
        except FileNotFoundError:
            return False

    def _fill(self, entry: Path, make: Callable[[Path], None]) -> None:
        for leftover in entry.parent.glob(f"{entry.name}.partial*"):  # of a process that was killed: nobody else has the lock
            leftover.unlink()
        partial = entry.with_name(f"{entry.name}.partial")
        try:
            make(partial)
            _digest_file(entry).write_text(sha256_of(partial))
            partial.rename(entry)
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, key: str, timeout: float = -1) -> Iterator[None]:
        """Locks are shared by keys with the same first two digits and never deleted: a deleted lock can be held twice."""
        folder = self.folder / key[:2]
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=timeout):
            yield


def _digest_file(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.sha256")

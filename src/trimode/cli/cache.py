"""Implements ``trimode cache``: lists the cache, and clears it."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout

from trimode.cli.options.shared import Json
from trimode.cli.parse import need
from trimode.errors import UsageError


def cache(
    *,
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete all entries but timings and those being made.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show or clear the cache of graphs, engines, arranged weights and timings."""
    need("the compiler", "compile", "filelock")

    show_cache(clear=clear, as_json=as_json)


def show_cache(*, clear: bool, as_json: bool) -> None:
    """Print folder, entries and bytes of the cache by kind.

    With ``clear``, first delete the entries that nobody is making.

    Raises:
        UsageError: the cache cannot be read or cleared.
    """
    from trimode.cli.output import print_json
    from trimode.formats.texts import whole_text

    folder, deleted, kinds = _look(clear=clear)
    count, num_bytes = (sum(of_kind) for of_kind in zip(*kinds.values(), strict=True))
    if as_json:
        by_kind = {
            kind.replace(" ", "_"): {"entries": n, "num_bytes": b} for kind, (n, b) in kinds.items()
        }
        facts = {
            "folder": str(folder),
            "entries": count,
            "num_bytes": num_bytes,
            "kinds": by_kind,
            "deleted": deleted,
        }
        print_json(facts)
        return
    sys.stdout.write(
        f"{whole_text(str(folder))}: {_in_words(count, num_bytes)}"
        + (f", {deleted} deleted" if clear else "")
        + "\n"
    )
    for kind, usage in kinds.items():
        if usage[0]:
            sys.stdout.write(f"  {kind}: {_in_words(*usage)}\n")


def _look(*, clear: bool) -> tuple[Path, int, dict[str, tuple[int, int]]]:
    """Return the folder, the number of deleted entries, and usage by kind.

    The usage of a kind is its number of entries and their bytes.
    """
    from trimode.compiler.store.cache import ContentCache
    from trimode.formats.texts import reason_of
    from trimode.runtime.bundle.cache_folder import TIMINGS, default_folder

    place = "the cache"
    try:
        folder = default_folder()
        place = f"{folder}"
        if folder.exists():
            list(folder.iterdir())  # a folder that may not be read looks empty to a search
        deleted = _clear(folder) if clear else 0
        kinds = {
            "graphs and engines": ContentCache(folder).usage(),
            "arranged weights": _usage(_arranged(folder)),
            "timings": _usage((folder / TIMINGS).glob("*.json")),
        }
    except (OSError, NotImplementedError) as error:
        found = (
            f"{place}: expected a folder that can be read and written, found: {reason_of(error)}"
        )
        raise UsageError(
            found, "check its permissions, or name another folder by TRIMODE_CACHE"
        ) from error
    return folder, deleted, kinds


def _clear(folder: Path) -> int:
    """Delete all but timings; return the number of entries.

    Timings take minutes of a quiet machine and hardly a byte.
    """
    from trimode.compiler.store.cache import ContentCache

    deleted = ContentCache(folder).clear()
    for entry in list(_arranged(folder)):
        with (
            contextlib.suppress(Timeout),
            FileLock(entry.with_name(f"{entry.name}.lock"), timeout=0),
        ):
            shutil.rmtree(entry)  # processes that have it open keep what they have mapped
            deleted += 1
    return deleted


def _arranged(folder: Path) -> Iterable[Path]:
    from trimode.runtime.bundle.cache_folder import PREPACKED

    return (entry for entry in (folder / PREPACKED).glob("?" * 64) if entry.is_dir())


def _usage(entries: Iterable[Path]) -> tuple[int, int]:
    """Count entries, files or folders of files, and their bytes."""
    sizes = [
        sum(path.stat().st_size for path in (entry, *entry.glob("*")) if path.is_file())
        for entry in entries
    ]
    return len(sizes), sum(sizes)


def _in_words(count: int, num_bytes: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}, {num_bytes / 1e6:.1f} MB"

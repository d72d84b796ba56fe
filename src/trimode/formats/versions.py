"""Says which versions of Python and of libraries are here, for records and digests."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

PYTHON = "python"


def version_of(name: str) -> str | None:
    """Version of a distribution, or of Python itself; None where it is not installed."""
    if name == PYTHON:
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions by name, in the order given; what is not installed is left out."""
    found = ((name, version_of(name)) for name in names)
    return {name: version for name, version in found if version is not None}

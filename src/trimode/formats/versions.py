"""Finds the versions of Python and of libraries."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

PYTHON = "python"


def version_of(name: str) -> str | None:
    """Return a distribution's version, or Python's; None if it is not installed."""
    if name == PYTHON:
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions by name, in the order given, of what is installed."""
    found = ((name, version_of(name)) for name in names)
    return {name: version for name, version in found if version is not None}

"""Loads llguidance, which is an optional extra."""

from __future__ import annotations

from types import ModuleType

from trimode.errors import DependencyError


def load_llguidance() -> ModuleType:
    """Import the library.

    Raises:
        DependencyError: it is not installed, or does not load.
    """
    try:
        import llguidance
    except ImportError as error:
        raise DependencyError(
            "expected llguidance for structured outputs, found not installed",
            "pip install 'trimode[grammar]'",
        ) from error
    return llguidance

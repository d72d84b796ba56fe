"""Where what is made for this machine is kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path

PREPACKED, TIMINGS = "prepacked", "timings"
"""Folders in it: of weights prepacked for this processor, and of measured forwards. The compiler
keeps graphs and engines beside them.
"""

logger = logging.getLogger("trimode.runtime")


def default_folder() -> Path:
    """``$TRIMODE_CACHE``, or the user's cache folder by the XDG convention.

    Raises:
        OSError: the user has no home.
    """
    if chosen := os.environ.get("TRIMODE_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimode"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def usual_folder() -> Path | None:
    """:func:`default_folder`; where there is none, None, and a warning."""
    try:
        return default_folder()
    except OSError as error:
        logger.warning(
            "nothing is kept for the next time, TRIMODE_CACHE would name a place: %s", error
        )
        return None

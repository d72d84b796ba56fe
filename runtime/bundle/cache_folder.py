"""Finds the folder for files that are made for this machine."""

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
    """Return ``$TRIMODE_CACHE``, or the user's cache folder (XDG).

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
    """Return :func:`default_folder`; if there is none, warn and return None."""
    try:
        return default_folder()
    except OSError as error:
        logger.warning(
            "nothing is kept for the next time, TRIMODE_CACHE would name a place: %s", error
        )
        return None

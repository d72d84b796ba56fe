"""Checks the size of a batch, and each prompt's options."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimode.errors import UsageError
from trimode.runtime.sessions.base import BatchSession, Session

DEFAULT_BATCH = 8
_ROW_OPTIONS = ("seed", "max_new_tokens")
"""Options of which each prompt of a batch may have its own value."""


def check_batches(session: Session) -> BatchSession:
    """Return the session; raise :class:`UsageError` where it runs single texts only."""
    if isinstance(session, BatchSession):
        return session
    raise UsageError(
        "expected a session that runs several texts in one forward, found one that does not",
        "open the bundle's targets instead",
    )


def check_max_rows(max_rows: int | None, most: int | None, target: str) -> int:
    """Decide how many rows a batch has.

    Args:
        max_rows: Number that the caller asks for; None = 8, or the target's limit.
        most: Limit of the target; None = it has none.
        target: Name of the target, for the message.

    Raises:
        UsageError: the number is below 1, or more than the target was built for.
    """
    if max_rows is None:
        max_rows = DEFAULT_BATCH if most is None else min(DEFAULT_BATCH, most)
    if max_rows < 1:
        raise UsageError(
            f"expected a batch of at least 1 row, found {max_rows}",
            "ask for as many rows as texts are to run side by side",
        )
    if most is not None and max_rows > most:
        limit = f"at most {most} rows, which target {target} was built for"
        raise UsageError(
            f"expected a batch of {limit}, found {max_rows}",
            "build the target with a larger `max_batch`, or choose one that runs on ONNX Runtime",
        )
    return max_rows


def options_by_prompt(options: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Give each of ``count`` prompts its own options.

    Raises:
        UsageError: a list of values has another number of them than there are prompts.
    """
    chosen = [dict(options) for _ in range(count)]
    for name in _ROW_OPTIONS:
        if isinstance(options.get(name), list | tuple | np.ndarray):
            _check_list(name, options[name], count)
            for row, value in zip(chosen, options[name], strict=True):
                row[name] = value
    return chosen


def _check_list(name: str, values: Any, count: int) -> None:
    if np.ndim(values) != 1:
        raise UsageError(
            f"{name}: expected one number a prompt, found {np.ndim(values)} dimensions",
            "pass a flat list",
        )
    if len(values) != count:
        raise UsageError(
            f"expected one {name}, or one a prompt ({count}), found {len(values)}",
            "pass as many as there are prompts",
        )

"""Reads the values of options that are lists or names, and says which library a command lacks."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, cast

from trimode.errors import DependencyError, UsageError

if TYPE_CHECKING:
    from trimode.formats.contract import Mode


def need(what: str, extra: str, *modules: str) -> None:
    """Raise :class:`DependencyError` where a library is missing that ``what`` needs; ``extra``
    brings it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"expected {', '.join(missing)} for {what}, found not installed",
            f"pip install 'trimode[{extra}]'",
        )


def parse_optional_ints(text: str | None) -> tuple[int, ...] | None:
    """As :func:`parse_ints`; None stays None."""
    return None if text is None else tuple(parse_ints(text))


def parse_ints(text: str) -> list[int]:
    """``"1,2,3"`` -> ``[1, 2, 3]``."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(
            f"expected whole numbers like 1,2,3, found {text!r}", "separate them by commas"
        ) from error


def parse_modes(text: str) -> tuple[Mode, ...]:
    """``ar,linear-spec`` -> modes; unknown ones are left for :meth:`QualitySettings.check`."""
    return cast(
        "tuple[Mode, ...]",
        tuple(part.strip().replace("-", "_") for part in text.split(",") if part.strip()),
    )


def parse_mode(text: str) -> Mode:
    """``linear-spec`` -> ``linear_spec``; raises :class:`UsageError` for anything that is no
    mode.
    """
    from trimode.runtime.decode.algorithms import MODES

    for mode in MODES:
        if text == mode.replace("_", "-"):
            return mode
    raise UsageError(
        f"expected --mode {', '.join(m.replace('_', '-') for m in MODES)}, found {text!r}",
        "choose one of these",
    )

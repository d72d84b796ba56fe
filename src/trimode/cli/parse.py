"""Parses option values, and says which library a command lacks."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, cast

from trimode.errors import DependencyError, UsageError

if TYPE_CHECKING:
    from trimode.formats.contract import Mode


def need(what: str, extra: str, *modules: str) -> None:
    """Raise :class:`DependencyError` if a library is missing.

    Args:
        what: Thing that needs the libraries, for the message.
        extra: Extra of the package that installs them.
        modules: Names of the modules.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"expected {', '.join(missing)} for {what}, found not installed",
            f"pip install 'trimode[{extra}]'",
        )


def given(**values: Any) -> dict[str, Any]:
    """Return the options that were given: those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def parse_optional_ints(text: str | None) -> tuple[int, ...] | None:
    """Parse as :func:`parse_ints`; None stays None."""
    return None if text is None else tuple(parse_ints(text))


def parse_ints(text: str) -> list[int]:
    """Parse ``"1,2,3"`` into ``[1, 2, 3]``."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(
            f"expected whole numbers like 1,2,3, found {text!r}", "separate them by commas"
        ) from error


def parse_floats(text: str) -> list[float]:
    """Parse ``"0.5,2"`` into ``[0.5, 2.0]``."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(
            f"expected numbers like 0.5,2, found {text!r}", "separate them by commas"
        ) from error


def parse_biases(texts: list[str] | None) -> dict[int, float] | None:
    """Parse ``["11=-100", "12=2.5"]`` of ``--logit-bias``; None stays None.

    Raises:
        UsageError: a text is no such pair, or a token comes twice.
    """
    if texts is None:
        return None
    biases: dict[int, float] = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            found = int(token), float(bias)
        except ValueError as error:
            raise UsageError(
                f"expected --logit-bias ID=X like 11=-100, found {text!r}",
                "name a token id and a number",
            ) from error
        if found[0] in biases:
            raise UsageError(
                f"expected one --logit-bias for each token, found two for {found[0]}",
                "leave one out",
            )
        biases[found[0]] = found[1]
    return biases


def parse_names(text: str) -> tuple[str, ...]:
    """Parse ``"ar, draft"`` into ``("ar", "draft")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_modes(text: str) -> tuple[Mode, ...]:
    """Parse ``ar,linear-spec``; :meth:`QualitySettings.check` refuses unknown modes."""
    return cast("tuple[Mode, ...]", parse_names(text.replace("-", "_")))


def parse_mode(text: str) -> Mode:
    """Parse ``linear-spec`` into ``linear_spec``.

    Raises:
        UsageError: the text names no mode.
    """
    from trimode.runtime.decode.algorithms import MODES

    for mode in MODES:
        if text == mode.replace("_", "-"):
            return mode
    raise UsageError(
        f"expected --mode {', '.join(m.replace('_', '-') for m in MODES)}, found {text!r}",
        "choose one of these",
    )

"""Reads the JSON files of a checkpoint.

Every key is accounted for, and the type of each field is checked.

A table has one entry a key. The key is *understood* (other code reads it), *neutral* (it cannot
change what is computed here), or refused unless it has one value. What no table knows is refused,
so nothing that changes the computation passes unseen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimode.errors import CheckpointError
from trimode.formats.texts import Unreadable, read_json

MOST_INTEGER = 2**31 - 1
_MOST_FLOAT32 = 3.4028234663852886e38
_MOST_SHOWN = 80
_MOST_NAME = 200


@dataclass(frozen=True)
class Key:
    """Says what becomes of a key.

    Attributes:
        kind: ``understood``: other code reads it. ``neutral``: its value does not matter.
            ``only``: it is refused unless its value is one of ``allowed``.
        reason: Reason in one phrase that can stand in a hint.
        allowed: Values of ``only`` besides null, which passes for an absent key.
    """

    kind: Literal["understood", "neutral", "only"]
    reason: str
    allowed: tuple[Any, ...] = ()


KeyTable = Mapping[str, Key]


def understood(reason: str, *names: str) -> dict[str, Key]:
    """Entries of keys that are read."""
    return dict.fromkeys(names, Key("understood", reason))


def neutral(reason: str, *names: str) -> dict[str, Key]:
    """Entries of keys whose value does not matter."""
    return dict.fromkeys(names, Key("neutral", reason))


def only(reason: str, **allowed: Any) -> dict[str, Key]:
    """Entries of keys that may have only the values given."""
    return {
        name: Key("only", reason, value if isinstance(value, tuple) else (value,))
        for name, value in allowed.items()
    }


def check_keys(values: Mapping[str, Any], table: KeyTable, where: str, advice: str) -> None:
    """Refuse each key that is unknown or would change the computation.

    ``null`` means "not set" in these files, so it passes wherever an absent key would.

    Args:
        values: Object to check.
        table: Entries of the keys that are known.
        where: File (and field) for messages.
        advice: Next step after a refusal, in one phrase.

    Raises:
        CheckpointError: a key is refused; it is named.
    """
    for name, value in values.items():
        if value is None:
            continue
        key = table.get(name)
        if key is None:
            raise CheckpointError(
                f"{where}: expected keys that trimode knows, found {named(name)}",
                "remove the key if it does not change what the model computes; else use a "
                "newer trimode",
            )
        if key.kind == "only" and not any(_same(value, one) for one in key.allowed):
            expected = " or ".join(map(shown, key.allowed)) or "null"
            raise CheckpointError(
                f"{where}: expected {name} to be {expected}, found {shown(value)}",
                f"{key.reason}; {advice}",
            )


class Fields:
    """Reads the fields of a JSON object and checks their types.

    Errors name file and field.
    """

    def __init__(self, values: Mapping[str, Any], where: str, advice: str) -> None:
        self.values = values
        self.where = where
        self.advice = advice

    def integer(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = MOST_INTEGER
    ) -> int:
        """A whole number written as one: neither ``true`` nor ``32.0``."""
        value = self.values.get(name, default)
        if not is_integer(value) or not least <= value <= most:
            bound = f"a whole number of at least {least}"
            if is_integer(value) and value > most:
                bound = f"a whole number up to {most}"
            raise self.wrong(name, bound, value)
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """Read a number that float32 holds; null is refused."""
        value = self.values.get(name, default)
        if not is_number(value):
            raise self.wrong(name, "a number", value)
        return float(value)

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        """A number that float32 holds; null and an absent one are ``default``."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is not None and not is_number(value):
            raise self.wrong(name, "a number", value)
        return None if value is None else float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        """``true`` or ``false``; null and an absent one are ``default``."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return default if value is None else value

    def wrong(self, name: str, expected: str, found: Any) -> CheckpointError:
        """The error for a field with a wrong value."""
        text = "nothing" if found is None else shown(found)
        return CheckpointError(
            f"{self.where}: expected {name} to be {expected}, found {text}", self.advice
        )


def is_integer(value: Any) -> bool:
    """Whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that float32 holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_MOST_FLOAT32 <= value <= _MOST_FLOAT32


def shown(value: Any) -> str:
    """A JSON value for a message, cut where it is long."""
    if isinstance(value, list | dict) and len(value) > _MOST_SHOWN:
        return f"{type(value).__name__} of {len(value)}"
    try:
        text = json.dumps(value)
    except RecursionError:
        return f"a deep {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def named(name: str) -> str:
    """Show a name from a file in a message.

    It is written as JSON if a terminal could not show it in one line.
    """
    return name if name.isprintable() and len(name) <= _MOST_NAME else shown(name)


def read_object(path: Path, missing_hint: str) -> dict[str, Any]:
    """Read a JSON object whose names are unique.

    Raises:
        CheckpointError: the file is missing, not readable, or no such object.
    """
    try:
        values = read_json(path, unique=True)
    except Unreadable as error:
        if error.is_missing:
            raise CheckpointError(
                f"{path}: expected a file, found {nothing_at(path)}", missing_hint
            ) from error
        raise CheckpointError(
            f"{path}: expected a JSON file, found one that cannot be read ({error.reason})",
            "download the file again",
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(values).__name__}",
            "download the file again",
        )
    return values


def nothing_at(path: Path) -> str:
    """Describe the place of a file that cannot be opened."""
    return "a link to a file that is not there" if path.is_symlink() else "none"


def _same(value: Any, other: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, but neither is ``true``."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return bool(value == other)

"""Reads and writes text and JSON, checked at every border.

Whatever is wrong with a file (absent, unreadable, not UTF-8, nested too deep, a number of thousands
of digits) comes out as one kind of exception, :class:`Unreadable`, whose text is a reason in one
line. The caller knows what the file is for, and says the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Unreadable(Exception):  # noqa: N818  (a reason to be worded by the caller, not an error that reaches a user)
    """Says that a text cannot be used.

    Attributes:
        reason: Reason in one line.
        is_missing: True if there is no file at all.
    """

    def __init__(self, reason: str, *, is_missing: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_missing = is_missing


def read_text(path: Path) -> str:
    """Read a UTF-8 file whole, without a byte order mark.

    Line ends stay as they are.

    Raises:
        Unreadable: the file is missing, may not be read, or is not UTF-8.
    """
    return decode_text(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Read a file whole.

    Raises:
        Unreadable: the file is missing or may not be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Unreadable("there is no such file", is_missing=True) from error
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL byte
        raise Unreadable(reason_of(error)) from error


def decode_text(raw: bytes) -> str:
    """Decode UTF-8, dropping a byte order mark.

    Raises:
        Unreadable: the bytes are not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is not UTF-8 (byte {error.start})") from error


def read_json(path: Path, *, unique: bool = False) -> Any:
    """Read a JSON file, with or without a byte order mark.

    ``unique`` is as for :func:`parse_json`.

    Raises:
        Unreadable: the file cannot be read or is not JSON.
    """
    return parse_json(read_text(path), unique=unique)


def parse_json(text: str, *, unique: bool = False) -> Any:
    """Parse JSON as RFC 8259 has it: ``NaN`` and ``Infinity`` are refused.

    Args:
        text: JSON.
        unique: Whether a name that an object has twice is refused too; otherwise its last value
            counts.

    Raises:
        Unreadable: the text is not JSON, or Python's parser gives it up.
    """
    try:
        return json.loads(
            text,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_names if unique else None,
        )
    except RecursionError as error:
        raise Unreadable("it is nested too deep") from error
    except json.JSONDecodeError as error:
        raise Unreadable(f"{error.msg} (line {error.lineno}, column {error.colno})") from error
    except ValueError as error:  # int() of thousands of digits
        raise Unreadable("a number has too many digits") from error


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    r"""Yield the number and text of each line that is not blank.

    Numbers count from 1. Only ``\n`` ends a line: JSON may hold U+2028, U+0085 and their like as
    they are (https://jsonlines.org).
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """Write a value as JSON that any parser reads.

    What is no finite number becomes null, and half a surrogate pair becomes U+FFFD, as it does in
    UTF-8 decoders.
    """
    return whole_text(
        json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)
    )


def is_whole_text(text: str) -> bool:
    """Tell whether a text can be written in UTF-8.

    It cannot if it has half of a surrogate pair.
    """
    return not any(map(_is_surrogate, text))


def whole_text(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair."""
    return "".join("\ufffd" if _is_surrogate(character) else character for character in text)


def name_of(path: Path) -> str:
    """Return the last part of a path, with links followed.

    It can be recorded: U+FFFD stands for what is not UTF-8.
    """
    return whole_text(path.resolve().name)


def reason_of(error: BaseException) -> str:
    """Describe an exception in one line.

    For an :class:`OSError` it is the system's text, else the first line.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _first_line(error)


def _is_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _refuse_constant(name: str) -> Any:
    raise Unreadable(f"{name} is not JSON")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise Unreadable(f"it has {json.dumps(name)} twice")
        values[name] = value
    return values


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value

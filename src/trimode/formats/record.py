"""Declares what all records share, and reads them.

A record is a JSON file of a declared form, or a part of one. Anyone may have changed or damaged the
file since it was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from trimode.formats.texts import Unreadable, parse_json, read_text, reason_of


class Record(BaseModel):
    """Holds one record, which cannot change and takes no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid")


R = TypeVar("R", bound=Record)


class OtherVersion(Unreadable):
    """Says that a record is of another schema.

    Attributes:
        found: Version of the record.
    """

    def __init__(self, expected: Sequence[int], found: int) -> None:
        numbers = " or ".join(map(str, expected))
        super().__init__(f"expected schema version {numbers}, found {found}")
        self.found = found


def read_record(path: Path, kind: type[R], versions: Sequence[int]) -> R:
    """Read a JSON file as a record that says its ``schema_version``.

    Raises:
        OtherVersion: it is of none of ``versions``.
        Unreadable: it is missing, may not be read, is not JSON or not of the form.
    """
    text = read_text(path)
    version = _version_of(parse_json(text))
    if version is not None and version not in versions:
        raise OtherVersion(versions, version)
    try:
        return kind.model_validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        raise Unreadable(first_fault(error)) from error


def first_fault(error: ValidationError) -> str:
    """Describe the first wrong value in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    reason = reason_of(ValueError(first["msg"]))
    return f"{place}: {reason}" if place else reason


def _version_of(values: Any) -> int | None:
    version = values.get("schema_version") if isinstance(values, dict) else None
    return version if isinstance(version, int) and not isinstance(version, bool) else None

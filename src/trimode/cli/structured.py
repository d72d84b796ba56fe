"""Reads the options that say what an answer follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimode.cli.parse import given, need
from trimode.errors import UsageError
from trimode.formats.texts import Unreadable, read_text

_FLAGS = {
    "json": "--json-schema",
    "regex": "--regex",
    "choice": "--choice",
    "grammar": "--grammar",
    "json_object": "--json-object",
}


def structured_outputs(
    json_schema: str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: Path | None,
    *,
    json_object: bool,
    compact: bool,
    after_thinking: bool,
) -> dict[str, Any] | None:
    """Return what an answer has to follow; None where nothing was asked.

    Raises:
        UsageError: several were given, or a file cannot be read.
        DependencyError: llguidance is not installed.
    """
    asked = given(
        json=json_schema,
        regex=regex,
        choice=choice,
        grammar=grammar,
        json_object=json_object or None,
    )
    if not asked:
        if compact or after_thinking:
            name = "--compact" if compact else "--after-thinking"
            raise UsageError(
                f"expected {name} together with a schema or grammar, found it alone",
                "leave it out",
            )
        return None
    if len(asked) > 1:
        found = " and ".join(_FLAGS[name] for name in asked)
        raise UsageError(
            f"expected one of {', '.join(_FLAGS.values())}, found {found}", "leave one out"
        )
    if "grammar" in asked:
        asked["grammar"] = _read(Path(asked["grammar"]), "--grammar")
    if "json" in asked and not asked["json"].lstrip().startswith("{"):
        asked["json"] = _read(Path(asked["json"]), "--json-schema")
    need("structured outputs", "grammar", "llguidance")
    return {**asked, "disable_any_whitespace": compact, "after_thinking": after_thinking}


def _read(path: Path, flag: str) -> str:
    try:
        return read_text(path)
    except Unreadable as error:
        raise UsageError(
            f"{path}: expected a file for {flag}, found: {error.reason}", "check the path"
        ) from error

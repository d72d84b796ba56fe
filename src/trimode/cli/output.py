"""Prints JSON on stdout, whatever the terminal's encoding."""

from __future__ import annotations

import codecs
import json
import re
import sys
from typing import Any

from pydantic import BaseModel

from trimode.formats.texts import dump_json, whole_text

_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Print a value, or a record, as JSON at once.

    A line end follows. If stdout is not in UTF-8, what is beyond ASCII is escaped.
    """
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = dump_json(plain, indent=indent)
    if codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8":
        text = _BEYOND_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def command_line() -> str:
    """Return what was typed, with U+FFFD for what is not UTF-8."""
    return whole_text(" ".join(["trimode", *sys.argv[1:]]))

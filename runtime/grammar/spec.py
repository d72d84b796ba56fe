"""Reads what an answer has to follow, as a caller gives it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from trimode.errors import UsageError

MOST_BYTES = 65_536
"""Longest schema, expression or grammar."""
MOST_DEPTH = 64
"""Most lists and objects of a schema inside each other."""
MOST_CHOICES = 4_096
KINDS = ("json", "regex", "choice", "grammar", "json_object")
_HINT = f"pass one of {', '.join(KINDS)}"


@dataclass(frozen=True)
class StructuredOutputs:
    """Says what an answer has to follow; the names are vLLM's.

    Exactly one of the first five is given.

    Attributes:
        json: JSON schema, as a mapping or as text.
        regex: Regular expression that the whole answer matches; without look-around.
        choice: Texts, one of which is the answer.
        grammar: Context-free grammar, in Lark's form, or in GBNF.
        json_object: True = any JSON object.
        disable_any_whitespace: Whether JSON is written without blanks and line breaks.
        whitespace_pattern: Expression for blanks of JSON; None = nothing, one blank, or a line
            break and up to 32 blanks.
        after_thinking: Whether the answer begins after the token that ends thinking. Any text but
            the end may come before it.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    after_thinking: bool = False


def read_structured_outputs(value: Any) -> StructuredOutputs:
    """Read what a caller gives: the object, or a mapping.

    A mapping has the object's attributes.

    Returns:
        Object with the schema as compact text and the choices as a tuple.

    Raises:
        UsageError: it is neither, or a value is wrong, too long or too deep.
    """
    if isinstance(value, Mapping):
        value = _from_mapping(value)
    if isinstance(value, StructuredOutputs) and type(value) is not StructuredOutputs:
        return value  # compiled, so it was read before
    if not isinstance(value, StructuredOutputs):
        raise UsageError(
            f"structured_outputs: expected a mapping, found {type(value).__name__}", _HINT
        )
    _check_flags(value)
    kind = _kind(value)
    read = {"json": _schema, "choice": _choices}.get(kind, _text)
    content = True if kind == "json_object" else read(kind, getattr(value, kind))
    if value.whitespace_pattern is not None:
        _text("whitespace_pattern", value.whitespace_pattern)
    rest: dict[str, Any] = {
        one.name: getattr(value, one.name)
        for one in fields(StructuredOutputs)
        if one.name not in KINDS
    }
    rest[kind] = content
    return StructuredOutputs(**rest)


def _from_mapping(given: Mapping[Any, Any]) -> StructuredOutputs:
    known = [one.name for one in fields(StructuredOutputs)]
    for name in given:
        if name not in known:
            raise UsageError(
                f"structured_outputs: expected {', '.join(known)}, found {str(name)[:40]!r}", _HINT
            )
    return StructuredOutputs(**given)


def _kind(value: StructuredOutputs) -> str:
    given = [kind for kind in KINDS if getattr(value, kind) is not None]
    if given == ["json_object"] and not value.json_object:
        given = []
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UsageError(
            f"structured_outputs: expected one of {', '.join(KINDS)}, found {found}",
            "give one of them; leave structured_outputs out for free text",
        )
    return given[0]


def _check_flags(value: StructuredOutputs) -> None:
    for name in ("disable_any_whitespace", "after_thinking"):
        if not isinstance(getattr(value, name), bool):
            raise _wrong(name, "True or False", getattr(value, name))
    if value.json_object is not None and not isinstance(value.json_object, bool):
        raise _wrong("json_object", "True or False", value.json_object)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(name, "a text", value)
    return _short(name, value)


def _choices(name: str, value: Any) -> tuple[str, ...]:
    is_list = isinstance(value, list | tuple) and 0 < len(value) <= MOST_CHOICES
    if not is_list or not all(isinstance(one, str) and one for one in value):
        raise _wrong(name, f"1 to {MOST_CHOICES} texts", value)
    _short(name, "".join(value))
    return tuple(dict.fromkeys(value))


def _schema(name: str, value: Any) -> str:
    """Write a schema as compact JSON, so that equal ones are equal."""
    if isinstance(value, str):
        try:
            value = json.loads(_short(name, value), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"structured_outputs json: expected a JSON schema, found no JSON: {error}",
                "check its quotes and commas",
            ) from error
    if not isinstance(value, Mapping | bool):
        raise _wrong(name, "a JSON schema, which is an object", value)
    _check_depth(value)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"structured_outputs json: expected what JSON can write, found: {error}",
            "use texts, numbers, lists, mappings, True, False and None",
        ) from error
    return _short(name, text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(schema: Any) -> None:
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise UsageError(
                f"structured_outputs json: expected at most {MOST_DEPTH} levels, found more",
                "use $ref to definitions beside each other",
            )
        level = [
            inner
            for one in level
            if isinstance(one, Mapping | list | tuple)
            for inner in (one.values() if isinstance(one, Mapping) else one)
        ]


def _short(name: str, text: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(
            f"structured_outputs {name}: expected text, found half a surrogate pair", "take it out"
        ) from None
    if size > MOST_BYTES:
        raise UsageError(
            f"structured_outputs {name}: expected at most {MOST_BYTES:,} bytes, found {size:,}",
            "make it shorter",
        )
    return text


def _wrong(name: str, expected: str, found: Any) -> UsageError:
    shown = " ".join(repr(found)[:60].split())
    return UsageError(f"structured_outputs {name}: expected {expected}, found {shown}", _HINT)

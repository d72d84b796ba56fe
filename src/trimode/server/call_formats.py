"""Reads a tool call that a model wrote, in JSON or tags.

With tags, each parameter has one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_BLANK = re.compile(r"[ \t\n\r]*")
_LITERALS = ("integer", "number", "boolean", "object", "array", "null")


class Call(NamedTuple):
    """Holds a call.

    Attributes:
        name: Name of the function.
        arguments: Arguments as a JSON object, as the model has written them.
    """

    name: str
    arguments: str


def read_call(body: str, schemas: Mapping[str, Mapping[str, Any]]) -> Call | None:
    """Read what stands between the tags of a call.

    Args:
        body: Either ``{"name": ..., "arguments": {...}}``, or ``<function=NAME>`` with a
            ``<parameter=NAME>`` for each argument.
        schemas: JSON schemas of the arguments, by the names of the functions that were offered.

    Returns:
        The call; None where it is malformed, or of a function that was not offered.
    """
    body = body.strip()
    try:
        call = _read_json(body) if body.startswith("{") else _read_tags(body, schemas)
    except (ValueError, RecursionError):
        return None
    return call if call is not None and call.name in schemas else None


def _read_json(body: str) -> Call:
    members = raw_members(body)
    name = json.loads(members["name"]) if "name" in members else None
    arguments = members.get("arguments", members.get("parameters"))
    if not isinstance(name, str) or arguments is None:
        raise ValueError("expected a name and arguments")
    if arguments.startswith('"'):  # some models write the arguments as a text of JSON
        arguments = json.loads(arguments).strip()
    raw_members(arguments)
    return Call(name, arguments)


def raw_members(text: str) -> dict[str, str]:
    """Return the members of a JSON object as they are written.

    Raises:
        ValueError: it is none, or it has numbers that JSON does not know.
        RecursionError: it is nested too deep.
    """
    decode = json.JSONDecoder(parse_constant=_refuse).raw_decode
    place = _after(text, 0, "{")
    members: dict[str, str] = {}
    if text[place : place + 1] == "}":
        return members if place + 1 == len(text) else _refuse(text)
    while True:
        name, place = decode(text, place)
        start = _after(text, place, ":")
        _, place = decode(text, start)
        if not isinstance(name, str):
            _refuse(text)
        members[name] = text[start:place]
        place = _blank(text, place)
        if text[place : place + 1] == "}":
            return members if place + 1 == len(text) else _refuse(text)
        place = _after(text, place, ",")


def _after(text: str, place: int, sign: str) -> int:
    """Return the place behind a sign and the blanks around it."""
    place = _blank(text, place)
    if text[place : place + 1] != sign:
        _refuse(text)
    return _blank(text, place + 1)


def _blank(text: str, place: int) -> int:
    found = _BLANK.match(text, place)
    return place if found is None else found.end()


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"expected a JSON object, found {text[:60]!r}")


def _read_tags(body: str, schemas: Mapping[str, Mapping[str, Any]]) -> Call | None:
    found = _FUNCTION.fullmatch(body)
    if found is None:
        return None
    name, inner, place = found[1].strip(), found[2], 0
    known = schemas.get(name, {}).get("properties", {})
    arguments: dict[str, Any] = {}
    for one in _PARAMETER.finditer(inner):
        if one.start() != place:
            return None
        place = one.end()
        arguments[one[1].strip()] = _typed(one[2], known.get(one[1].strip()))
    if inner[place:].strip():
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _typed(text: str, schema: Any) -> Any:
    """Read a parameter by its schema, or as text where that fails."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" in kinds or not any(kind in _LITERALS for kind in kinds):
        return text
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text

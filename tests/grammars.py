"""Random JSON schemas and expressions, each with a witness that knows nothing of grammars."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from datetime import datetime, time
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker

WORDS = ("id", "name", "age", "city", "note", "kind", "x", "y-2", "a b", "systematic")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
PATTERNS = ("^[a-z]{2,6}$", "^[A-Z][a-z]{1,4} [0-9]{2}$", "^(ab|cd){1,3}$", "^x[0-9a-f]{4}$")


_FORMATS = FormatChecker(("date", "uuid", "ipv4", "email"))


@_FORMATS.checks("time", raises=ValueError)
def _is_time(text: Any) -> bool:
    """RFC 3339's, with a zone; jsonschema has draft 3's, without."""
    told = time.fromisoformat(str(text).upper().replace(":60", ":59"))
    return told.tzinfo is not None


@_FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(text: Any) -> bool:
    told = datetime.fromisoformat(str(text).upper().replace(":60", ":59"))
    return told.tzinfo is not None


def random_schema(rng: random.Random, *, unicode: bool = False) -> dict[str, Any]:
    """A schema whose answers have a bounded length."""
    maker = _Maker(rng, unicode=unicode)
    schema = maker.any(3)
    if maker.defs:
        schema = {**schema, "$defs": maker.defs}
    return schema


def follows_schema(schema: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a text is JSON that a schema takes, by jsonschema."""
    checker = Draft202012Validator(schema, format_checker=_FORMATS)

    def follows(text: str) -> bool:
        try:
            return bool(checker.is_valid(json.loads(text)))
        except ValueError:
            return False

    return follows


def random_regex(rng: random.Random, depth: int = 3) -> str:
    """An expression that Python's ``re`` and the grammar read alike, without unbounded parts."""
    kind = rng.randrange(7) if depth else rng.randrange(3)
    inner = [random_regex(rng, depth - 1) for _ in range(3)] if kind > 2 else []
    return {
        0: lambda: rng.choice(("a", "Zeta", "0", " ", "x-y", r"\.", r"\[", "no end", '"', "/")),
        1: lambda: rng.choice(("[a-f]", "[^a-zA-Z]", r"\d", "[xyz_]", "[A-C0-2]", "[ -/]")),
        2: lambda: rng.choice(("[a-z]{1,4}", r"\d{2}", "(?:ab){0,3}", "[01]{3,5}", "q?")),
        3: lambda: "".join(inner),
        4: lambda: f"(?:{'|'.join(inner)})",
        5: lambda: f"(?:{inner[0]}){{1,{rng.randrange(1, 4)}}}{inner[1]}",
        6: lambda: f"(?:{inner[0]})?{inner[1]}",
    }[kind]()


def follows_regex(expression: str) -> Callable[[str], bool]:
    """Whether a text matches whole, by Python's ``re``."""
    compiled = re.compile(expression)
    return lambda text: compiled.fullmatch(text) is not None


class _Maker:
    def __init__(self, rng: random.Random, *, unicode: bool) -> None:
        self.rng, self.unicode = rng, unicode
        self.defs: dict[str, Any] = {}

    def any(self, depth: int) -> dict[str, Any]:
        kinds = [self.string, self.number, self.integer, self.enum, self.const, self.simple]
        if depth:
            kinds += 2 * [self.object] + [self.array, self.any_of, self.ref, self.object]
        chosen = self.rng.choice(kinds)
        return chosen(depth - 1)

    def word(self) -> str:
        more = ("größe", "名前", "é", "🙂 ok") if self.unicode else ()
        return self.rng.choice(WORDS + more)

    def string(self, _: int) -> dict[str, Any]:
        return self.rng.choice(
            (
                {"type": "string", "maxLength": self.rng.randrange(1, 8)},
                {"type": "string", "minLength": 2, "maxLength": 4},
                {"type": "string", "pattern": self.rng.choice(PATTERNS)},
                {"type": "string", "format": self.rng.choice(FORMATS), "maxLength": 40},
            )
        )

    def number(self, _: int) -> dict[str, Any]:
        low = self.rng.randrange(-50, 50)
        return {"type": "number", "minimum": low, "maximum": low + self.rng.randrange(1, 90) / 2}

    def integer(self, _: int) -> dict[str, Any]:
        low = self.rng.randrange(-500, 500)
        kind = self.rng.choice(("minimum", "exclusiveMinimum"))
        return {"type": "integer", kind: low, "exclusiveMaximum": low + self.rng.randrange(3, 2000)}

    def enum(self, _: int) -> dict[str, Any]:
        values = [self.word(), self.word() + " two", self.rng.randrange(100), None, True, [1, "a"]]
        return {"enum": self.rng.sample(values, self.rng.randrange(1, 5))}

    def const(self, _: int) -> dict[str, Any]:
        return {"const": self.rng.choice((self.word(), 12.5, {"k": [self.word()]}, 'a\n"b\\'))}

    def simple(self, _: int) -> dict[str, Any]:
        return {"type": self.rng.choice(("boolean", "null", ["boolean", "null"]))}

    def object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(WORDS, self.rng.randrange(1, 4))
        if self.unicode:
            names = list(dict.fromkeys([*names, self.word()]))
        return {
            "type": "object",
            "properties": {name: self.any(depth) for name in names},
            "required": [name for name in names if self.rng.random() < 0.7],
            "additionalProperties": False,
        }

    def array(self, depth: int) -> dict[str, Any]:
        low = self.rng.randrange(3)
        most = low + self.rng.randrange(1, 3)
        return {"type": "array", "items": self.any(depth), "minItems": low, "maxItems": most}

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.any(depth) for _ in range(self.rng.randrange(2, 4))]}

    def ref(self, depth: int) -> dict[str, Any]:
        name = f"part{len(self.defs)}"
        self.defs[name] = {}
        self.defs[name] = self.any(min(depth, 1))
        return {"$ref": f"#/$defs/{name}"}

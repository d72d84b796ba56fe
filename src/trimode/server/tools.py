"""Finds the calls of tools in an answer, as it comes."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimode.server.call_formats import Call, read_call
from trimode.server.tags import held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_JSON_SIGNS = re.compile(r'["\\]')
_FORCED = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*')
_SCOPE_SIGNS = re.compile(r'[{}"\\]')

Schemas = Mapping[str, Mapping[str, Any]]


@dataclass
class Found:
    """Holds what became certain of an answer.

    Attributes:
        content: Text outside of calls.
        calls: Calls or parts of them, as in OpenAI's events: with ``index``, the first part of a
            call with ``id`` and name, the others with a piece of its arguments.
    """

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the schemas of the arguments by the functions' names."""
    functions = [tool["function"] for tool in tools]
    return {one["name"]: one.get("parameters") or {} for one in functions}


def call_schema(tools: Sequence[Mapping[str, Any]], name: str | None = None) -> dict[str, Any]:
    """Make the JSON schema of an answer that must be a call.

    :class:`ForcedCall` reads such an answer.

    Args:
        tools: Tools that may be called.
        name: Name of the one that must be called; None = any of them.
    """
    chosen = [one for one in schemas_of(tools).items() if name in (None, one[0])]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function},
                "arguments": {"type": "object", **schema},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function, schema in chosen
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def new_call_id() -> str:
    """Make the id of a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


class _Calls:
    """Numbers calls, and writes them as OpenAI does."""

    def __init__(self, make_id: Callable[[], str]) -> None:
        self.count, self._make_id = 0, make_id

    def begin(self, name: str) -> dict[str, Any]:
        """Return the first part of a call."""
        self.count += 1
        return {
            "index": self.count - 1,
            "id": self._make_id(),
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }

    def more(self, arguments: str) -> dict[str, Any]:
        """Return a further part of the last call."""
        return {"index": self.count - 1, "function": {"arguments": arguments}}


class ToolCallParser:
    """Finds ``<tool_call>...</tool_call>`` in a text that comes in pieces, cut anywhere.

    A call is held back until it is complete: what is malformed, unfinished, or calls a function
    that was not offered, comes out as content. Blanks around calls belong to neither.

    Args:
        schemas: Schemas of the arguments by the names of the functions that were offered.
        is_parallel: Whether there may be several calls; else those after the first are dropped.
        make_id: Function that makes the id of a call.
    """

    def __init__(
        self,
        schemas: Schemas,
        *,
        is_parallel: bool = True,
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._schemas, self._is_parallel = schemas, is_parallel
        self._calls = _Calls(make_id)
        self._text, self._blank = "", ""
        self._body = _Body()
        self._is_inside = False

    @property
    def has_calls(self) -> bool:
        """Whether a call was found."""
        return self._calls.count > 0

    def push(self, text: str) -> Found:
        """Take a piece; return what is certain."""
        self._text += text
        found = Found()
        while self._inside(found) if self._is_inside else self._outside(found):
            pass
        return found

    def finish(self) -> Found:
        """Return what was held back; the last call may lack its tag.

        The tag is the one that closes it.
        """
        found = Found()
        if self._is_inside and read_call(self._text, self._schemas) is not None:
            self._is_inside, body, self._text = False, self._text, ""
            self._end(found, body, "")
        while self._is_inside:
            body, tag, rest = self._text.partition(CLOSE)
            self._is_inside, self._text = False, rest
            self._end(found, body, tag)
            while not self._is_inside and self._outside(found):
                pass
        rest = self._blank + self._text
        found.content += "" if self.has_calls and not rest.strip() else rest
        self._text = self._blank = ""
        return found

    def _outside(self, found: Found) -> bool:
        """Pass on content up to the next call; whether one begins."""
        before, tag, after = self._text.partition(OPEN)
        if tag:
            self._text, self._is_inside, self._body = after, True, _Body()
            self._content(found, before)
            return True
        certain = len(self._text) - held_back(self._text, OPEN)
        self._content(found, self._text[:certain])
        self._text = self._text[certain:]
        return False

    def _content(self, found: Found, text: str) -> None:
        """Pass on content, but hold back blanks at its end.

        A call may follow them.
        """
        text = self._blank + text
        solid = text.rstrip()
        self._blank = text[len(solid) :]
        found.content += solid

    def _inside(self, found: Found) -> bool:
        """Look for the end of a call; whether it has come."""
        end = self._body.end(self._text)
        if end is None:
            return False
        body, self._text = self._text[:end], self._text[end + len(CLOSE) :]
        self._is_inside = False
        self._end(found, body, CLOSE)
        return True

    def _end(self, found: Found, body: str, tag: str) -> None:
        """Pass on a call, or what has turned out to be none."""
        call = read_call(body, self._schemas)
        if call is None:
            self._content(found, OPEN + body + tag)
            return
        self._blank = ""
        if self._is_parallel or not self.has_calls:
            found.calls += self._written(call)

    def _written(self, call: Call) -> list[dict[str, Any]]:
        return [self._calls.begin(call.name), self._calls.more(call.arguments)]


class _Body:
    """Looks for the tag that ends a call.

    A tag within a string of the call's JSON does not end it.
    """

    def __init__(self) -> None:
        self._place, self._in_text = 0, False
        self._is_json: bool | None = None

    def end(self, text: str) -> int | None:
        """Return the tag's place; None where it has not come.

        ``text`` only ever grows.
        """
        if self._is_json is None and (start := text.lstrip()):
            self._is_json = start.startswith("{")
        if not self._is_json:
            found = text.find(CLOSE, self._place)
            self._place = max(0, len(text) - len(CLOSE) + 1)
            return None if found < 0 else found
        while (end := self._next_tag(text)) is not None:
            if not self._in_text:
                return end
            self._place = end + 1
        return None

    def _next_tag(self, text: str) -> int | None:
        """Read up to the next tag or the end of the text.

        It notes whether that is within a string.
        """
        tag = text.find(CLOSE, self._place)
        stop = tag if tag >= 0 else len(text) - held_back(text, CLOSE)
        while (sign := _JSON_SIGNS.search(text, self._place, stop)) is not None:
            if sign[0] == '"':
                self._in_text = not self._in_text
                self._place = sign.end()
            elif sign.end() >= stop and tag < 0:
                self._place = sign.start()  # what it escapes has not come
                return None
            else:
                self._place = sign.end() + self._in_text
        self._place = max(self._place, stop)
        return tag if tag >= 0 else None


class ForcedCall:
    """Passes on the arguments of a call, as they come.

    The answer has to be this call. The answer follows :func:`call_schema`, so nothing is held back.
    Where it does not begin like a call, it is content.

    Args:
        make_id: Function that makes the id of a call.
    """

    def __init__(self, make_id: Callable[[], str] = new_call_id) -> None:
        self._calls, self._text = _Calls(make_id), ""
        self._depth, self._in_text, self._is_escaped, self._is_done = 0, False, False, False

    @property
    def has_calls(self) -> bool:
        """Whether the call has begun."""
        return self._calls.count > 0

    def push(self, text: str) -> Found:
        """Take a piece; return what is certain."""
        if self.has_calls:
            return self._more(text)
        self._text += text
        begin = _FORCED.match(self._text)
        if begin is None:
            return Found()
        first = self._calls.begin(begin[1])
        return Found("", [first, *self._more(self._text[begin.end() :]).calls])

    def finish(self) -> Found:
        """Return what was held back."""
        return Found() if self.has_calls else Found(self._text)

    def _more(self, text: str) -> Found:
        text = text if self._depth else text.lstrip()
        piece = "" if self._is_done else text[: self._end(text)]
        return Found("", [self._calls.more(piece)] if piece else [])

    def _end(self, text: str) -> int:
        """Return where the arguments end in a piece.

        It notes what is still open behind it.
        """
        place = int(self._is_escaped and bool(text))
        self._is_escaped = self._is_escaped and not text
        while (sign := _SCOPE_SIGNS.search(text, place)) is not None:
            place = sign.end()
            if sign[0] == "\\":
                self._is_escaped = place == len(text)
                place += 1
            elif sign[0] == '"':
                self._in_text = not self._in_text
            elif not self._in_text:
                self._depth += 1 if sign[0] == "{" else -1
                if not self._depth:
                    self._is_done = True
                    return place
        return len(text)


def whole_calls(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join the parts of calls, for an answer in one piece."""
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        call = calls.setdefault(part["index"], {"function": {"arguments": ""}})
        function, more = call["function"], part["function"]
        arguments = function["arguments"] + more["arguments"]
        call |= {key: part[key] for key in ("id", "type") if key in part}
        call["function"] = {**function, **more, "arguments": arguments}
    return [calls[index] for index in sorted(calls)]

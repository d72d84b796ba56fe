"""Calls of tools in answers, against a slow version that sees the whole text, cut anywhere."""

from __future__ import annotations

import json
import re
import time
from itertools import count, pairwise
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trimode.server.call_formats import Call, raw_members, read_call
from trimode.server.tools import (
    ForcedCall,
    ToolCallParser,
    call_schema,
    schemas_of,
    whole_calls,
)

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": ["boolean", "null"]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = schemas_of(TOOLS)
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
NOW = '<tool_call>{"arguments":{},"name":"now"}</tool_call>'
TAGGED = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nSão Paulo\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)
QUOTING = (
    '<tool_call>{"name": "weather", "arguments": {"city": "a </tool_call> \\" b\\\\"}}</tool_call>'
)
FRAGMENTS = (
    *(WEATHER, NOW, TAGGED, QUOTING),
    *("<tool_call>", "</tool_call>", '{"name": "now", ', '"arguments": {}}', '"', "\\", "{", "}"),
    *("<tool", "_call>", "<function=now>", "</function>", "\n", " ", "text", "é🙂", "<"),
)
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
cuts = st.lists(st.integers(0, 400), max_size=12)


def cut(text: str, places: list[int]) -> list[str]:
    marks = sorted({0, len(text), *(place for place in places if place < len(text))})
    return [text[a:b] for a, b in pairwise(marks)]


def run(parser: Any, pieces: list[str]) -> tuple[str, list[dict[str, Any]], list[Any]]:
    found = [*map(parser.push, pieces), parser.finish()]
    parts = [part for one in found for part in one.calls]
    return "".join(one.content for one in found), whole_calls(parts), parts


def parse(pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    numbers = count()
    parser = ToolCallParser(SCHEMAS, make_id=lambda: f"id{next(numbers)}", **options)
    content, calls, _ = run(parser, pieces)
    assert [call["id"] for call in calls] == [f"id{n}" for n in range(len(calls))]
    assert parser.has_calls == bool(calls)
    return content, [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


def is_open(body: str) -> bool:
    """Whether a text of JSON is open at the end of the body."""
    left = re.sub(r'"(?:[^"\\]|\\.)*"', "", body, flags=re.DOTALL)
    return body.lstrip().startswith("{") and '"' in left


def parse_whole(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The slow version: the first tag outside of JSON's texts ends a call."""
    content, calls, is_after_call = "", [], False
    while (start := text.find("<tool_call>")) >= 0:
        before, rest = text[:start], text[start + 11 :]
        ends = [m.start() for m in re.finditer("</tool_call>", rest)]
        end = next((end for end in ends if not is_open(rest[:end])), None)
        body, after = (rest, "") if end is None else (rest[:end], rest[end + 12 :])
        call = read_call(body, SCHEMAS)
        if call is None and end is None and ends:  # nothing more comes: the first tag ends it
            body, after = rest[: ends[0]], rest[ends[0] + 12 :]
            call, end = read_call(body, SCHEMAS), ends[0]
        if is_after_call and not content.strip() and not before.strip():
            before = ""
        if call is None:
            content += before + "<tool_call>" + body + ("" if end is None else "</tool_call>")
        else:
            content += before
            content = content.rstrip()
            calls.append((call.name, call.arguments))
            is_after_call = True
        text = after
    content += text
    return content, calls


@settings(deadline=None, max_examples=300)
@given(texts, cuts)
@example(QUOTING, [60])
@example('<tool_call>{"name": "now", "arguments": {}}', [])
@example('<tool_call>{"a": "</tool_call>', [])
def test_any_split_is_the_whole(text: str, places: list[int]) -> None:
    whole = parse([text])
    assert parse(cut(text, places)) == whole
    assert parse(list(text)) == whole


@settings(deadline=None, max_examples=300)
@given(texts)
def test_calls_are_those_of_the_slow_version(text: str) -> None:
    content, calls = parse([text])
    expected, expected_calls = parse_whole(text)
    assert calls == expected_calls
    assert content.split() == expected.split()  # blanks around calls are nobody's
    if not calls:
        assert content == text


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60), cuts)
def test_other_texts_are_content(text: str, places: list[int]) -> None:
    if "<tool_call>" not in text:
        assert parse(cut(text, places)) == (text, [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (WEATHER, "", [("weather", {"city": "Oslo", "days": 3})]),
        (f"Let me see.\n{WEATHER}\n{NOW}\n", "Let me see.",
         [("weather", {"city": "Oslo", "days": 3}), ("now", {})]),
        (TAGGED, "", [("weather", {"city": "São Paulo", "days": 2})]),
        (QUOTING, "", [("weather", {"city": 'a </tool_call> " b\\'})]),
        (f"{NOW} Done.", " Done.", [("now", {})]),
        (WEATHER.removesuffix("</tool_call>"), "", [("weather", {"city": "Oslo", "days": 3})]),
        ('<tool_call>{"name": "now", "parameters": {}}</tool_call>', "", [("now", {})]),
        ('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", [("now", {})]),
    ],
)  # fmt: skip
def test_calls(text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    found, made = parse([text])
    assert found == content
    assert [(name, json.loads(arguments)) for name, arguments in made] == calls


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "null",
        '{"name": "now"}',
        '{"name": 5, "arguments": {}}',
        '{"name": "now", "arguments": []}',
        '{"name": "now", "arguments": "x"}',
        '{"name": "now", "arguments": {"a": NaN}}',
        '{"name": "now", "arguments": {"a": 1,}}',
        '{"name": "now", "arguments": {}} and more',
        '{"name": "erase_disk", "arguments": {}}',
        "<function=now>",
        "<function=now>text</function>",
        "<function=erase_disk></function>",
        '{"name": "now", "arguments": {"a": ' + "[" * 100_000 + "}}",
        '{"name": "now", "arguments": {"a": ' + "9" * 5000 + "}}",
    ],
)
def test_what_is_malformed_is_content(body: str) -> None:
    text = f"a <tool_call>{body}</tool_call> b"
    assert parse([text]) == (text, [])
    if len(body) < 100:
        assert parse(list(text)) == (text, [])


def test_numbers_stay_as_they_were_written() -> None:
    body = '{"name": "now", "arguments": {"a": 0.10000000000000000001, "b": 1E2}}'
    assert read_call(body, SCHEMAS) == Call("now", '{"a": 0.10000000000000000001, "b": 1E2}')
    assert raw_members(' { "a" : [1, 2] , "b":"\\u00e9" } '.strip()) == {
        "a": "[1, 2]",
        "b": '"\\u00e9"',
    }


def test_parameters_have_their_schemas_types() -> None:
    body = (
        "<function=weather><parameter=city>7</parameter><parameter=days>7</parameter>"
        "<parameter=exact>true</parameter></function>"
    )
    call = read_call(body, SCHEMAS)
    assert call is not None
    assert json.loads(call.arguments) == {"city": "7", "days": 7, "exact": True}
    call = read_call(body.replace("=days>7", "=days>soon"), SCHEMAS)
    assert call is not None
    assert json.loads(call.arguments)["days"] == "soon"


def test_one_call_at_a_time() -> None:
    content, calls = parse([f"{WEATHER}{NOW}"], is_parallel=False)
    assert (content, [name for name, _ in calls]) == ("", ["weather"])


def test_parts_are_openais() -> None:
    _, _, parts = run(ToolCallParser(SCHEMAS, make_id=lambda: "id"), [WEATHER])
    assert parts == [
        {
            "index": 0,
            "id": "id",
            "type": "function",
            "function": {"name": "weather", "arguments": ""},
        },
        {"index": 0, "function": {"arguments": '{"city": "Oslo", "days": 3}'}},
    ]


def test_content_is_not_held_back_without_reason() -> None:
    parser = ToolCallParser(SCHEMAS)
    assert [parser.push(piece).content for piece in ("a < b", " <", "tool", "s", "\n", "x")] == [
        "a < b",
        "",
        "",
        " <tools",
        "",
        "\nx",
    ]


def test_long_answers_take_linear_time() -> None:
    """Open quotes make every tag doubtful; nothing is read again and again."""
    text = '<tool_call>{"' * 20_000 + "</tool_call>" * 20_000
    start = time.perf_counter()
    content, calls = parse([text])
    parse(cut(text, list(range(0, len(text), 100))))
    assert (content, calls) == (text, [])
    assert time.perf_counter() - start < 20


@given(
    st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers(), max_size=4),
    st.sampled_from([None, 1]),
    cuts,
)
@example({"a": '}"\\'}, None, [30, 40, 41, 42, 43])
def test_a_forced_call(arguments: dict[str, Any], indent: int | None, places: list[int]) -> None:
    text = json.dumps({"name": "now", "arguments": arguments}, indent=indent)
    jsonschema.validate(json.loads(text), call_schema(TOOLS))
    for pieces in ([text], list(text), cut(text, places)):
        parser = ForcedCall(lambda: "id")
        content, calls, parts = run(parser, pieces)
        assert content == ""
        assert [call["function"]["name"] for call in calls] == ["now"]
        assert json.loads(calls[0]["function"]["arguments"]) == arguments
        assert parser.has_calls
    assert len(parts) >= 2


def test_a_forced_call_that_is_none_is_content() -> None:
    content, calls, _ = run(ForcedCall(), ["Sorry", ", no."])
    assert (content, calls) == ("Sorry, no.", [])


def test_arguments_come_as_they_are_written() -> None:
    parser = ForcedCall(lambda: "id")
    assert parser.push('{"name": "now", "argum').calls == []
    begun = parser.push('ents": {"a": "x').calls
    assert [part["function"]["arguments"] for part in begun] == ["", '{"a": "x']
    assert parser.push('y"').calls[0]["function"]["arguments"] == 'y"'
    assert parser.push("}}").calls[0]["function"]["arguments"] == "}"
    assert parser.push(" ").calls == []


def test_schemas_of_forced_calls() -> None:
    validate = jsonschema.Draft202012Validator(call_schema(TOOLS, "weather"))
    validate.check_schema(validate.schema)
    assert validate.is_valid({"name": "weather", "arguments": {"city": "Oslo"}})
    assert not validate.is_valid({"name": "weather", "arguments": {}})
    assert not validate.is_valid({"name": "now", "arguments": {}})
    either = jsonschema.Draft202012Validator(call_schema(TOOLS))
    assert either.is_valid({"name": "now", "arguments": {}})
    assert not either.is_valid({"name": "other", "arguments": {}})

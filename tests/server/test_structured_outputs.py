"""Answers that follow a schema or a grammar, through the official client."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from grammars import follows_schema

QUESTION: list[Any] = [{"role": "user", "content": "JSON: Ada from Oslo is 31 years old."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
NAMED: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


def ask(running: Any, mode: str = "ar", **options: Any) -> str:
    more = options.pop("extra_body", {})
    found = running.client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        max_tokens=120,
        extra_body={"mode": mode, **more},
        **{"temperature": 0, **options},
    )
    assert found.choices[0].finish_reason == "stop"
    return str(found.choices[0].message.content)


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "diffusion", "auto"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_response_format_is_followed(running: Any, mode: str, temperature: float) -> None:
    text = ask(running, mode, response_format=NAMED, temperature=temperature, seed=5)
    assert follows_schema(SCHEMA)(text)


def test_any_json_object(running: Any) -> None:
    assert isinstance(json.loads(ask(running, response_format={"type": "json_object"})), dict)


def test_vllms_fields(running: Any) -> None:
    def of(**asked: Any) -> str:
        return ask(running, extra_body={"structured_outputs": asked})

    assert follows_schema(SCHEMA)(of(json=SCHEMA, disable_any_whitespace=True))
    assert re.fullmatch(r"[a-z]{3} \d\d", of(regex=r"[a-z]{3} \d\d"))
    assert of(choice=["red", "green"]) in ("red", "green")
    assert re.fullmatch(r"\(+[ab]\)+", of(grammar='start: "(" start ")" | "(" /[ab]/ ")"'))


def test_a_stream_follows_too(running: Any) -> None:
    stream = running.client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, response_format=NAMED, stream=True
    )
    text = "".join(event.choices[0].delta.content or "" for event in stream)
    assert text == ask(running, response_format=NAMED)


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_grammar_is_a_bad_request(running: Any, stream: bool) -> None:
    for asked, message in (
        ({"regex": "(a"}, "unclosed group"),
        ({"json": {"type": "integr"}}, "Invalid type"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "not present"),
        ({"regex": "a", "choice": ["b"]}, "found regex and choice"),
        ({"choice": []}, "texts"),
        ({"regex": "a" * 70_000}, "at most 65,536 bytes"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            running.client.chat.completions.create(
                model="demo",
                messages=QUESTION,
                stream=stream,
                extra_body={"structured_outputs": asked},
            )

"""Calls that an answer has to be, in every mode that follows a grammar."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 9},
        "b": {"type": "boolean"},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "add", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": SCHEMA}},
]
NAMED: Any = {"type": "function", "function": {"name": "now"}}
MESSAGES: Any = [{"role": "user", "content": "Add: 1 + 2 ="}]


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "diffusion", "auto"])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_an_answer_is_a_call(running: Any, mode: str, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "temperature": 0,
        "max_tokens": 120,
        "extra_body": {"mode": mode},
    }
    create = running.client.chat.completions.create
    whole = create(**asked).choices[0]
    events = list(create(**asked, stream=True))
    assert whole.finish_reason == "tool_calls"
    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    assert call.type == "function"
    assert call.function.name in (["now"] if choice is NAMED else ["add", "now"])
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)

    deltas = [choice.delta for event in events for choice in event.choices]
    parts = [part for delta in deltas for part in delta.tool_calls or ()]
    assert parts[0].id
    assert {part.index for part in parts} == {0}
    assert len(parts) > 2  # the arguments come as they are written
    functions = [part.function for part in parts if part.function is not None]
    assert functions[0].name == call.function.name
    assert "".join(one.arguments or "" for one in functions) == call.function.arguments
    assert not any(delta.content for delta in deltas)

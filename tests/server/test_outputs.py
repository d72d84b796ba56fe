"""Thinking and calls of tools reach a client apart from the answer, however a text is cut."""

from __future__ import annotations

from typing import Any

import pytest

from trimode.server.errors import ApiError
from trimode.server.outputs import ChoiceText, Delta
from trimode.server.processors import default_processors
from trimode.server.protocol.chat import ChatRequest
from trimode.server.structured import structured_outputs_of

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def request_of(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})


class Ended:
    """A text that has ended, as a handle shows it."""

    done, logprobs = True, None

    def __init__(self, pieces: list[list[int]]) -> None:
        self._pieces = pieces

    def pieces_from(self, position: int) -> list[list[int]]:
        return self._pieces[position:]

    def result(self, _: float) -> Any:
        return type("Result", (), {"finish_reason": "stop"})


class Letters:
    """Tokens are letters."""

    def push(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))

    def finish(self) -> str:
        return ""


def read(text: str, size: int, request: ChatRequest, prompt: str) -> tuple[Delta, str | None]:
    pieces = [[ord(c) for c in text[i : i + size]] for i in range(0, len(text), size)]
    choice: Any = ChoiceText(
        0,
        Ended(pieces),  # type: ignore[arg-type]
        Letters(),  # type: ignore[arg-type]
        default_processors(request, prompt),
    )
    update = choice.read()
    assert choice.read() is None
    return update.delta, update.finish_reason


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_thinking_calls_and_text_come_apart(size: int) -> None:
    text = f"why so</think>Sum: {CALL}"
    delta, reason = read(text, size, request_of(tools=TOOLS), "...<think>\n")
    assert (delta.reasoning_content, delta.content.strip()) == ("why so", "Sum:")
    assert [one["function"]["name"] for one in delta.tool_calls if "name" in one["function"]] == [
        "add"
    ]
    assert "".join(one["function"]["arguments"] for one in delta.tool_calls) == '{"a": 1}'
    assert reason == "tool_calls"


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_a_call_is_text(fields: Any) -> None:
    delta, reason = read(CALL, 3, request_of(**fields), "<think></think>")
    assert (delta.content, delta.tool_calls, reason) == (CALL, [], "stop")


def test_what_an_answer_follows_is_said_in_the_engines_words() -> None:
    def of(is_thinking: bool = False, **fields: Any) -> Any:
        return structured_outputs_of(request_of(**fields), is_thinking=is_thinking)

    schema = {"type": "object"}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert of() is None
    assert of(response_format={"type": "text"}) is None
    assert of(response_format={"type": "json_object"}) == {"json_object": True}
    assert of(response_format=named) == {"json": schema}
    assert of(True, structured_outputs={"regex": "a+"}) == {"regex": "a+", "after_thinking": True}
    assert of(structured_outputs={"json": schema}) == {"json": schema}
    forced = of(tools=TOOLS, tool_choice="required")["json"]
    assert "add" in str(forced)
    with pytest.raises(ApiError, match="expected one of"):
        of(tools=TOOLS, tool_choice="required", response_format=named)


def test_a_tool_that_must_be_called_has_to_be_there() -> None:
    choice = {"type": "function", "function": {"name": "other"}}
    with pytest.raises(ApiError) as caught:
        default_processors(request_of(tools=TOOLS, tool_choice=choice), "")
    assert caught.value.param == "tool_choice"

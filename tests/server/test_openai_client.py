"""The official client against a real server: its answers are those of single runs."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from trimode import TriModeModel

QUESTION = [{"role": "user", "content": "Add: 12 + 34 ="}]


def alone(model: TriModeModel, messages: list[Any], mode: Any = "ar", **options: Any) -> str:
    """The answer of a single run, without engine and server."""
    ids = model.codec.encode_chat(messages)
    return model.codec.decode(model.stream([ids], mode, **options).finish().token_ids)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear_spec", "auto"])
def test_a_greedy_answer_is_that_of_a_single_run(running: Any, mode: str) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "extra_body": {"mode": mode}}
    found = running.client().chat.completions.create(model="demo", messages=QUESTION, **options)
    expected = alone(running.model, QUESTION, mode, max_new_tokens=40)
    assert found.choices[0].message.content == expected
    assert found.choices[0].message.role == "assistant"
    assert found.model == "demo"


def test_a_stream_is_the_whole_answer_in_parts(running: Any) -> None:
    with running.client().chat.completions.create(
        model="demo",
        messages=QUESTION,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        events = list(stream)
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == alone(running.model, QUESTION, max_new_tokens=40)
    assert events[0].choices[0].delta.role == "assistant"
    ids = running.model.codec.encode_chat(QUESTION)
    assert events[-1].usage.prompt_tokens == len(ids)
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] in ("stop", "length")


def test_the_async_client_gets_the_same(running: Any) -> None:
    async def ask() -> list[str]:
        async with running.async_client() as client:
            whole, stream = await asyncio.gather(
                client.chat.completions.create(
                    model="demo", messages=QUESTION, temperature=0, max_tokens=40
                ),
                client.chat.completions.create(
                    model="demo", messages=QUESTION, temperature=0, max_tokens=40, stream=True
                ),
            )
            parts = [e.choices[0].delta.content or "" async for e in stream]
        return [whole.choices[0].message.content or "", "".join(parts)]

    expected = alone(running.model, QUESTION, max_new_tokens=40)
    assert asyncio.run(ask()) == [expected, expected]


def test_an_unknown_model_is_not_found(running: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'demo', found 'other'") as caught:
        running.client().chat.completions.create(model="other", messages=QUESTION)
    assert caught.value.code == "model_not_found"

"""The official client against a real server: its answers are those of single runs."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest

from trimode import TriModeModel

QUESTION: list[Any] = [{"role": "user", "content": "Add: 12 + 34 ="}]
GREEDY: dict[str, Any] = {"model": "demo", "messages": QUESTION, "temperature": 0}


def alone(model: TriModeModel, messages: list[Any], mode: Any = "ar", **options: Any) -> Any:
    """A single run."""
    ids = model.codec.encode_chat(messages)
    return model.stream([ids], mode, **{"max_new_tokens": 40, **options}).finish()


def text_alone(model: TriModeModel, messages: list[Any], mode: Any = "ar", **options: Any) -> str:
    return model.codec.decode(alone(model, messages, mode, **options).token_ids)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear-spec", "auto"])
def test_a_greedy_answer_is_that_of_a_single_run(running: Any, mode: str) -> None:
    found = running.client.chat.completions.create(
        **GREEDY, max_tokens=40, extra_body={"mode": mode}
    )
    expected = text_alone(running.model, QUESTION, mode.replace("-", "_"))
    assert found.choices[0].message.content == expected
    assert found.choices[0].message.role == "assistant"
    assert (found.model, found.object) == ("demo", "chat.completion")


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear_spec"])
def test_a_stream_is_the_whole_answer_in_parts(running: Any, mode: Any) -> None:
    with running.client.chat.completions.create(
        **GREEDY,
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"mode": mode},
    ) as stream:
        events = list(stream)
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    single = alone(running.model, QUESTION, mode)
    assert text == running.model.codec.decode(single.token_ids)
    assert events[0].choices[0].delta.role == "assistant"
    usage = events[-1].usage
    assert usage.prompt_tokens == len(running.model.codec.encode_chat(QUESTION))
    assert usage.completion_tokens == len(single.token_ids)
    assert usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    assert all(e.usage is None for e in events[:-1])
    reasons = [e.choices[0].finish_reason for e in events if e.choices]
    assert reasons[-1] == single.finish_reason
    assert set(reasons[:-1]) == {None}


def test_the_async_client_gets_the_same(running: Any) -> None:
    async def ask() -> list[str]:
        async with running.async_client() as client:
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**GREEDY, max_tokens=40),
                client.chat.completions.create(**GREEDY, max_tokens=40, stream=True),
            )
            parts = [e.choices[0].delta.content or "" async for e in stream]
        return [whole.choices[0].message.content or "", "".join(parts)]

    expected = text_alone(running.model, QUESTION)
    assert asyncio.run(ask()) == [expected, expected]


def test_drafts_are_counted(running: Any) -> None:
    found = running.client.chat.completions.create(
        **GREEDY, max_tokens=40, extra_body={"mode": "linear_spec"}
    )
    single = alone(running.model, QUESTION, "linear_spec")
    details = found.usage.completion_tokens_details
    assert details.accepted_prediction_tokens == sum(single.accepted) > 0
    assert details.rejected_prediction_tokens == single.drafted - sum(single.accepted)
    counts = found.model_extra["metrics"]["speculative_decoding"]
    assert counts["num_spec_steps"] == len(single.accepted)
    assert counts["num_draft_tokens"] == single.drafted
    expected = 1 + sum(single.accepted) / len(single.accepted)
    assert counts["mean_acceptance_length"] == pytest.approx(expected)
    assert sum(counts["acceptance_histogram"].values()) == len(single.accepted)


def test_what_was_asked_before_is_cached(running: Any) -> None:
    messages = [{"role": "user", "content": "Add: 98 + 76 ="}]
    salted: dict[str, Any] = {"extra_body": {"cache_salt": "of this test"}}
    asked = {**GREEDY, "messages": messages, "max_tokens": 4}
    cached = [
        running.client.chat.completions.create(**asked, **more).usage.prompt_tokens_details
        for more in ({}, {}, salted, salted)
    ]
    counts = [one.cached_tokens for one in cached]
    assert counts[1] == counts[3] == len(running.model.codec.encode_chat(messages)) - 1
    assert counts[2] == 0


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_are_those_of_a_single_run(running: Any, is_streamed: bool) -> None:
    asked = {**GREEDY, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    if is_streamed:
        with running.client.chat.completions.create(**asked, stream=True) as stream:
            parts = [e.choices[0].logprobs for e in stream if e.choices]
        found = [one for part in parts if part is not None for one in part.content]
    else:
        found = running.client.chat.completions.create(**asked).choices[0].logprobs.content
    expected = alone(running.model, QUESTION, max_new_tokens=12, logprobs=3).logprobs
    text = running.model.codec.token_text
    assert [one.token for one in found] == [text(one.token_id) for one in expected]
    assert [one.logprob for one in found] == pytest.approx([o.logprob for o in expected], abs=1e-4)
    for mine, theirs in zip(found, expected, strict=True):
        assert [one.token for one in mine.top_logprobs] == [text(t) for t, _ in theirs.top]
        assert bytes(mine.bytes).decode() == mine.token


def test_completions_have_logprobs_in_their_own_form(running: Any) -> None:
    ids = running.model.codec.encode("12 + 34")
    found = running.client.completions.create(
        model="demo",
        prompt=ids,
        max_tokens=6,
        temperature=0,
        logprobs=2,
        extra_body={"ignore_eos": True},
    )
    choice = found.choices[0]
    single = running.model.stream(
        [ids], "ar", max_new_tokens=6, logprobs=2, eos_token_ids=()
    ).finish()
    assert choice.text == running.model.codec.decode(single.token_ids)
    logprobs = choice.logprobs
    assert logprobs.token_logprobs == pytest.approx([o.logprob for o in single.logprobs], abs=1e-4)
    assert "".join(logprobs.tokens)[logprobs.text_offset[3] :].startswith(logprobs.tokens[3])
    assert [len(one) for one in logprobs.top_logprobs] == [2] * len(logprobs.tokens)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_several_answers_have_the_seeds_after_the_first(running: Any, is_streamed: bool) -> None:
    asked = {**GREEDY, "temperature": 1.0, "n": 2, "seed": 7, "max_tokens": 16}
    asked["extra_body"] = {"mode": "ar"}
    if is_streamed:
        texts = ["", ""]
        with running.client.chat.completions.create(**asked, stream=True) as stream:
            for event in stream:
                texts[event.choices[0].index] += event.choices[0].delta.content or ""
    else:
        found = running.client.chat.completions.create(**asked)
        texts = [choice.message.content for choice in found.choices]
        prompt = running.model.codec.encode_chat(QUESTION)
        assert found.usage.prompt_tokens == len(prompt)  # it is read once
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 16}
    assert texts == [text_alone(running.model, QUESTION, seed=s, **options) for s in (7, 8)]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(
    running: Any, is_streamed: bool
) -> None:
    whole = text_alone(running.model, QUESTION)
    stop = whole[5:8]
    asked = {**GREEDY, "max_tokens": 40, "stop": [stop, "never"]}
    if is_streamed:
        with running.client.chat.completions.create(**asked, stream=True) as stream:
            events = list(stream)
        text = "".join(e.choices[0].delta.content or "" for e in events)
        reason = events[-1].choices[0].finish_reason
    else:
        choice = running.client.chat.completions.create(**asked).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_several_prompts_are_continued_in_their_order(running: Any) -> None:
    prompts = ["12 + 34", "Reverse: abc"]
    found = running.client.completions.create(
        model="demo", prompt=prompts, max_tokens=8, temperature=0, n=2
    )
    expected = [
        running.model.codec.decode(
            running.model.stream([running.model.codec.encode(one)], "ar", max_new_tokens=8)
            .finish()
            .token_ids
        )
        for one in prompts
        for _ in range(2)
    ]
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]


def test_all_sampling_fields_reach_the_engine(running: Any) -> None:
    fields = {
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {"40": -100},
        "seed": 3,
    }
    more = {"top_k": 20, "min_p": 0.02, "repetition_penalty": 1.1}
    found = running.client.chat.completions.create(
        **{**GREEDY, "temperature": 0.8},
        **fields,
        max_tokens=24,
        extra_body={**more, "min_tokens": 20, "mode": "ar"},
    )
    options: dict[str, Any] = {**fields, **more, "logit_bias": {40: -100}, "temperature": 0.8}
    expected = alone(running.model, QUESTION, max_new_tokens=24, min_new_tokens=20, **options)
    assert found.choices[0].message.content == running.model.codec.decode(expected.token_ids)
    assert found.usage.completion_tokens == len(expected.token_ids) >= 20


def test_the_end_token_may_be_ignored(running: Any) -> None:
    found = running.client.chat.completions.create(
        **GREEDY, max_tokens=100, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    assert found.usage.completion_tokens == 100
    assert found.choices[0].finish_reason == "length"
    assert len(found.choices[0].model_extra["token_ids"]) == 100


def test_an_unknown_model_is_not_found(running: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'demo', found 'other'") as caught:
        running.client.chat.completions.create(model="other", messages=QUESTION)
    assert caught.value.code == "model_not_found"


def test_the_model_is_listed(running: Any) -> None:
    assert [one.id for one in running.client.models.list()] == ["demo"]
    assert running.client.models.retrieve("demo").owned_by == "trimode"


def test_an_unknown_field_is_named(running: Any) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        running.client.chat.completions.create(**GREEDY, extra_body={"temprature": 1})
    assert (caught.value.param, caught.value.code) == ("temprature", "unknown_field")


def test_tokens_come_and_go(running: Any) -> None:
    def post(path: str, **body: Any) -> Any:
        return httpx.post(running.address + path, json=body).json()

    text = "12 + 34 <|im_end|>"
    found = post("/tokenize", prompt=text, return_token_strs=True)
    assert found["tokens"] == running.model.codec.encode(text)
    assert "".join(found["token_strs"]) == text
    assert post("/detokenize", tokens=found["tokens"])["prompt"] == "12 + 34 "
    chat = post("/tokenize", messages=QUESTION)
    assert chat["tokens"] == running.model.codec.encode_chat(QUESTION)


def test_metrics_count_texts_and_refusals(running: Any) -> None:
    def value(line: str) -> float:
        shown = httpx.get(f"{running.address}/metrics").text
        return float(next(one.split()[-1] for one in shown.splitlines() if one.startswith(line)))

    stopped = 'vllm:request_success_total{finished_reason="length",model_name="demo"}'
    running.client.chat.completions.create(**GREEDY, max_tokens=2)
    before = value(stopped)
    running.client.chat.completions.create(**GREEDY, max_tokens=2, n=3)
    assert value(stopped) == before + 3
    with pytest.raises(openai.NotFoundError):
        running.client.chat.completions.create(model="other", messages=QUESTION)
    refused = 'vllm:admission_rejections_total{model_name="demo",reason="model_not_found"}'
    assert value(refused) >= 1

"""Answers that follow a grammar, in every mode, alone and among others.

Witnesses are jsonschema and Python's ``re``, and a loop that asks for one forward a token and looks
at the whole mask each time.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grammars import follows_regex, follows_schema, random_regex, random_schema

from trimode import Engine, TriModeModel
from trimode.errors import RequestCancelledError, UsageError
from trimode.formats.contract import Mode
from trimode.runtime.decode.grammar_choice import GrammarSelector
from trimode.runtime.decode.stream import Generation
from trimode.runtime.grammar.spec import StructuredOutputs, read_structured_outputs

MODES: tuple[Mode, ...] = ("ar", "linear_spec", "diffusion", "auto")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"enum": ["Oslo", "Osaka", "Rome"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
QUESTION = "JSON: Ada from Oslo is 31 years old."


@pytest.fixture(scope="module")
def model(demo: Path) -> Iterator[TriModeModel]:
    with TriModeModel.from_pretrained(demo, num_threads=1) as opened:
        yield opened


def prompt(model: TriModeModel, text: str = QUESTION) -> list[int]:
    return model.codec.encode_chat([{"role": "user", "content": text}])


def answer(model: TriModeModel, mode: Mode, asked: Any, **options: Any) -> Generation:
    options = {"max_new_tokens": 300, **options}
    return model.stream([prompt(model)], mode, structured_outputs=asked, **options).finish()


def step_by_step(model: TriModeModel, asked: Any, most: int = 300) -> list[int]:
    """Greedy decoding with one forward a token, and the whole mask at each."""
    ends = model.model.eos_token_ids
    state = model.grammars.compile(read_structured_outputs(asked)).compiled.start(frozenset(ends))
    sequence, out = model.new_sequence([prompt(model)]), list[int]()
    while len(out) < most and not state.has_ended:
        sequence.run(sequence.predict())
        logits = np.where(state.mask(), sequence.predicted_logits(), -np.inf)
        out.append(int(logits.argmax()))
        state.advance(out[-1])
        sequence.append(out[-1:])
    return out


def check(model: TriModeModel, found: Generation, follows: Any) -> None:
    if found.finish_reason == "stop":
        assert found.token_ids[-1] in model.model.eos_token_ids
        assert follows(model.codec.decode(found.token_ids))
    else:
        assert len(found.token_ids) == 300


@pytest.mark.parametrize("seed", range(14))
def test_answers_follow_random_schemas(model: TriModeModel, seed: int) -> None:
    schema = random_schema(random.Random(seed))
    asked = {"json": schema, "disable_any_whitespace": bool(seed % 2)}
    results = {mode: answer(model, mode, asked) for mode in MODES}
    for found in results.values():
        check(model, found, follows_schema(schema))
    assert results["ar"].token_ids == results["linear_spec"].token_ids
    assert results["ar"].token_ids == results["auto"].token_ids == step_by_step(model, asked)


@pytest.mark.parametrize("seed", range(12))
def test_answers_follow_random_expressions(model: TriModeModel, seed: int) -> None:
    expression = random_regex(random.Random(seed))
    asked = {"regex": expression}
    results = {mode: answer(model, mode, asked) for mode in MODES}
    for found in results.values():
        check(model, found, follows_regex(expression))
    assert results["ar"].token_ids == results["linear_spec"].token_ids
    assert results["ar"].token_ids == results["auto"].token_ids == step_by_step(model, asked)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("mode", MODES)
def test_forced_tokens_save_forwards_and_change_nothing(
    model: TriModeModel, mode: Mode, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"json": PERSON, "disable_any_whitespace": True}
    options = {"temperature": temperature, "seed": 3} if temperature else {}
    fast = answer(model, mode, asked, **options)
    with monkeypatch.context() as patch:
        patch.setattr(GrammarSelector, "forced", lambda *_: [])
        slow = answer(model, mode, asked, **options)
    if mode == "ar" or not temperature:
        assert mode == "diffusion" or fast.token_ids == slow.token_ids
    assert fast.forced_tokens is not None
    assert fast.forced_tokens > 20
    assert mode != "ar" or fast.nfe <= slow.nfe - 15
    for found in (fast, slow):
        check(model, found, follows_schema(PERSON))


@pytest.mark.parametrize("sampler", ["threshold", "schedule", "margin", "leftmost"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_diffusion_follows_with_every_sampler(
    model: TriModeModel, sampler: str, temperature: float
) -> None:
    options = {"sampler": sampler, "temperature": temperature, "seed": 1, "block_length": 16}
    check(model, answer(model, "diffusion", {"json": PERSON}, **options), follows_schema(PERSON))


@pytest.mark.parametrize("threshold", [0.0, 0.6])
@pytest.mark.parametrize("block_length", [1, 2, 5, 32])
def test_every_block_gives_the_same(
    model: TriModeModel, threshold: float, block_length: int
) -> None:
    options = {"threshold": threshold, "block_length": block_length}
    found = answer(model, "linear_spec", {"json": PERSON}, **options)
    assert found.token_ids == answer(model, "ar", {"json": PERSON}).token_ids


def test_penalties_and_biases_work_under_a_grammar(model: TriModeModel) -> None:
    options = {
        "repetition_penalty": 1.3,
        "presence_penalty": 1.0,
        "logit_bias": {31: 5.0, 22: -9.0},
    }
    results = [answer(model, mode, {"json": PERSON}, **options) for mode in ("ar", "linear_spec")]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].token_ids != answer(model, "ar", {"json": PERSON}).token_ids
    check(model, results[0], follows_schema(PERSON))


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_has_its_least_length_where_the_grammar_has_it(
    model: TriModeModel, mode: Mode
) -> None:
    longer = answer(model, mode, {"regex": "[ab]{1,40}"}, min_new_tokens=20)
    assert len(longer.token_ids) >= 20
    check(model, longer, follows_regex("[ab]{1,40}"))
    short = answer(model, mode, {"choice": ["ab"]}, min_new_tokens=20)
    assert model.codec.decode(short.token_ids) == "ab"
    assert short.finish_reason == "stop"


@pytest.mark.parametrize("mode", MODES)
def test_without_end_tokens_a_complete_answer_ends(model: TriModeModel, mode: Mode) -> None:
    found = answer(model, mode, {"choice": ["yes", "no way"]}, eos_token_ids=())
    assert model.codec.decode(found.token_ids) in ("yes", "no way")
    assert found.finish_reason == "stop"
    cut = answer(model, mode, {"choice": ["a long answer"]}, eos_token_ids=(), max_new_tokens=5)
    assert (model.codec.decode(cut.token_ids), cut.finish_reason) == ("a lon", "length")


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_cuts_the_answer(model: TriModeModel, mode: Mode) -> None:
    found = answer(model, mode, {"json": PERSON}, stop=["age"])
    assert found.finish_reason == "stop"
    assert re.fullmatch(r'\{\s*"name"\s*:\s*".*"\s*,\s*"age', model.codec.decode(found.token_ids))


@pytest.mark.parametrize("mode", MODES)
def test_log_probabilities_are_the_models_own(model: TriModeModel, mode: Mode) -> None:
    found = answer(model, mode, {"json": PERSON}, logprobs=2)
    plain = answer(model, mode, {"json": PERSON})
    assert mode == "diffusion" or found.token_ids == plain.token_ids
    assert found.logprobs is not None
    assert [one.token_id for one in found.logprobs] == found.token_ids
    assert mode == "diffusion" or all(one.logprob is not None for one in found.logprobs)


@pytest.mark.parametrize("mode", MODES)
def test_thinking_comes_before_the_answer(model: TriModeModel, mode: Mode) -> None:
    asked = {"choice": ["yes", "no"], "after_thinking": True}
    found = answer(model, mode, asked, max_thinking_tokens=7)
    assert found.token_ids[7] == 13 or 13 in found.token_ids[:7]
    behind = found.token_ids[found.token_ids.index(13) + 1 :]
    assert model.codec.decode(behind) in ("yes", "no")
    if mode == "linear_spec":
        assert found.token_ids == answer(model, "ar", asked, max_thinking_tokens=7).token_ids


def test_what_cannot_go_together_is_refused(model: TriModeModel) -> None:
    with pytest.raises(UsageError, match="for quadratic self-speculation, no structured_outputs"):
        model.read_options("quadratic_spec", {"structured_outputs": {"regex": "a"}})
    with pytest.raises(UsageError, match="expected after_thinking"):
        answer(model, "ar", {"regex": "a"}, max_thinking_tokens=4)


def test_a_text_that_no_token_writes_is_an_error(model: TriModeModel) -> None:
    with pytest.raises(UsageError, match="text that the model's tokens can write"):
        answer(model, "ar", {"regex": "[ab]é"})


REQUESTS: tuple[Any, ...] = (
    {"json": PERSON},
    None,
    {"regex": "[a-z]{3,9} [0-9]{1,3}"},
    {"choice": ["red", "green", "blue"]},
    {"json": json.dumps(PERSON), "disable_any_whitespace": True},
    {"grammar": 'start: "(" start ")" | NAME\nNAME: /[a-z]{1,5}/'},
    StructuredOutputs(json={"type": "array", "items": {"enum": [1, 2]}, "maxItems": 4}),
)


def test_a_batch_gives_the_answers_of_single_runs(model: TriModeModel) -> None:
    batch = model.new_batch(3)
    todo = [(mode, asked) for mode in MODES for asked in REQUESTS]
    rows: dict[int, tuple[Any, Any]] = {}
    done: list[tuple[Any, Any, Any]] = []
    for mode, asked in todo:
        while not batch.num_free:
            for row, chunk in batch.step():
                if chunk.finish_reason:
                    done.append((*rows.pop(id(row)), row.result))
                    batch.finish(row)
        row = batch.add(prompt(model), mode, structured_outputs=asked, max_new_tokens=60)
        rows[id(row)] = (mode, asked)
    for row, chunk in batch:
        if chunk.finish_reason:
            done.append((*rows.pop(id(row)), row.result))
    assert len(done) == len(todo)
    for mode, asked, found in done:
        assert found.token_ids == answer(model, mode, asked, max_new_tokens=60).token_ids


def test_an_engine_gives_the_answers_of_single_runs(model: TriModeModel) -> None:
    with Engine(model, max_rows=3) as engine:
        bad = engine.submit(prompt(model), structured_outputs={"regex": "(a"})
        handles = [
            (
                mode,
                asked,
                engine.submit(
                    prompt(model), mode=mode, structured_outputs=asked, max_new_tokens=60, n=2
                ),
            )
            for mode in MODES
            for asked in REQUESTS
        ]
        for mode, asked, handle in handles:
            expected = answer(model, mode, asked, max_new_tokens=60)
            for one in handle.choices:
                result = one.result(120)
                assert result.token_ids == one.token_ids == expected.token_ids
                assert result.finish_reason == expected.finish_reason
        with pytest.raises(UsageError, match="unclosed group"):
            bad.result(60)
        first = handles[0][2]
        turn = prompt(model, "And Bob from Rome is 20 years old.")
        follow = engine.follow_up(first, turn, mode="ar", structured_outputs={"json": PERSON})
        text = model.codec.decode(follow.result(60).token_ids)
        assert follows_schema(PERSON)(text)
        assert follow.usage.cached_tokens > 0


def test_an_engine_that_closes_ends_what_is_compiled(model: TriModeModel) -> None:
    wide = {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(900)}}}
    engine = Engine(model, max_rows=2)
    handles = [
        engine.submit(prompt(model), structured_outputs={**wide, "after_thinking": bool(i % 2)})
        for i in range(6)
    ]
    assert handles[0].cancel()
    engine.close(drain=False)
    for handle in handles:
        with pytest.raises(RequestCancelledError):
            handle.result(30)
    with Engine(model, max_rows=2) as draining:
        last = draining.submit(prompt(model), structured_outputs={"choice": ["done"]})
    assert model.codec.decode(last.result(0).token_ids) == "done"

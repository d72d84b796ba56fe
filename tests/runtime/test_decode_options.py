"""Limits, stops, forced and forbidden tokens, log-probabilities: what the options promise, over
random options.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Built
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_reference import with_penalties
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from trimode.errors import UsageError
from trimode.runtime.decode.options import make_options
from trimode.runtime.decode.penalties import Penalties
from trimode.runtime.model import TriModeModel
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.stream import TextStream, first_stop

MODES = ("ar", "diffusion", "linear_spec")
THINK = 60
PIECES = ["a", "b", "ab", "ba", "c", "abc", " ", "\n", "\n\n", "x\n", "bca"]

OPTIONS = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 40),
        "block_length": st.sampled_from([1, 2, 5, 16]),
        "threshold": st.sampled_from([0.0, 0.1, 0.9]),
        "temperature": st.sampled_from([0.0, 0.0, 1.0]),
        "top_k": st.sampled_from([0, 3]),
        "repetition_penalty": st.sampled_from([1.0, 1.4]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.8, -0.3]),
        "eos_token_ids": st.lists(st.integers(0, 108), max_size=4),
        "min_new_tokens": st.integers(0, 12),
        "max_thinking_tokens": st.sampled_from([None, 0, 3, 17]),
        "seed": st.integers(0, 99),
    }
)


@pytest.fixture(scope="module")
def model(built: Callable[[str], Built], tmp_path_factory: pytest.TempPathFactory) -> TriModeModel:
    """A random model with a vocabulary of few and short texts, so that stop strings appear in every
    way.
    """
    it = built("one_kv_head")
    texts = {(PIECES[i % len(PIECES)] + "\u200b" * (i // len(PIECES))): i for i in range(109)}
    tokenizer = Tokenizer(WordLevel(texts, unk_token="a"))
    tokenizer.decoder = Fuse()
    folder: Path = tmp_path_factory.mktemp("codec")
    tokenizer.save(str(folder / "tokenizer.json"))
    model = TriModeModel(it.model.bundle, it.model.session)
    model.__dict__["codec"] = TextCodec(folder)
    return model


def with_ends(model: TriModeModel, options: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
    """Options whose end tokens do appear: some are taken from the greedy text."""
    free = model.stream([prompt], "ar", max_new_tokens=20, eos_token_ids=()).finish().token_ids
    ends = {free[i % 20] if i % 2 else i for i in options["eos_token_ids"]} - {
        model.model.mask_token_id
    }
    think = {"end_think_token_id": THINK} if options["max_thinking_tokens"] is not None else {}
    ends -= set(think.values())
    least = min(options["min_new_tokens"], options["max_new_tokens"])
    return {**options, "eos_token_ids": tuple(ends), "min_new_tokens": least, **think}


PROPERTY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PROPERTY
@given(
    mode=st.sampled_from(MODES),
    options=OPTIONS,
    prompt=st.lists(st.integers(12, 99), min_size=1, max_size=5),
)
def test_limits_hold(
    model: TriModeModel, mode: Any, options: dict[str, Any], prompt: list[int]
) -> None:
    options = with_ends(model, options, prompt)
    stream = model.stream([prompt], mode, logprobs=2, **options)
    chunks = [list(chunk.token_ids) for chunk in stream]
    result, ends = stream.result, options["eos_token_ids"]
    tokens = [token for chunk in chunks for token in chunk]
    assert result.token_ids == tokens
    assert options["min_new_tokens"] <= len(tokens) <= options["max_new_tokens"]
    assert not any(token in ends for token in tokens[:-1])
    assert not any(token in ends for token in tokens[: max(0, options["min_new_tokens"] - 1)])
    if result.finish_reason == "stop":
        assert tokens[-1] in ends
    else:
        assert (len(tokens), result.finish_reason) == (options["max_new_tokens"], "length")
    budget = options["max_thinking_tokens"]
    if budget is not None and len(tokens) > budget:
        assert THINK in tokens[: budget + 1]
    assert result.logprobs is not None
    assert [t.token_id for t in result.logprobs] == tokens


@PROPERTY
@given(
    options=OPTIONS,
    biases=st.dictionaries(st.integers(0, 108), st.sampled_from([-100.0, -3.0, 2.0]), max_size=4),
    prompt=st.lists(st.integers(12, 99), min_size=1, max_size=5),
)
def test_linear_spec_equals_ar_under_every_rule(
    model: TriModeModel, options: dict[str, Any], biases: dict[int, float], prompt: list[int]
) -> None:
    options = {**with_ends(model, options, prompt), "temperature": 0.0, "logit_bias": biases}
    expected = model.stream([prompt], "ar", logprobs=3, **options).finish()
    got = model.stream([prompt], "linear_spec", logprobs=3, **options).finish()
    assert got.token_ids == expected.token_ids
    assert got.finish_reason == expected.finish_reason
    assert got.logprobs is not None
    assert expected.logprobs is not None
    for a, b in zip(got.logprobs, expected.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        np.testing.assert_allclose([v for _, v in a.top], [v for _, v in b.top], atol=1e-3)


def test_greedy_under_rules_is_that_of_transformers_processors(
    built: Callable[[str], Built],
) -> None:
    it = built("one_kv_head")
    prompt, out = [20, 30, 40], []
    free = it.model.ar_generate([prompt], max_new_tokens=8, eos_token_id=())[0][0, 3:].tolist()
    ends = free[1:5]
    penalise, forbid = (
        RepetitionPenaltyLogitsProcessor(1.7),
        MinNewTokensLengthLogitsProcessor(3, 12, ends),
    )
    while len(out) < 30 and not (out and out[-1] in ends):
        ids = torch.tensor([prompt + out])
        out.append(int(forbid(ids, penalise(ids, it.reference.logits(prompt + out)[-1:])).argmax()))
    chosen = {
        "max_new_tokens": 30,
        "eos_token_id": ends,
        "repetition_penalty": 1.7,
        "min_new_tokens": 12,
    }
    assert it.model.ar_generate([prompt], **chosen)[0][0, 3:].tolist() == out
    assert (
        it.model.linear_spec_generate([prompt], block_length=8, **chosen)[0][0, 3:].tolist() == out
    )


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "auto"])
def test_greedy_under_penalties_is_the_slow_choice(
    built: Callable[[str], Built], mode: Any
) -> None:
    """Each token is the best one of the reference's logits as OpenAI's formula leaves them; a text
    that goes on counts the tokens of its own answer alone.
    """
    it = built("one_kv_head")
    prompt, free = [20, 30, 40], it.model.stream([[20, 30, 40]], "ar", max_new_tokens=4).finish()
    chosen: dict[str, Any] = {
        "presence_penalty": 0.9,
        "frequency_penalty": 0.6,
        "repetition_penalty": 1.1,
        "logit_bias": {free.token_ids[0]: -100, 33: 1.5},
    }
    sampling = make_options(**chosen).sampling
    tokens = list(prompt)
    for _ in range(2):
        begun = len(tokens)
        while len(tokens) < begun + 20:
            logits = it.reference.logits(tokens)[-1].numpy()
            tokens.append(
                int(with_penalties(logits, sampling, tokens[:begun], tokens[begun:]).argmax())
            )
    sequence = it.model.new_sequence([prompt])
    for _ in range(2):
        it.model.continue_sequence(
            sequence, mode, max_new_tokens=20, eos_token_ids=(), block_length=8, **chosen
        ).finish()
    assert sequence.tokens == tokens
    assert free.token_ids[0] not in tokens[len(prompt) :]


def test_penalties_know_what_a_denoised_block_has() -> None:
    """Log-probabilities of candidates, with tokens of the block beside those of the answer."""
    sampling = make_options(presence_penalty=0.5, frequency_penalty=0.25).sampling
    penalties = Penalties(sampling, 9, [1, 1, 2])
    for token in (3, 3, 4, 8):
        penalties.add(token)
    penalties.take_back(8)
    ids, filled = np.array([[0, 1, 3], [4, 5, 8]]), [4, 5, 5]
    found = penalties.changed(ids, np.zeros((2, 3), np.float32), np.array(filled))
    expected = with_penalties(np.zeros(9), sampling, [1, 1, 2], [3, 3, 4, *filled])[ids]
    np.testing.assert_allclose(found, expected)
    assert found[1, 2] == 0


@pytest.mark.parametrize("mode", MODES)
def test_asking_for_logprobs_changes_nothing_else(model: TriModeModel, mode: Any) -> None:
    for block_length, threshold in ((8, 0.0), (8, 0.2), (5, 0.9)):
        options: dict[str, Any] = {
            "max_new_tokens": 30,
            "block_length": block_length,
            "threshold": threshold,
            "eos_token_ids": (),
        }
        plain, reported = (
            model.stream([[20, 30]], mode, logprobs=n, **options).finish() for n in (None, 0)
        )
        assert (plain.token_ids, plain.nfe, plain.forwards) == (
            reported.token_ids,
            reported.nfe,
            reported.forwards,
        )
        assert plain.logprobs is None


def test_logprobs_are_those_of_the_model(built: Callable[[str], Built]) -> None:
    it = built("three_kv_heads")
    prompt = [20, 30, 40]
    options: dict[str, Any] = {
        "max_new_tokens": 9,
        "eos_token_ids": (),
        "temperature": 0.7,
        "top_p": 0.8,
        "seed": 3,
        "logprobs": 4,
    }
    for mode in ("ar", "linear_spec"):
        result = it.model.stream([prompt], mode, **options).finish()  # type: ignore[arg-type]
        logs = it.reference.logits(prompt + result.token_ids)[2:-1].log_softmax(-1)
        assert result.logprobs is not None
        for i, entry in enumerate(result.logprobs):
            assert entry.logprob == pytest.approx(float(logs[i, entry.token_id]), abs=1e-3)
            best = logs[i].topk(4)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            np.testing.assert_allclose(
                [value for _, value in entry.top], best.values.numpy(), atol=1e-3
            )


def test_logprobs_of_a_denoised_block(built: Callable[[str], Built]) -> None:
    """Threshold 0 fills all slots in one forward, whose probabilities they are; a slot that the
    budget wrote has none.
    """
    it = built("three_kv_heads")
    prompt, mask = [20, 30, 40], it.model.model.mask_token_id
    options: dict[str, Any] = {
        "block_length": 6,
        "max_new_tokens": 6,
        "threshold": 0.0,
        "eos_token_ids": (),
        "logprobs": 5,
    }
    result = it.model.stream(
        [prompt], "diffusion", max_thinking_tokens=4, end_think_token_id=THINK, **options
    ).finish()
    first = result.token_ids[0]
    logs = it.reference.logits([*prompt, first, mask, mask, mask, THINK, mask], block=6)[
        -6:
    ].log_softmax(-1)
    assert result.logprobs is not None
    assert result.logprobs[0].logprob == pytest.approx(
        float(it.reference.logits(prompt)[-1].log_softmax(-1)[first]), abs=1e-3
    )
    assert result.logprobs[4] == (THINK, None, ())
    for slot in (1, 2, 3, 5):
        best = logs[slot].topk(5)
        assert result.token_ids[slot] == best.indices[0]
        assert result.logprobs[slot].logprob == pytest.approx(float(best.values[0]), abs=1e-3)
        assert [token for token, _ in result.logprobs[slot].top] == best.indices.tolist()


@PROPERTY
@given(
    mode=st.sampled_from(MODES),
    stop=st.lists(
        st.sampled_from(["ab", "b\n", "\n\n", "ca", "abcab", "c c"]), min_size=1, max_size=3
    ),
    prompt=st.lists(st.integers(12, 99), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_stop_strings_end_a_text_wherever_tokens_begin(
    model: TriModeModel, mode: Any, stop: list[str], prompt: list[int], seed: int
) -> None:
    options = {
        "max_new_tokens": 40,
        "eos_token_ids": (),
        "temperature": 1.5,
        "seed": seed,
        "block_length": 8,
    }
    free = model.stream([prompt], mode, **options).finish().token_ids
    stream = model.stream([prompt], mode, stop=stop, logprobs=0, **options)
    pieces = list(stream.text())
    texts = [model.codec.decode(free[:n]) for n in range(len(free) + 1)]
    last = next((n for n, text in enumerate(texts) if any(s in text for s in stop)), None)
    expected = texts[-1] if last is None else texts[last][: first_stop(texts[last], stop)]
    result = stream.result
    assert "".join(pieces) == expected
    assert result.token_ids == free[:last]
    assert result.finish_reason == ("length" if last is None else "stop")
    assert result.logprobs is not None
    assert len(result.logprobs) == len(result.token_ids)


def test_a_stopped_sequence_goes_on_after_its_last_token(model: TriModeModel) -> None:
    for mode in MODES:
        sequence = model.new_sequence([[20, 21]])
        result = model.continue_sequence(
            sequence, mode, max_new_tokens=40, eos_token_ids=(), stop="a", min_new_tokens=3
        ).finish()  # type: ignore[arg-type]
        assert result.finish_reason == "stop"
        assert sequence.tokens == [20, 21, *result.token_ids]
        assert "a" in model.codec.decode(result.token_ids[-1:])
        assert len(result.token_ids) >= 3
        again = model.continue_sequence(sequence, "ar", max_new_tokens=5, eos_token_ids=()).finish()
        assert (
            again.token_ids
            == model.stream([[20, 21, *result.token_ids]], "ar", max_new_tokens=5, eos_token_ids=())
            .finish()
            .token_ids
        )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_streamed_text_is_certain_and_complete(model: TriModeModel, data: st.DataObject) -> None:
    """Brute force: of every split of a text into tokens and chunks, what is out before the end is a
    beginning of the final text.
    """
    tokens = data.draw(st.lists(st.integers(0, 10), max_size=12))
    stop = data.draw(st.lists(st.text("abc \n", min_size=1, max_size=4), min_size=1, max_size=3))
    text = model.codec.decode(tokens)
    end = first_stop(text, stop)
    stream, out = TextStream(model.codec, stop), ""
    for token in tokens:
        out += stream.push([token])
        assert (text if end is None else text[:end]).startswith(out)
        # Nothing is held back without need: what is, begins a stop string, or the stop string is
        # there.
        done = (
            model.codec.decode(tokens[: tokens.index(token) + 1])
            if tokens.count(token) == 1
            else None
        )
        if done is not None and not stream.is_stopped:
            held = done[len(out) :]
            assert not held or any(s.startswith(held) for s in stop)
    assert out + stream.finish() == (text if end is None else text[:end])
    assert stream.is_stopped == (end is not None)


def test_an_incomplete_character_does_not_hide_a_stop_string(tmp_path: Path) -> None:
    from tokenizers.decoders import ByteFallback, Sequence

    tokenizer = Tokenizer(WordLevel({"<0x0A>": 0, "<0xC3>": 1, "<0xA9>": 2, "z": 3}, unk_token="z"))
    tokenizer.decoder = Sequence([ByteFallback(), Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    stream = TextStream(TextCodec(tmp_path), ["z\n"])
    assert [stream.push([3]), stream.push([0]), stream.is_stopped] == ["", "", True]
    other = TextStream(TextCodec(tmp_path), ["\u00e9\n"])
    assert [other.push([i]) for i in (3, 1, 2, 3)] == ["z", "", "", "\u00e9z"]


@pytest.mark.parametrize(
    ("mode", "wrong"),
    [
        ("ar", {"temperature": -1.0}),
        ("ar", {"top_p": 0}),
        ("ar", {"min_new_tokens": 9, "max_new_tokens": 8}),
        ("ar", {"min_new_tokens": -1}),
        ("ar", {"stop": ["a", ""]}),
        ("ar", {"eos_token_ids": (109,)}),
        ("ar", {"eos_token_ids": (100,)}),
        ("ar", {"max_thinking_tokens": -1, "end_think_token_id": 1}),
        ("ar", {"max_thinking_tokens": 5, "end_think_token_id": 13, "eos_token_ids": (12, 13)}),
        ("ar", {"max_thinking_tokens": 5, "end_think_token_id": 200}),
        ("ar", {"max_thinking_tokens": 5}),
        ("ar", {"logprobs": -1}),
        ("ar", {"presence_penalty": 2.1}),
        ("linear_spec", {"frequency_penalty": -2.1}),
        ("ar", {"logit_bias": {20: 100.5}}),
        ("linear_spec", {"logit_bias": {109: 1.0}}),
        ("auto", {"logit_bias": {-1: 1.0}}),
        ("diffusion", {"logit_bias": {20: 1.0}}),
        ("ar", {"logprobs": 110}),
        ("diffusion", {"logprobs": 6}),
        ("diffusion", {"min_new_tokens": 1, "eos_token_ids": (1, 2, 3, 4, 5)}),
    ],
)
def test_bad_options(model: TriModeModel, mode: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as raised:
        model.stream([[20]], mode, **wrong)
    assert raised.value.hint


def test_logprobs_where_nobody_would_see_them(model: TriModeModel) -> None:
    with pytest.raises(UsageError, match="logprobs"):
        model.ar_generate([[20]], logprobs=1)  # type: ignore[call-arg]

"""Thinking and answer, against a slow version that sees the whole text, cut anywhere."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trimode import Engine, TriModeModel
from trimode.server.reasoning import Place, ThinkSplitter, count_reasoning, place_after

FRAGMENTS = ("<think>", "</think>", "<", "</", "think", ">", "\n", " ", "a", "</thin", "é🙂", "<b>")
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
places = st.sampled_from([Place.BEFORE, Place.THINKING, Place.ANSWER])


def split_whole(text: str, place: Place) -> tuple[str, str]:
    """The slow version."""
    if place is Place.BEFORE and text.lstrip().startswith("<think>"):
        text, place = text.lstrip().removeprefix("<think>"), Place.THINKING
    elif place is Place.THINKING and text.lstrip().startswith("<think>"):
        text = text.lstrip().removeprefix("<think>")
    if place is not Place.THINKING:
        return "", text
    reasoning, _, answer = text.partition("</think>")
    return reasoning, answer.lstrip("\n")


def split_pieces(pieces: list[str], place: Place) -> tuple[str, str]:
    splitter = ThinkSplitter(place)
    found = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(one.reasoning for one in found), "".join(one.content for one in found)


@given(texts, places, st.lists(st.integers(0, 60), max_size=8))
@example("a</think>\n\nb</think>c", Place.THINKING, [2, 11])
@example("  <think>", Place.BEFORE, [])
def test_any_split_is_the_whole(text: str, place: Place, cuts: list[int]) -> None:
    marks = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(marks)]
    expected = split_whole(text, place)
    assert split_pieces(pieces, place) == expected
    assert split_pieces(list(text), place) == expected


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("2 + 2 is 4</think>\n\nFour.", Place.THINKING, ("2 + 2 is 4", "Four.")),
        ("never ends", Place.THINKING, ("never ends", "")),
        ("ends in </thi", Place.THINKING, ("ends in </thi", "")),
        ("Four.", Place.ANSWER, ("", "Four.")),
        (
            "The tag </think> closes <think>.",
            Place.ANSWER,
            ("", "The tag </think> closes <think>."),
        ),
        ("x</think>The tag </think> again", Place.THINKING, ("x", "The tag </think> again")),
        ("\n<think>x</think>y", Place.BEFORE, ("x", "y")),
        ("<thinking>x", Place.BEFORE, ("", "<thinking>x")),
        ("<think>x</think>y", Place.THINKING, ("x", "y")),
        ("</think>y", Place.THINKING, ("", "y")),
        ("", Place.THINKING, ("", "")),
    ],
)
def test_cases(text: str, place: Place, expected: tuple[str, str]) -> None:
    assert split_pieces([text], place) == expected
    assert split_pieces(list(text), place) == expected


def test_what_is_certain_comes_at_once() -> None:
    splitter = ThinkSplitter(Place.THINKING)
    assert splitter.push("so ") == ("so ", "")
    assert splitter.push("a < b") == ("a < b", "")
    assert splitter.push("<") == ("", "")
    assert splitter.push("/thin") == ("", "")
    assert splitter.push("g") == ("</thing", "")
    assert splitter.push("</think>\nx") == ("", "x")
    assert splitter.push("</think>") == ("", "</think>")


@pytest.mark.parametrize(("enable", "place"), [(True, Place.THINKING), (False, Place.ANSWER)])
def test_the_demos_template(demo: Path, enable: bool, place: Place) -> None:
    """A user who writes the tag changes nothing."""
    with TriModeModel.from_pretrained(demo, num_threads=1) as model:
        for text in ("hi", "<think>", "</think>", "a <think>"):
            messages = [{"role": "user", "content": text}]
            prompt = model.codec.render_chat(messages, enable_thinking=enable)
            assert place_after(prompt) is place


def test_templates_without_the_tag() -> None:
    assert place_after("<|im_start|>assistant\n") is Place.BEFORE


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear_spec", "auto"])
def test_a_budget_ends_the_thinking(demo: Path, mode: str) -> None:
    """Exactly so many tokens, then the tag, and all of them are counted."""
    with TriModeModel.from_pretrained(demo, num_threads=1) as model, Engine(model) as engine:
        messages = [{"role": "user", "content": "Sort: 5 3 9 1"}]
        ids = model.codec.encode_chat(messages, enable_thinking=True)
        end = model.codec.token_id("</think>")
        assert end is not None
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": 30, "eos_token_ids": ()}
        if mode == "diffusion":
            ids = model.codec.encode("3 5 7 9 11 13 15")
        else:  # the demo closes the tag at once
            options["logit_bias"] = dict.fromkeys((12, 13), -100.0)
        free = engine.submit(ids, **options).result()
        budget = 3
        assert end not in free.token_ids
        handle = engine.submit(ids, max_thinking_tokens=budget, **options)
        tokens = handle.result().token_ids
        assert [place for place, token in enumerate(tokens) if token == end] == [budget]
        if mode != "diffusion":  # whose block would have been filled otherwise
            assert tokens[:budget] == free.token_ids[:budget]
        assert count_reasoning(tokens, Place.THINKING, end) == budget + 1
        assert handle.usage.completion_tokens == len(tokens) == 30
        splitter = ThinkSplitter(Place.THINKING)
        split = splitter.push(model.codec.decode(tokens))
        reasoning = split.reasoning + splitter.finish().reasoning
        assert reasoning == model.codec.decode(tokens[:budget])


def test_counting() -> None:
    assert count_reasoning([5, 13, 7], Place.THINKING, 13) == 2
    assert count_reasoning([5, 6], Place.THINKING, 13) == 2
    assert count_reasoning([5, 6], Place.BEFORE, 13) == 0
    assert count_reasoning([12, 5, 13, 6], Place.BEFORE, 13) == 3
    assert count_reasoning([5, 13, 7], Place.ANSWER, 13) == 0
    assert count_reasoning([5, 13, 7], Place.THINKING, None) == 0

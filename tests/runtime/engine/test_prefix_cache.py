"""The radix tree against a list of all texts, and its budget against what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trimode.runtime.engine.prefix_cache import Kind, PrefixCache, common_prefix

TOKEN = st.integers(0, 2)
TEXT = st.lists(TOKEN, min_size=1, max_size=24)
SALT = st.sampled_from([("salt", "a"), ("salt", "b")])


@dataclass(frozen=True)
class Run:
    """A segment that is its namespace and tokens, so that a wrong one shows."""

    salt: Any
    tokens: tuple[int, ...]

    def split(self, length: int) -> tuple[Run, Run]:
        assert 0 < length < len(self.tokens)
        return Run(self.salt, self.tokens[:length]), Run(self.salt, self.tokens[length:])


def insert(cache: PrefixCache[Run], salt: Any, text: list[int], ends: Any = ()) -> int:
    return cache.insert(salt, text, ends, lambda start, stop: Run(salt, tuple(text[start:stop])))


def kept(cache: PrefixCache[Run], salt: Any, text: list[int]) -> int:
    """Tokens of a text that are kept, read out of the segments."""
    match = cache.match(salt, text)
    read = [token for run, length in match.pieces for token in run.tokens[:length]]
    assert read == text[: match.length]
    assert all(run.salt == salt for run, _ in match.pieces)
    return match.length


def slow_prefix(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


@given(TEXT, TEXT)
def test_common_prefix(first: list[int], second: list[int]) -> None:
    assert common_prefix(first, second) == slow_prefix(first, second)


@pytest.mark.parametrize("budget", [10_000, 40])
def test_against_a_list_of_texts(budget: int) -> None:
    class Game(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.cache: PrefixCache[Run] = PrefixCache(budget)
            self.texts: list[tuple[Any, list[int]]] = []

        @rule(salt=SALT, text=TEXT, system=st.integers(0, 8), user=st.integers(0, 8))
        def insert(self, salt: Any, text: list[int], system: int, user: int) -> None:
            before = self.longest(salt, text)
            ends = [(system, Kind.SYSTEM), (system + user, Kind.USER)]
            added = insert(self.cache, salt, text, ends)
            self.texts.append((salt, text))
            if budget == 10_000:
                assert added == len(text) - before
                assert kept(self.cache, salt, text) == len(text)

        @rule(salt=SALT, text=TEXT)
        def match(self, salt: Any, text: list[int]) -> None:
            length = kept(self.cache, salt, text)
            if budget == 10_000:
                assert length == self.longest(salt, text)
            else:
                assert length <= self.longest(salt, text)

        def longest(self, salt: Any, text: list[int]) -> int:
            return max((slow_prefix(one, text) for s, one in self.texts if s == salt), default=0)

        @invariant()
        def counts(self) -> None:
            nodes = list(self.cache.nodes())
            assert self.cache.num_tokens == sum(len(node.tokens) for node in nodes) <= budget
            for node in nodes:
                assert node.segment is not None
                assert node.segment.tokens == tuple(node.tokens)
                assert all(child.parent is node for child in node.children.values())
                assert all(first == child.tokens[0] for first, child in node.children.items())

    case = Game.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
    case().runTest()


def test_the_longest_unused_goes_first() -> None:
    cache: PrefixCache[Run] = PrefixCache(9)
    for text in ([1, 1, 1], [2, 2, 2], [3, 3, 3]):
        assert insert(cache, "s", text) == 3
    assert kept(cache, "s", [1, 1, 1]) == 3
    assert insert(cache, "s", [4, 4, 4]) == 3
    assert [kept(cache, "s", [token] * 3) for token in (1, 2, 3, 4)] == [3, 0, 3, 3]
    assert cache.num_evicted == 3


def test_answers_go_before_user_turns_before_system_prompts() -> None:
    cache: PrefixCache[Run] = PrefixCache(9)
    insert(cache, "s", [1, 1, 1], [(3, Kind.SYSTEM)])
    insert(cache, "s", [2, 2, 2], [(3, Kind.USER)])
    insert(cache, "s", [3, 3, 3])
    found = []
    for token in (4, 5, 6):
        insert(cache, "s", [token] * 3, [(3, Kind.SYSTEM)])
        nodes = sorted((node.tokens[0], node.kind) for node in cache.nodes())
        found.append([token for token, _ in nodes])
    assert found == [[1, 2, 4], [1, 4, 5], [4, 5, 6]]


def test_what_is_a_prompt_now_was_an_answer_before() -> None:
    cache: PrefixCache[Run] = PrefixCache(6)
    insert(cache, "s", [1, 1, 1])
    insert(cache, "s", [1, 1, 1], [(3, Kind.USER)])
    insert(cache, "s", [2, 2, 2])
    insert(cache, "s", [3, 3, 3])
    assert [kept(cache, "s", [token] * 3) for token in (1, 2, 3)] == [3, 0, 3]


def test_a_text_longer_than_the_budget_keeps_its_beginning() -> None:
    cache: PrefixCache[Run] = PrefixCache(5)
    insert(cache, "other", [9, 9])
    assert insert(cache, "s", [1, 2, 3, 4, 5, 6, 7]) == 5
    assert kept(cache, "s", [1, 2, 3, 4, 5, 6, 7]) == 5
    assert insert(cache, "s", [1, 2, 3, 4, 5, 6, 7]) == 0
    assert insert(cache, "s", [1, 2, 8]) in (0, 1)
    assert kept(cache, "s", [1, 2]) == 2
    assert kept(cache, "other", [9, 9]) == 0
    assert insert(PrefixCache(0), "s", [1]) == 0

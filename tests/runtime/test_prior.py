"""What texts with a like prompt have shown: kinds of prompts, lengths, and how much a text's own
past counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from trimode.runtime.auto.prior import (
    GREATEST_WEIGHT,
    KIND_TRIALS,
    LEAST_PROMPTS,
    LEAST_WEIGHT,
    AcceptanceHistory,
    FinishedText,
    ends_of,
    tell_apart,
)


def text(
    prompt: list[int], tried: list[int], accepted: list[int], length: int | None = None
) -> FinishedText:
    return FinishedText(prompt, np.array(tried), np.array(accepted), length)


def test_kinds_are_the_beginnings_that_enough_prompts_share() -> None:
    """Against every beginning of every prompt: the longest one that a set of prompts shares stands
    for the set.
    """
    rng = np.random.default_rng(0)
    texts = []
    for number in range(300):
        prompt = [7, *rng.integers(0, 2, 3), *rng.integers(0, 5, rng.integers(0, 4))]
        tried = rng.integers(0, 5, 3)
        texts.append(
            FinishedText(
                [int(i) for i in prompt],
                tried,
                rng.integers(0, tried + 1),
                number if number % 3 else None,
            )
        )
    members: dict[tuple[int, ...], tuple[int, ...]] = {}
    for one in texts:
        for count in range(len(one.prompt) + 1):
            begin = tuple(one.prompt[:count])
            same = tuple(i for i, other in enumerate(texts) if tuple(other.prompt[:count]) == begin)
            members[same] = max(members.get(same, ()), begin, key=len)
    expected = {begin: same for same, begin in members.items() if len(same) >= LEAST_PROMPTS}
    found = tell_apart(texts)
    history = AcceptanceHistory(kinds=found)
    assert len(found) == len(expected) > 20
    for begin, same in expected.items():
        kind = list(history.kinds_of(begin))[-1]
        group = [texts[i] for i in same]
        assert (kind.num_tokens, kind.num_prompts) == (len(begin), len(group))
        assert kind.tried == tuple(sum(one.tried for one in group))
        assert kind.accepted == tuple(sum(one.accepted for one in group))
        assert kind.lengths == tuple(sorted(one.length for one in group if one.length is not None))


def test_a_kind_takes_a_hundredth_of_the_prompts() -> None:
    texts = [text([i // 9], [1], [1]) for i in range(1800)]
    assert [kind.num_tokens for kind in tell_apart(texts)] == [0]
    assert {kind.num_prompts for kind in tell_apart(texts[:450])} == {450, 9}


def test_each_kind_corrects_the_one_that_contains_it() -> None:
    texts = [text([5, 6], [9, 4], [9, 0]) for _ in range(10)] + [
        text([5, 8], [3, 0], [0, 0]) for _ in range(10)
    ]
    history = AcceptanceHistory(0.9, tell_apart(texts))
    whole = (90 + 0 + KIND_TRIALS * 0.9) / (90 + 30 + KIND_TRIALS)
    for prompt, first, second in (
        (
            [5, 6, 7],
            (90 + KIND_TRIALS * whole) / (90 + KIND_TRIALS),
            KIND_TRIALS * (KIND_TRIALS * 0.9 / (40 + KIND_TRIALS)) / (40 + KIND_TRIALS),
        ),
        ([5, 8], KIND_TRIALS * whole / (30 + KIND_TRIALS), KIND_TRIALS * 0.9 / (40 + KIND_TRIALS)),
        ([5, 9], whole, KIND_TRIALS * 0.9 / (40 + KIND_TRIALS)),
        ([4], 0.9, 0.9),
    ):
        kinds = list(history.kinds_of(prompt))
        assert history.prior(kinds, 3).rejection == pytest.approx([1 - first, 1 - second, 0.1])
        assert history.prior(kinds, 1).rejection == pytest.approx([1 - first])


def test_a_prompt_that_differs_in_the_middle_is_of_no_such_kind() -> None:
    kinds = tell_apart([text([1, 2, 3, number], [1], [1]) for number in range(10)])
    history = AcceptanceHistory(kinds=kinds)
    assert [kind.num_tokens for kind in history.kinds_of([1, 2, 3, 99])] == [3]
    assert not list(history.kinds_of([1, 9, 3, 4]))
    assert not list(history.kinds_of([1, 2]))


@pytest.mark.parametrize("shape", [0.7, 2.0])
def test_a_kind_weighs_the_less_the_more_its_texts_differ(shape: float) -> None:
    """Rejections of a Poisson process whose rate is drawn anew for each text: the estimate finds
    the shape that it was drawn with.
    """
    rng, texts = np.random.default_rng(3), []
    for _ in range(4000):
        rejections = rng.poisson(6 * rng.gamma(shape) / shape, 4)
        texts.append(FinishedText([1], rejections + 500, np.full(4, 500), None))
    (kind,) = tell_apart(texts)
    assert kind.weight == pytest.approx(shape, rel=0.15)


def test_texts_that_are_all_alike_weigh_most_and_those_with_nothing_in_common_least() -> None:
    alike = [text([1], [100], [90]) for _ in range(20)]
    assert tell_apart(alike)[0].weight == GREATEST_WEIGHT
    unlike = [text([1], [100], [100 if i else 0]) for i in range(200)]
    assert tell_apart(unlike)[0].weight == LEAST_WEIGHT


def survival(ends: Sequence[float], longest: int) -> np.ndarray:
    hazard = np.array([*ends, *[ends[-1]] * longest])[:longest]
    return np.concatenate(([1.0], (1 - hazard).cumprod()))


def test_ends_of_texts_of_one_length() -> None:
    ends = ends_of([20] * 9, 9)
    assert ends[:20] == pytest.approx([0.0] * 20)
    assert ends[20] == pytest.approx(0.9)  # one more may be longer
    assert ends[-1] == 1 / 20
    assert len(ends) == 23


def test_ends_of_texts_follow_how_their_lengths_are_distributed() -> None:
    """Half of them are written as far as 40 tokens only, which says nothing of the ends behind."""
    rng = np.random.default_rng(4)
    lengths = np.clip(rng.normal(40, 6, 2000).round().astype(int), 1, None)
    found = survival(ends_of(lengths.tolist(), 2000), 80)
    for count in range(0, 70, 5):
        assert found[count] == pytest.approx((lengths >= count).mean(), abs=0.03)
    unfinished = survival(ends_of([length for length in lengths if length <= 40], 2000), 41)
    assert unfinished[41] == pytest.approx((lengths > 40).mean(), abs=0.05)


def test_nothing_known_of_lengths() -> None:
    assert len(ends_of([], 5)) == 0
    assert len(AcceptanceHistory().prior((), 4).ends) == 0
    kinds = tell_apart([text([1, n], [1], [1]) for n in range(9)])
    assert len(AcceptanceHistory(kinds=kinds).prior(kinds, 4).ends) == 0


def test_many_kinds_are_found_fast_enough_to_ask_before_each_text() -> None:
    """Each length of beginnings is looked up once, whatever the number of kinds."""
    prompts = [
        [*a, *b]
        for a, b in itertools.product(
            itertools.product(range(5), repeat=2), itertools.product(range(8), repeat=1)
        )
        for _ in range(9)
    ]
    history = AcceptanceHistory(kinds=tell_apart([text(list(p), [1], [1]) for p in prompts[:700]]))
    assert len(history._by_length) <= 4
    assert len(history.kinds) > 50

"""What the rest of a text will take, against a recursion over every outcome of every step."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from trimode.runtime.auto.prior import ends_of
from trimode.runtime.auto.remaining_time import RemainingTime, StepTimes

LENGTHS = (3, 5)
TIMES = StepTimes(LENGTHS, 1.0, (1.5, 1.9), (1.2, 1.6))
RATES = [0.9, 0.8, 0.7, 0.95]


def remaining_time_of(waste: float, lengths: tuple[int, ...] = ()) -> RemainingTime:
    return RemainingTime(RATES, ends_of(lengths, len(lengths)), TIMES, waste)


def outcomes(wanted: int) -> list[float]:
    """How likely a cycle yields 1, 2, ... ``wanted`` tokens."""
    reached = [float(np.prod(RATES[:k])) for k in range(wanted)] + [0.0]
    return [reached[k] - reached[k + 1] for k in range(wanted)]


def cycle_ms(number: int, tokens: float, waste: float) -> float:
    rows = tokens + waste * (LENGTHS[number] - tokens)
    return (1.5, 1.9)[number] + float(np.interp(rows, [1, 3, 5], [1.0, 1.2, 1.6]))


@pytest.mark.parametrize("waste", [0.0, 0.3, 1.0])
def test_the_least_time_where_the_end_is_known(waste: float) -> None:
    @cache
    def least(left: int) -> float:
        if left == 0:
            return 0.0
        found = [1.0 + least(left - 1)]
        for number, length in enumerate(LENGTHS):
            wanted = min(length, left)
            shares = outcomes(wanted)
            tokens = sum(share * (k + 1) for k, share in enumerate(shares))
            found.append(
                cycle_ms(number, tokens, waste)
                + sum(share * least(left - k - 1) for k, share in enumerate(shares))
            )
        return min(found)

    remaining = remaining_time_of(waste)
    assert remaining._until_end == pytest.approx([least(n) for n in range(11)])
    assert remaining.worth_until(4) == pytest.approx(
        [least(4) - least(3), least(3) - least(2), least(2) - least(1), least(1), 0.0]
    )


def test_the_least_time_where_only_the_distribution_of_lengths_is_known() -> None:
    """In a text that may end after any token, and of which only this is known, that it has not
    yet.
    """
    lengths = (4, 6, 7, 7, 9)
    ends, waste = ends_of(lengths, 5), 0.3
    remaining = remaining_time_of(waste, lengths)
    memoryless = remaining.ms_per_token * np.mean(lengths)

    def ends_at(count: int) -> float:
        return float(ends[min(count, len(ends) - 1)])

    @cache
    def least(written: int) -> float:
        if written >= len(ends) - 1:
            return float(memoryless)

        def behind(count: int) -> float:
            goes_on = np.prod([1 - ends_at(written + k) for k in range(1, count + 1)])
            return float(goes_on) * least(written + count)

        found = [1.0 + behind(1)]
        for number, length in enumerate(LENGTHS):
            useful, alive = 0.0, 1.0
            for k in range(1, length + 1):
                useful += alive * float(np.prod(RATES[: k - 1]))
                alive *= 1 - ends_at(written + k)
            shares = outcomes(length)
            found.append(
                cycle_ms(number, useful, waste)
                + sum(share * behind(k + 1) for k, share in enumerate(shares))
            )
        return min(found)

    for written in range(len(ends) + 3):
        assert remaining._rest_from(written) == pytest.approx(least(written))
    goes_on = remaining.goes_on(3)
    assert goes_on == pytest.approx(
        np.cumprod([1.0, *(1 - ends_at(4 + k) for k in range(5))]).tolist()
    )
    rest = np.array([least(3 + k) for k in range(6)]) * np.array(goes_on)
    assert remaining.worth(3, 1000) == pytest.approx((-np.diff(rest)).tolist())


def test_in_the_middle_of_a_text_of_unknown_length_all_tokens_are_worth_the_same() -> None:
    remaining = remaining_time_of(0.3)
    tokens = np.cumsum([1.0, *np.cumprod(RATES)])
    cycles = [
        cycle_ms(number, float(tokens[length - 1]), 0.3) / float(tokens[length - 1])
        for number, length in enumerate(LENGTHS)
    ]
    assert remaining.ms_per_token == pytest.approx(min(1.0, *cycles))
    assert remaining.worth(7, 1000) == pytest.approx([min(1.0, *cycles)] * 5)


def test_a_limit_that_comes_first_decides() -> None:
    """Of texts of 40 tokens that may have two more: as where the end is known."""
    remaining = remaining_time_of(0.3, (40,) * 9)
    assert remaining.worth(10, 2) == pytest.approx(remaining.worth_until(2))
    assert remaining.worth(10, 2)[2:] == [0, 0, 0]

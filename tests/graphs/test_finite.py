"""Numbers that are not finite, found in their bits; compared with numpy's own opinion."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from trimode.errors import CheckpointError
from trimode.formats.finite import FiniteCheck, finite_or, first_not_finite, is_within, largest

TYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
WORDS = {"nan": "NaN", "inf": "inf", "-inf": "-inf"}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_first_one_is_found(dtype: str, wrong: float) -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(TYPES[dtype])
    assert first_not_finite(values.tobytes(), dtype) is None
    values[[700, 999]] = wrong
    found = first_not_finite(values.tobytes(), dtype)
    assert found == (700, WORDS[str(abs(wrong) if np.isnan(wrong) else wrong)])
    assert found.at((10, 100)) == f"{found.value} at [7, 0]"
    assert found.at(()) == found.value


@pytest.mark.parametrize("dtype", TYPES)
def test_every_number_of_16_bits_is_judged_as_numpy_judges_it(dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    values = (
        (every.astype(np.uint32) << 16).view(np.float32)
        if dtype == "F32"
        else every.view(TYPES[dtype])
    )
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(values.astype(np.float32))
    assert first_not_finite(values[finite].tobytes(), dtype) is None
    for index in np.flatnonzero(~finite)[::37]:
        assert first_not_finite(values[index : index + 1].tobytes(), dtype) is not None


def test_arrays_and_nothing() -> None:
    table = np.zeros((3, 4), np.float32)
    table[1, 2] = np.nan
    assert first_not_finite(table) == (6, "NaN")
    assert first_not_finite(table.T) == (7, "NaN")
    assert first_not_finite(table[:, ::3]) is None
    assert first_not_finite(np.zeros((0, 4), np.float32)) is None
    assert first_not_finite(np.array(np.inf, np.float32)) == (0, "inf")


def test_places_are_counted_over_pieces() -> None:
    check = FiniteCheck("a.weight", (3, 5), "BF16")
    values = np.ones(15, ml_dtypes.bfloat16)
    values[13] = np.nan
    raw = values.tobytes()
    assert check.pass_by(raw[:10]) == raw[:10]
    assert check.pass_by(raw[10:20]) == raw[10:20]
    with pytest.raises(
        CheckpointError, match=r"a\.weight: expected finite weights, found NaN at \[2, 3\]"
    ) as raised:
        check.pass_by(raw[20:])
    assert raised.value.hint


def test_comparisons_that_nan_does_not_slip_through() -> None:
    nan, inf = float("nan"), float("inf")
    assert is_within(1.0, 1.0)
    assert not is_within(1.1, 1.0)
    assert not any(
        is_within(value, bound)
        for value, bound in (
            (nan, 1.0),
            (0.0, nan),
            (None, 1.0),
            (0.0, inf),
            (inf, inf),
            (-inf, 1.0),
        )
    )
    assert largest([]) == 0
    assert largest([0.0, 2.0, 1.0]) == 2
    assert np.isnan(largest([0.0, nan])) == np.isnan(largest([nan, 0.0])) == True  # noqa: E712
    assert (
        finite_or(None, nan),
        finite_or(0.0, inf),
        finite_or(0.0, None),
        finite_or(None, 0.5),
    ) == (None, 0.0, 0.0, 0.5)

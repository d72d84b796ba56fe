"""Switching modes, rolling back and going on inside a sequence equals starting afresh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Built
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimode.errors import UsageError

MODES = ("ar", "diffusion", "linear_spec")
STEP = st.tuples(
    st.sampled_from(MODES), st.integers(1, 40), st.sampled_from([1, 2, 8, 32]), st.booleans()
)


def finish(stream: Any) -> list[int]:
    return [token for chunk in stream for token in chunk.token_ids]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(STEP, min_size=2, max_size=6),
    turn=st.lists(st.integers(12, 99), max_size=4),
    cut=st.integers(0, 30),
)
def test_any_series_of_modes_equals_fresh_starts(
    built: Callable[[str], Built], steps: list[Any], turn: list[int], cut: int
) -> None:
    model = built("one_kv_head").model
    sequence = model.new_sequence([[20, 30, 40]])
    for i, (mode, count, block_length, use_drafter) in enumerate(steps):
        if i == 1 and turn:
            sequence.append(turn)
        if i == 2:
            sequence.truncate(max(1, len(sequence.tokens) - cut))
        options = {
            "max_new_tokens": count,
            "block_length": block_length,
            "use_drafter": use_drafter,
            "eos_token_ids": (7, 50),
        }
        before = list(sequence.tokens)
        got = finish(model.continue_sequence(sequence, mode, **options))
        assert got == finish(model.stream([before], mode, **options))
        assert sequence.tokens == before + got


def test_switching_reads_nothing_again(built: Callable[[str], Built]) -> None:
    model = built("three_kv_heads").model
    sequence = model.new_sequence([list(range(20, 90))])
    finish(model.continue_sequence(sequence, "ar", max_new_tokens=5, eos_token_ids=()))
    assert sequence.forwards.prefill == 1
    for mode in ("linear_spec", "diffusion", "ar", "diffusion", "linear_spec"):
        finish(model.continue_sequence(sequence, mode, max_new_tokens=40, eos_token_ids=()))
    assert sequence.forwards.prefill == 1


def test_cache_growth_keeps_the_contents(built: Callable[[str], Built]) -> None:
    """Past 256 slots the cache moves into a larger bucket, in the middle of a text."""
    it = built("one_kv_head")
    prompt = np.random.default_rng(3).integers(12, 100, 250).tolist()
    out, _ = it.model.ar_generate([prompt], max_new_tokens=30, eos_token_id=108)
    expected = list(prompt)
    for _ in range(30):
        expected.append(int(it.reference.logits(expected)[-1].argmax()))
    assert out[0].tolist() == expected


def test_prompts_longer_than_a_chunk(built: Callable[[str], Built]) -> None:
    it = built("three_kv_heads")
    prompt = np.random.default_rng(4).integers(12, 100, 900).tolist()
    stream = it.model.stream([prompt], "ar", max_new_tokens=1)
    assert finish(stream) == [int(it.reference.logits(prompt)[-1].argmax())]
    assert stream.result.prefill_forwards == 2


@pytest.mark.parametrize("mode", MODES)
def test_max_new_tokens_is_exact(built: Callable[[str], Built], mode: Any) -> None:
    model = built("plain").model
    for count in (1, 2, 31, 33):
        stream = model.stream([[20, 21]], mode, max_new_tokens=count, eos_token_ids=())
        assert len(finish(stream)) == count
        assert stream.result.finish_reason == "length"


@pytest.mark.parametrize("mode", MODES)
def test_a_text_ends_at_max_length(built: Callable[[str], Built], mode: Any) -> None:
    model = built("three_kv_heads").model
    prompt = [list(np.random.default_rng(5).integers(12, 100, model.model.max_length - 3))]
    stream = model.stream(prompt, mode, max_new_tokens=50, eos_token_ids=())
    assert (len(finish(stream)), stream.result.finish_reason) == (3, "length")


@pytest.mark.parametrize("mode", MODES)
def test_a_text_ends_with_its_end_token(built: Callable[[str], Built], mode: Any) -> None:
    model = built("one_kv_head").model
    tokens = finish(model.stream([[20, 21]], mode, max_new_tokens=40, eos_token_ids=()))
    end = tokens[6]
    stream = model.stream([[20, 21]], mode, max_new_tokens=40, eos_token_ids=(end, 3))
    assert finish(stream)[-1] == end
    assert stream.result.finish_reason == "stop"


def test_counts(built: Callable[[str], Built]) -> None:
    model = built("three_kv_heads").model
    stream = model.stream(
        [[20, 21]], "linear_spec", max_new_tokens=30, block_length=8, eos_token_ids=()
    )
    finish(stream)
    result = stream.result
    assert result.nfe == 1 + result.forwards.draft + result.forwards.verify
    assert result.forwards.draft == result.forwards.verify
    assert result.tokens_per_forward == pytest.approx(30 / result.nfe)
    assert result.acceptance_length is not None
    assert 29 <= result.acceptance_length * result.forwards.verify < 29 + 8
    assert result.elapsed_s > 0


def test_threshold_extremes(built: Callable[[str], Built]) -> None:
    """A threshold no probability reaches fills one slot a forward; threshold 0 fills all in one."""
    model = built("plain").model
    for threshold, denoise in ((1.0, 7), (0.0, 1)):
        stream = model.stream(
            [[20, 21]],
            "diffusion",
            max_new_tokens=8,
            block_length=8,
            threshold=threshold,
            eos_token_ids=(),
        )
        finish(stream)
        assert (stream.result.forwards.denoise, stream.result.nfe) == (denoise, denoise + 1)


@pytest.mark.parametrize(
    "ids",
    [
        [[]],
        [1, 2],
        [[1], [2]],
        [[1], [2, 3]],
        [[-1]],
        [[109]],
        [[1.5]],
        [[True]],
        [list(range(20)) * 60],
        [[[1]]],
    ],
    ids=lambda i: str(i)[:20],
)
def test_bad_ids(built: Callable[[str], Built], ids: Any) -> None:
    model = built("three_kv_heads").model
    with pytest.raises(UsageError) as raised:
        model.ar_generate(ids)
    assert raised.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"block_length": 0},
        {"block_length": 65},
        {"threshold": -0.1},
        {"threshold": 1.1},
        {"threshold": float("nan")},
        {"max_new_tokens": 0},
    ],
)
def test_bad_options(built: Callable[[str], Built], options: dict[str, Any]) -> None:
    model = built("three_kv_heads").model
    for call in (model.generate, model.linear_spec_generate):
        with pytest.raises(UsageError):
            call([[20]], **options)
    with pytest.raises(UsageError):
        model.stream([[20]], "fast")  # type: ignore[arg-type]


def test_threads_do_not_disturb_each_other(built: Callable[[str], Built]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = built("one_kv_head").model
    prompts = [[[20 + i, 30, 40]] for i in range(8)]
    alone = [model.linear_spec_generate(p, max_new_tokens=40)[0].tolist() for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(
                lambda p: model.linear_spec_generate(p, max_new_tokens=40)[0].tolist(), prompts
            )
        )
    assert together == alone

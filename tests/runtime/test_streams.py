"""What is closed, half-read or shared says so, rather than ending as if it was whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Built

from trimode.errors import UsageError
from trimode.runtime.model import TriModeModel

MODES: tuple[Any, ...] = ("ar", "diffusion", "linear_spec", "quadratic_spec", "auto")
FREE: dict[str, Any] = {"max_new_tokens": 20, "eos_token_ids": (), "block_length": 4}
PROMPT = [20, 30, 40]


@pytest.fixture
def model(quadratic: Callable[[str], Built]) -> TriModeModel:
    """One of the test's own, which it may close."""
    return TriModeModel.from_pretrained(quadratic("three_kv_heads").bundle, num_threads=1)


def every_call(model: TriModeModel, sequence: Any) -> dict[str, Callable[[], object]]:
    return {
        "ar_generate": lambda: model.ar_generate([PROMPT]),
        "generate": lambda: model.generate([PROMPT]),
        "linear_spec_generate": lambda: model.linear_spec_generate([PROMPT]),
        "self_spec_generate": lambda: model.self_spec_generate([PROMPT]),
        "auto_generate": lambda: model.auto_generate([PROMPT]),
        "stream": lambda: model.stream([PROMPT]),
        "new_sequence": lambda: model.new_sequence([PROMPT]),
        "continue_sequence": lambda: model.continue_sequence(sequence, "ar"),
        "new_batch": lambda: model.new_batch(2),
        "generate_batch": lambda: model.generate_batch([PROMPT]),
        "generate_batch of nothing": lambda: model.generate_batch([]),
        "predict": lambda: sequence.run(sequence.predict()),
    }


def test_a_closed_model_generates_nothing(model: TriModeModel) -> None:
    sequence = model.new_sequence([PROMPT])
    model.close()
    model.close()
    for name, call in every_call(model, sequence).items():
        with pytest.raises(UsageError, match="expected an open model, found it closed") as raised:
            call()
        assert "from_pretrained" in raised.value.hint, name
    with pytest.raises(UsageError, match="closed"):
        TriModeModel(model.bundle, model.session).ar_generate([PROMPT])


@pytest.mark.parametrize("mode", MODES)
def test_a_model_closed_in_the_middle(model: TriModeModel, mode: Any) -> None:
    finished, unread = model.stream([PROMPT], mode, **FREE), model.stream([PROMPT], mode, **FREE)
    tokens = finished.finish().token_ids
    with model:
        stream = model.stream([PROMPT], mode, **FREE)
        pieces = iter(stream)
        first = next(pieces)
    for read in (
        lambda: next(pieces),
        stream.finish,
        lambda: stream.result,
        lambda: list(stream),
        lambda: next(unread),
    ):
        with pytest.raises(UsageError, match="closed"):
            read()
    assert stream.so_far.token_ids == first.token_ids
    assert stream.so_far.finish_reason is None
    assert finished.result.token_ids == tokens


def test_a_batch_of_a_model_closed_in_the_middle(model: TriModeModel) -> None:
    batch = model.new_batch(3)
    done, row = (
        batch.add(PROMPT, "ar", max_new_tokens=1, eos_token_ids=()),
        batch.add(PROMPT, "ar", **FREE),
    )
    batch.step()
    assert not done.is_at_work
    model.close()
    for call in (
        batch.step,
        lambda: list(batch),
        lambda: batch.add(PROMPT, "ar"),
        lambda: batch.resume(done, "ar"),
    ):
        with pytest.raises(UsageError, match="closed"):
            call()
    assert (done.result.finish_reason, row.result.finish_reason) == ("length", None)
    with pytest.raises(UsageError, match="closed"):
        row.stream.result  # noqa: B018


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_is_half_read(model: TriModeModel, mode: Any) -> None:
    stream = model.stream([PROMPT], mode, **FREE)
    with pytest.raises(UsageError, match="read up to token 0"):
        stream.result  # noqa: B018
    seen = list(next(stream).token_ids)
    with pytest.raises(UsageError, match=f"read up to token {len(seen)}"):
        stream.result  # noqa: B018
    with pytest.raises(
        UsageError, match=f"nobody has read, found one that was read up to token {len(seen)}"
    ):
        stream.text()
    for chunk in stream:  # a loop may go on where another was left
        seen += chunk.token_ids
    assert (
        stream.result.token_ids == seen == model.stream([PROMPT], mode, **FREE).finish().token_ids
    )
    assert stream.finish() == stream.result
    assert next(stream, None) is None
    with pytest.raises(UsageError, match="read to its end"):
        list(stream)


def test_the_result_is_there_with_the_last_chunk(model: TriModeModel) -> None:
    stream = model.stream([PROMPT], "ar", **FREE)
    while next(stream).finish_reason is None:
        pass
    assert len(stream.result.token_ids) == 20
    assert list(stream) == []  # its end was not seen yet


def test_a_sequence_that_another_stream_continues(model: TriModeModel) -> None:
    sequence = model.new_sequence([PROMPT])
    first = model.continue_sequence(sequence, "linear_spec", **FREE)
    next(first)
    second = model.continue_sequence(sequence, "ar", **FREE)
    next(first)  # nothing has been read of the second
    count = len(first.so_far.token_ids)
    next(second)
    for read in (lambda: next(first), first.finish, lambda: first.result, lambda: list(first)):
        with pytest.raises(UsageError, match=f"continued by another after token {count}") as raised:
            read()
        assert "one stream at a time" in raised.value.hint
    tokens = second.finish().token_ids
    assert len(tokens) == 20
    assert sequence.tokens == PROMPT + first.so_far.token_ids + tokens
    # What is finished stays so, whatever becomes of its sequence.
    model.continue_sequence(sequence, "ar", **FREE).finish()
    assert second.result.token_ids == tokens


def test_two_streams_one_after_the_other(model: TriModeModel) -> None:
    sequence = model.new_sequence([PROMPT])
    streams = [
        model.continue_sequence(sequence, "ar", max_new_tokens=5, eos_token_ids=())
        for _ in range(2)
    ]
    results = [stream.finish() for stream in streams]
    assert [result.nfe for result in results] == [5, 5]
    assert [result.forwards.prefill + result.forwards.decode for result in results] == [5, 5]
    assert sequence.tokens == PROMPT + results[0].token_ids + results[1].token_ids


@pytest.mark.parametrize("change", [lambda s: s.append([20]), lambda s: s.truncate(3)])
def test_a_sequence_that_is_changed_under_its_stream(
    model: TriModeModel, change: Callable[[Any], None]
) -> None:
    sequence = model.new_sequence([PROMPT])
    stream = model.continue_sequence(sequence, "ar", **FREE)
    next(stream)
    change(sequence)
    with pytest.raises(UsageError, match="was changed or continued by another after token 1"):
        next(stream)
    assert len(model.continue_sequence(sequence, "ar", **FREE).finish().token_ids) == 20


def test_a_row_that_is_given_up(model: TriModeModel) -> None:
    batch = model.new_batch(2)
    row = batch.add(PROMPT, "ar", **FREE)
    batch.step()
    left = row.stream
    batch.resume(row, "linear_spec", **FREE)
    list(batch)
    assert len(row.result.token_ids) == 20
    assert row.result.finish_reason == "length"
    assert left.so_far.finish_reason is None
    with pytest.raises(UsageError, match="by another"):
        left.result  # noqa: B018
    other = batch.add(PROMPT, "ar", **FREE)
    batch.step()
    batch.finish(other)
    assert (len(other.result.token_ids), other.result.finish_reason) == (1, None)


def test_an_error_ends_a_stream_for_good(model: TriModeModel) -> None:
    """Of whatever kind, here an interruption from the keyboard."""
    sequence = model.new_sequence([PROMPT])
    stream = model.continue_sequence(sequence, "ar", **FREE)
    next(stream)
    answer = sequence.answer

    def interrupted(forward: Any) -> Any:
        raise KeyboardInterrupt

    sequence.answer = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    sequence.answer = answer  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="an error has ended: KeyboardInterrupt"):
        next(stream)
    expected = model.stream([sequence.tokens], "ar", **FREE).finish().token_ids
    assert model.continue_sequence(sequence, "ar", **FREE).finish().token_ids == expected

"""The engine over real bundles: threads, asyncio, limits; texts are those of single runs."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Built

from trimode import Engine, Generation, Handle, TriModeModel
from trimode.errors import (
    EngineError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
    UsageError,
)

MODES: tuple[Any, ...] = ("ar", "diffusion", "linear_spec", "quadratic_spec", "auto")


@pytest.fixture(scope="module")
def model(quadratic: Callable[[str], Built]) -> TriModeModel:
    """Random weights, all modes."""
    return quadratic("three_kv_heads").model


@pytest.fixture(scope="module")
def engine(model: TriModeModel) -> Iterator[Engine]:
    with Engine(model, max_rows=3) as engine:
        yield engine


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((length, seed)).integers(12, 99, length).tolist()


def alone(model: TriModeModel, ids: list[int], mode: Any, **options: Any) -> Generation:
    return model.stream([ids], mode, **options).finish()


def same(found: Generation, expected: Generation) -> bool:
    return (found.token_ids, found.finish_reason, found.nfe, found.seed) == (
        expected.token_ids,
        expected.finish_reason,
        expected.nfe,
        expected.seed,
    )


def options_of(number: int, mode: str) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": 5 + 7 * (number % 5), "eos_token_ids": (7, 50)}
    if mode != "quadratic_spec" and number % 3 == 1:
        options |= {"temperature": 1.0, "seed": number}
    return options


def test_many_threads(model: TriModeModel) -> None:
    """Prompts that share prefixes, in all modes, from four threads."""
    stem, found = prompt_of(280), {}

    def client(engine: Engine, number: int) -> None:
        for turn in range(5):
            mode = MODES[(number + turn) % len(MODES)]
            ids = [*stem[: 40 * (number + turn) + 1], *prompt_of(3, number)]
            handle = engine.submit(ids, mode=mode, **options_of(turn, mode))
            pieces = [token for piece in handle for token in piece]
            assert pieces == handle.result().token_ids
            found[number, turn] = (ids, mode, options_of(turn, mode), handle.result())

    with Engine(model, max_rows=3) as engine:
        threads = [threading.Thread(target=client, args=(engine, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
    assert len(found) == stats.finished == 20
    for ids, mode, options, result in found.values():
        expected = alone(model, ids, mode, **options)
        assert same(result, expected), (mode, options, result, expected)
    assert stats.hits > 10
    assert stats.cached_tokens < stats.prompt_tokens
    assert stats.rows_per_forward > 1


def test_asyncio(model: TriModeModel, engine: Engine) -> None:
    async def pieces(handle: Handle) -> list[int]:
        return [token async for piece in handle for token in piece]

    async def main() -> None:
        ids = prompt_of(30)
        handles = [engine.submit(ids, mode=mode, max_new_tokens=12) for mode in MODES]
        texts = await asyncio.gather(*map(pieces, handles))
        results = await asyncio.gather(*handles)
        for mode, text, result in zip(MODES, texts, results, strict=True):
            assert text == result.token_ids
            assert same(result, alone(model, ids, mode, max_new_tokens=12))

    asyncio.run(main())


def test_a_cancelled_task_cancels_its_request(engine: Engine) -> None:
    def slow() -> Handle:
        return engine.submit(
            prompt_of(20),
            mode="ar",
            max_new_tokens=200,
            eos_token_ids=(),
            on_piece=lambda _: time.sleep(0.01),
        )

    async def wait(handle: Handle) -> None:
        await handle

    async def read(handle: Handle) -> None:
        async for _ in handle:
            pass

    async def main() -> list[Handle]:
        handles = [slow(), slow()]
        tasks = [asyncio.ensure_future(wait(handles[0])), asyncio.ensure_future(read(handles[1]))]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        return handles

    for handle in asyncio.run(main()):
        assert isinstance(handle.error, RequestCancelledError)
        seen = handle.token_ids
        time.sleep(0.03)
        assert handle.token_ids == seen


def test_callbacks(engine: Engine) -> None:
    pieces: list[list[int]] = []
    ended = threading.Event()
    handle = engine.submit(prompt_of(9), mode="ar", max_new_tokens=6, on_piece=pieces.append)
    handle.add_done_callback(lambda _: ended.set())
    handle.add_done_callback(lambda _: 1 / 0)  # logged, and nobody else's trouble
    assert ended.wait(20)
    assert [token for piece in pieces for token in piece] == handle.result().token_ids
    late = threading.Event()
    handle.add_done_callback(lambda _: late.set())
    assert late.is_set()


def test_several_texts_after_one_prompt(model: TriModeModel, engine: Engine) -> None:
    ids = prompt_of(90, 5)
    before = engine.stats().prompt_tokens - engine.stats().cached_tokens
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "eos_token_ids": ()}
    handle = engine.submit(ids, mode="linear_spec", n=3, seed=4, **options)
    assert handle.choices[0] is handle
    for seed, choice in enumerate(handle.choices, 4):
        assert same(choice.result(), alone(model, ids, "linear_spec", seed=seed, **options))
    computed = engine.stats().prompt_tokens - engine.stats().cached_tokens - before
    assert computed == 90 + 2


def test_a_conversation_goes_on(model: TriModeModel, engine: Engine) -> None:
    handle = engine.submit(prompt_of(40, 3), mode="ar", max_new_tokens=10, eos_token_ids=())
    answer = handle.result().token_ids
    more = engine.follow_up(handle, [20, 21], mode="diffusion", max_new_tokens=10)
    ids = [*prompt_of(40, 3), *answer, 20, 21]
    assert same(more.result(), alone(model, ids, "diffusion", max_new_tokens=10))
    assert more.usage.cached_tokens >= 49
    assert more.usage.prompt_tokens == len(ids)


def test_refused_at_once(model: TriModeModel, engine: Engine) -> None:
    room = model.model.max_length
    for options, text in [
        ({"ids": prompt_of(room - 5), "max_new_tokens": 6}, "at most 5 new tokens"),
        ({"ids": prompt_of(room)}, "shorter than"),
        ({"ids": []}, "empty"),
        ({"ids": [1], "mode": "fast"}, "a mode among"),
        ({"ids": [1], "temperature": -1.0}, "temperature"),
        ({"ids": [1], "n": 0}, "n of at least 1"),
        ({"ids": [1], "tokens": 5}, "a keyword"),
        ({"ids": [1], "cache_salt": 5}, "a string"),
        ({"ids": [1], "timeout_s": "soon"}, "a finite number"),
    ]:
        with pytest.raises(UsageError, match=text):
            engine.submit(**options)
    last = engine.submit(prompt_of(room - 5), mode="ar", eos_token_ids=())
    assert len(last.result().token_ids) == 5
    for wrong in ({"max_rows": 0}, {"prefill_share": 1.0}, {"max_queue": -1}, {"mode": "x"}):
        with pytest.raises(UsageError):
            Engine(model, **wrong)  # type: ignore[arg-type]


def test_the_queue_is_limited(model: TriModeModel) -> None:
    with Engine(model, max_rows=1, max_queue=2) as engine:
        first = [engine.submit([20 + n], mode="ar", max_new_tokens=150) for n in range(3)]
        with pytest.raises(QueueFullError, match="at most 3"):
            engine.submit([20])
        first[2].cancel()
        with pytest.raises(QueueFullError):
            engine.submit([20], n=2)
        engine.submit([20], mode="ar", max_new_tokens=1)
        for handle in first[:2]:
            handle.result()
    assert engine.stats().finished == 3


def test_a_deadline(engine: Engine) -> None:
    handle = engine.submit(prompt_of(9), mode="ar", timeout_s=0.01, max_new_tokens=250)
    with pytest.raises(RequestTimeoutError, match="within its time"):
        handle.result()
    with pytest.raises(RequestTimeoutError):
        list(handle)
    slow = engine.submit(prompt_of(9), mode="ar", max_new_tokens=250, eos_token_ids=())
    with pytest.raises(TimeoutError):
        slow.result(timeout_s=0.0)
    assert len(slow.result().token_ids) == 250


def test_closing(model: TriModeModel) -> None:
    engine = Engine(model, max_rows=1)
    handles = [engine.submit([20 + n], mode="ar", max_new_tokens=20) for n in range(3)]
    engine.close()
    assert all(handle.done and handle.error is None for handle in handles)
    engine.close()
    with pytest.raises(UsageError, match="an open engine"):
        engine.submit([20])
    model.check_open()  # it was not the engine's


def test_an_error_in_the_block_stops_at_once(model: TriModeModel) -> None:
    handles: list[Handle] = []

    def block() -> None:
        with Engine(model, max_rows=1) as engine:
            handles.append(
                engine.submit(
                    [20], mode="ar", max_new_tokens=250, on_piece=lambda _: time.sleep(0.01)
                )
            )
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert isinstance(handles[0].error, RequestCancelledError)


def test_closing_within_a_time(model: TriModeModel) -> None:
    engine = Engine(model, max_rows=1)
    handles = [engine.submit([20], mode="ar", max_new_tokens=250) for _ in range(40)]
    engine.close(timeout_s=0.05)
    assert all(handle.done for handle in handles)
    assert isinstance(handles[-1].error, RequestCancelledError)


def test_an_engine_that_nobody_holds_ends(model: TriModeModel) -> None:
    engine = Engine(model)
    engine.submit([20], mode="ar", max_new_tokens=3).result()
    thread = engine._worker._thread
    gone = weakref.ref(engine)
    del engine
    deadline = time.perf_counter() + 20
    while (gone() is not None or thread.is_alive()) and time.perf_counter() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None
    assert not thread.is_alive()


def test_an_engine_that_has_stopped(model: TriModeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(model, max_rows=2) as engine:
        running = engine.submit([20], mode="ar", max_new_tokens=250, eos_token_ids=())
        next(iter(running))

        def fail(*_: Any) -> Any:
            raise RuntimeError("the graph is gone")

        monkeypatch.setattr(engine._core._steps, "_outputs", fail)
        with pytest.raises(EngineError, match="the graph is gone"):
            running.result()
        for _ in range(6):
            try:
                engine.submit([20], mode="ar").result()
            except EngineError as error:
                last = error
        assert engine.error is not None
        assert not engine.stats().is_healthy
        assert "has stopped" in last.message


def test_a_bundle_is_opened_and_closed(built: Callable[[str], Built]) -> None:
    bundle: Path = built("plain").bundle
    with Engine(bundle, num_threads=1, target="portable") as engine:
        assert (
            len(engine.submit([20, 21], max_new_tokens=4, eos_token_ids=()).result().token_ids) == 4
        )
        opened = engine.model
    with pytest.raises(UsageError, match="closed"):
        opened.check_open()
    with pytest.raises(UsageError, match="keyword"):
        Engine(bundle, precission="bf16")

"""The engine over the demo bundle: conversations, shared prompts, and any interleaving."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimode import Engine, Handle, TriModeModel
from trimode.errors import RequestCancelledError

MODES: tuple[Any, ...] = ("ar", "diffusion", "linear_spec", "auto")
TURNS = ("Sort: 5 3 9 1", "What is 17 + 25?", "Reverse: a b c d", "What is 9 - 4?", "Sort: 8 2 7")


@pytest.fixture(scope="module")
def model(demo: Path) -> Iterator[TriModeModel]:
    with TriModeModel.from_pretrained(demo, num_threads=1, target="portable") as model:
        yield model


@pytest.mark.parametrize("mode", MODES)
def test_a_conversation_computes_only_what_is_new(model: TriModeModel, mode: str) -> None:
    """Re-tokenized history is what was generated, so over 90% of it is hit, in every mode."""
    messages: list[dict[str, str]] = []
    before = cached = total = 0
    with Engine(model, max_rows=2) as engine:
        for question in TURNS:
            messages.append({"role": "user", "content": question})
            ids = model.codec.encode_chat(messages)
            handle = engine.submit(ids, mode=mode, max_new_tokens=60)
            result = handle.result()
            assert (
                result.token_ids == model.stream([ids], mode, max_new_tokens=60).finish().token_ids
            )
            cached, total = cached + handle.usage.cached_tokens, total + before
            before = len(ids) + len(result.token_ids)
            answer = model.codec.decode(result.token_ids)
            messages.append({"role": "assistant", "content": answer})
    assert cached > 0.9 * total


def test_a_shared_prefix_is_read_once(model: TriModeModel) -> None:
    """Of 600 tokens, whether the first text is at work, has ended, or begins at the same time."""
    stem = [12 + (7 * i) % 80 for i in range(600)]
    with Engine(model, max_rows=4) as engine:
        handles = [engine.submit([*stem, 20 + n], mode="ar", max_new_tokens=4) for n in range(4)]
        for handle in handles:
            handle.result()
        handles.append(engine.submit([*stem, 90], mode="linear_spec", max_new_tokens=4))
        handles[-1].result()
        stats = engine.stats()
    assert [handle.usage.cached_tokens for handle in handles] == [0, 600, 600, 600, 600]
    assert stats.prompt_tokens - stats.cached_tokens == 601 + 4
    for n, handle in enumerate(handles[:4]):
        expected = model.stream([[*stem, 20 + n]], "ar", max_new_tokens=4).finish()
        assert handle.result().token_ids == expected.token_ids


@pytest.mark.parametrize("seed", range(4))
def test_any_interleaving(model: TriModeModel, seed: int) -> None:
    """Prompts with common beginnings from three threads, some cancelled, under a small budget."""
    rng = random.Random(seed)
    stems = [[12 + (k * i) % 80 for i in range(300)] for k in (3, 5)]
    stems[0][40:60] = [model.model.mask_token_id] * 20
    asked: list[tuple[Handle, list[int], Any, dict[str, Any]]] = []
    budget = rng.choice([0, 200_000, 10**9])

    def client(engine: Engine, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(8):
            ids = [
                *rng.choice(stems)[: rng.choice([1, 33, 40, 45, 60, 256, 299])],
                rng.randint(12, 90),
            ]
            mode = rng.choice(MODES)
            options: dict[str, Any] = {"max_new_tokens": rng.randint(1, 40), "eos_token_ids": ()}
            if mode != "auto" and rng.random() < 0.3:
                options |= {"temperature": 1.0, "seed": seed}
            salt = rng.choice(["a", "b"])
            handle = engine.submit(
                ids, mode=mode, cache_salt=salt, priority=rng.randint(0, 1), **options
            )
            asked.append((handle, ids, mode, options))
            if rng.random() < 0.2:
                next(iter(handle), None)
                handle.cancel()
            elif rng.random() < 0.5:
                handle.result()

    with Engine(model, max_rows=rng.choice([1, 2, 5]), kv_bytes=budget) as engine:
        threads = [threading.Thread(target=client, args=(engine, 10 * seed + n)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert engine.stats().kept_bytes <= budget
    for handle, ids, mode, options in asked:
        expected = model.stream([ids], mode, **options).finish().token_ids
        if isinstance(handle.error, RequestCancelledError):
            assert handle.token_ids == expected[: len(handle.token_ids)]
        else:
            assert handle.result().token_ids == expected, (mode, options)

"""A session without a network, whose tokens are computed from what lies in the K/V slots.

A slot holds a number made of the token, its position and whether a drafter wrote it. The next token
is a hash of all slots before it. So a slot that is missing, stale, of another text or of a draft
gives other tokens, and rounding plays no part.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import cache
from typing import Any

import numpy as np

from trimode.errors import UsageError
from trimode.formats.contract import GRAPH_NAMES, GraphName, ModelInfo
from trimode.runtime.decode.options import make_options
from trimode.runtime.decode.sequence import Sequence
from trimode.runtime.decode.stream import Generation, Stream

VOCAB, MASK, MAX_LENGTH, BLOCK = 128, 100, 300, 8
MODEL = ModelInfo(
    vocab_size=VOCAB,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=1,
    mask_token_id=MASK,
    bos_token_id=None,
    eos_token_ids=(127,),
    block_size=BLOCK,
    max_length=MAX_LENGTH,
    max_block_length=16,
    has_drafter=True,
)
_RNG = np.random.default_rng(0)
_POWERS = _RNG.integers(1, 2**62, MAX_LENGTH + 64).astype(np.uint64) * np.uint64(2) + np.uint64(1)
_FACTORS = _RNG.integers(1, 2**62, VOCAB).astype(np.uint64) * np.uint64(2) + np.uint64(1)
_SALTS = _RNG.integers(1, 2**62, VOCAB).astype(np.uint64)
_GOLD = np.uint64(0x9E3779B97F4A7C15)
SMALLEST = 32


def slots_of(tokens: Any, start: int, drafter_scale: float = 0.0) -> np.ndarray[Any, Any]:
    """What a forward writes for ``tokens`` from position ``start`` on."""
    tokens = np.asarray(tokens, np.int64)
    positions = np.arange(start, start + len(tokens))
    return tokens * 1_000_003 + positions * 7919 + 1 + round(drafter_scale * 500_000_000_007)


def mixed(value: Any) -> Any:
    with np.errstate(over="ignore"):
        value = np.asarray(value, np.uint64) * _GOLD
        value = (value ^ (value >> np.uint64(29))) * _GOLD
        return value ^ (value >> np.uint64(32))


def states_of(slots: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The state after each slot ``(n,)``."""
    with np.errstate(over="ignore"):
        return mixed(np.cumsum(slots.astype(np.uint64) * _POWERS[: len(slots)], dtype=np.uint64))


def logits_of(states: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``(n,)`` -> ``(n, V)``."""
    with np.errstate(over="ignore"):
        values = mixed(states[:, None] * _FACTORS + _SALTS) >> np.uint64(40)
    return (values.astype(np.float64) * 8 / 2**24).astype(np.float32)


class FakeCache:
    """Slots of several texts."""

    def __init__(self, session: FakeSession, num_rows: int) -> None:
        self.session, self.num_rows, self.capacity = session, num_rows, 0
        self.slots = np.full((num_rows, 0), -1, np.int64)
        self.bytes_per_token = 8

    def reserve(self, length: int) -> None:
        if length > self.capacity:
            old, self.capacity = self.slots, self.session.capacity_for(length)
            self.slots = np.full((self.num_rows, self.capacity), -1, np.int64)
            self.slots[:, : old.shape[1]] = old

    def move(self, source: int, destination: int, length: int | None = None) -> None:
        self.copy_prefix(source, destination, self.capacity if length is None else length)

    def copy_prefix(self, source: int, destination: int, length: int) -> None:
        self.copy_from(self, source, destination, length)

    def copy_from(self, other: FakeCache, source: int, destination: int, length: int) -> None:
        self.session.check("copy")
        assert length <= min(self.capacity, other.capacity)
        self.slots[destination, :length] = other.slots[source, :length]

    def export_prefix(self, row: int, start: int, length: int) -> list[np.ndarray[Any, Any]]:
        self.session.check("export")
        assert start + length <= self.capacity
        return [self.slots[row, start : start + length].reshape(1, length, 1).copy()]

    def import_prefix(self, row: int, start: int, arrays: Seq[np.ndarray[Any, Any]]) -> None:
        self.session.check("import")
        (array,) = arrays
        self.slots[row, start : start + array.shape[1]] = array[0, :, 0]


class FakeSession:
    """Runs the graphs on such slots.

    Attributes:
        on_use: Called with what is about to happen: a graph, ``copy``, ``export``, ``import``; may
            raise, and then slots behind the valid ones are garbage.
        log: Graph, rows, tokens a row and capacity of each forward.
        now: Seconds that all forwards have taken, by a rule.
    """

    max_prefill_rows: int | None = None
    max_batch = None
    is_closed = False

    def __init__(self, free_tokens: int = 8) -> None:
        self.free_tokens = free_tokens
        self.on_use: Callable[[str], None] | None = None
        self.log: list[tuple[GraphName, int, int, int]] = []
        self.now = 0.0

    def check(self, what: str) -> None:
        if self.on_use is not None:
            self.on_use(what)

    def check_block_length(
        self, block_length: int, graph_names: tuple[GraphName, ...] = GRAPH_NAMES
    ) -> None:
        """Any will do."""

    def close(self) -> None:
        self.is_closed = True

    def capacity_for(self, length: int) -> int:
        if length > 1024:
            raise UsageError(f"expected at most 1024 slots, found {length}")
        capacity = SMALLEST
        while capacity < length:
            capacity *= 2
        return capacity

    def new_cache(self) -> FakeCache:
        return FakeCache(self, 1)

    def new_batch_cache(self, num_rows: int) -> FakeCache:
        return FakeCache(self, num_rows)

    def run(
        self,
        graph_name: GraphName,
        cache: Any,
        ids: Any,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Any, ...]:
        cache.reserve(past_length + ids.shape[1])
        past, real = np.array([past_length]), np.array([ids.shape[1]])
        return self.run_rows(graph_name, cache, range(1), ids, past, real, drafter_scale)

    def run_rows(
        self,
        graph_name: GraphName,
        cache: Any,
        rows: range,
        ids: Any,
        past: Any,
        real: Any,
        drafter_scale: float = 0.0,
    ) -> tuple[Any, ...]:
        self.log.append((graph_name, len(rows), ids.shape[1], cache.capacity))
        self.now += 1e-3 * (1 + ids.size * cache.capacity / 256)
        try:
            self.check(graph_name)
        except Exception:
            for row, start in zip(rows, past, strict=True):
                cache.slots[row, start:] = -77
            raise
        found = [
            self._row(
                graph_name, cache.slots[row], ids[i], int(past[i]), int(real[i]), drafter_scale
            )
            for i, row in enumerate(rows)
        ]
        return tuple(np.array(output) for output in zip(*found, strict=True))

    def _row(
        self, graph_name: GraphName, slots: Any, ids: Any, past: int, real: int, scale: float
    ) -> tuple[Any, ...]:
        assert past + len(ids) <= min(len(slots), MODEL.num_positions), "beyond the cache"
        slots[past : past + len(ids)] = slots_of(ids, past, scale + 0.5 * (graph_name == "draft"))
        if graph_name == "draft":
            return _candidates(slots[:past], ids, past)
        logits = logits_of(states_of(slots[: past + len(ids)])[past:])
        greedy = logits.argmax(-1)
        if graph_name == "ar":
            return greedy[real - 1], logits[real - 1]
        accepted = next((i for i in range(len(ids) - 1) if ids[i + 1] != greedy[i]), len(ids) - 1)
        return greedy, accepted, logits


def _candidates(prefix: Any, block: Any, past: int) -> tuple[Any, Any]:
    """Drafts that are right three times in four: AR's own tokens, as far as they go."""
    ids, probabilities = [], []
    with np.errstate(over="ignore"):
        total = (prefix.astype(np.uint64) * _POWERS[:past]).sum(dtype=np.uint64)
        for i, token in enumerate(block.tolist()):
            state = mixed(total)
            best = int(logits_of(state[None])[0].argmax())
            noise = int(mixed(state + np.uint64(i)))
            if noise % 4 == 0:
                best = (best + 1 + noise % 7) % VOCAB
            ids.append([(best + 11 * k) % VOCAB for k in range(5)])
            first = 0.3 + 0.6 * (noise % 1000) / 1000
            probabilities.append([first, *[(1 - first) / 8 / 2**k for k in range(4)]])
            known = best if token == MASK and i else token
            total = total + slots_of([known], past + i).astype(np.uint64)[0] * _POWERS[past + i]
    return np.array(ids), np.array(probabilities, np.float32)


def stream_of(sequence: Sequence, mode: Any, **options: Any) -> Stream:
    return Stream(sequence, mode, make_options(**{"block_length": BLOCK, **options}))


def alone(ids: Seq[int], mode: Any, **options: Any) -> Generation:
    """The text's cold single run."""
    return _alone(tuple(ids), mode, tuple(sorted(options.items())))


@cache
def _alone(ids: tuple[int, ...], mode: Any, options: Any) -> Generation:
    sequence = Sequence(FakeSession(), MODEL, list(ids))
    return stream_of(sequence, mode, **dict(options)).finish()

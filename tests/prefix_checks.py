"""Copies between rows of caches against slow ones: number by number, in arrays of plain numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trimode.errors import UsageError
from trimode.formats.contract import GraphName

Slots = list[NDArray[np.generic]]
"""Keys and values of a whole cache, ``(rows, heads, capacity, head size)`` each; views."""
Look = Callable[[Any], Slots]


def bits(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """The same bytes as whole numbers, so that NaN equals itself."""
    return np.ascontiguousarray(array).view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def fill(cache: Any, seed: int) -> None:
    """Write random bits into every slot, NaN among them."""
    rng = np.random.default_rng(seed)
    for row in range(cache.num_rows):
        like = cache.slots.empty(cache.capacity)
        random_bits = np.frombuffer(rng.bytes(like.nbytes), like.dtype)
        cache.import_prefix(row, 0, list(random_bits.reshape(like.shape)))


def copied_slowly(
    to: Slots, source: Slots, rows: tuple[int, int], starts: tuple[int, int], length: int
) -> None:
    """Copy slot by slot and head by head: ``(source, destination)`` rows and first slots."""
    for ours, theirs in zip(to, source, strict=True):
        for slot in range(length):
            for head in range(ours.shape[1]):
                ours[rows[1], head, starts[1] + slot] = theirs[rows[0], head, starts[0] + slot]


class RandomCopies:
    """Random copies within and between caches, done by these and the slow way.

    Args:
        caches: Of one session, of any capacities.
        look: Shows a cache.
        seed: Decides which copies.
    """

    def __init__(self, caches: list[Any], look: Look, seed: int) -> None:
        self.caches, self.look, self.rng = caches, look, random.Random(seed)
        for number, cache in enumerate(caches):
            fill(cache, number)
        self.slow = [[bits(tensor).copy() for tensor in look(cache)] for cache in caches]
        self.exported: list[tuple[list[Any], Slots]] = []

    def copy(self, to: int, begin: int, rows: tuple[int, int], length: int) -> None:
        source = rows[0] % self.caches[to].num_rows
        self.caches[to].copy_prefix(source, rows[1], length)
        copied_slowly(self.slow[to], self.slow[to], (source, rows[1]), (0, 0), length)

    def move(self, to: int, begin: int, rows: tuple[int, int], length: int) -> None:
        source, known = rows[0] % self.caches[to].num_rows, self.rng.choice([length, None])
        self.caches[to].move(source, rows[1], known)
        length = self.caches[to].capacity if known is None else known
        copied_slowly(self.slow[to], self.slow[to], (source, rows[1]), (0, 0), length)

    def copy_from(self, to: int, begin: int, rows: tuple[int, int], length: int) -> None:
        self.caches[to].copy_from(self.caches[begin], *rows, length)
        copied_slowly(self.slow[to], self.slow[begin], rows, (0, 0), length)

    def export(self, to: int, begin: int, rows: tuple[int, int], length: int) -> None:
        start = self.rng.randint(0, self.caches[begin].capacity - length)
        arrays = self.caches[begin].export_prefix(rows[0], start, length)
        kept = [one[rows[0] : rows[0] + 1, :, start : start + length] for one in self.slow[begin]]
        self.exported.append((arrays, [one.copy() for one in kept]))

    def bring_in(self, to: int, begin: int, rows: tuple[int, int], length: int) -> None:
        arrays, kept = self.rng.choice(self.exported)
        room = self.caches[to].capacity - arrays[0].shape[1]
        if room >= 0:
            start = self.rng.randint(0, room)
            self.caches[to].import_prefix(rows[1], start, arrays)
            copied_slowly(self.slow[to], kept, (0, rows[1]), (0, start), arrays[0].shape[1])

    def step(self) -> None:
        """Do one copy, and compare all slots of all caches."""
        rng = self.rng
        to, begin = rng.randrange(len(self.caches)), rng.randrange(len(self.caches))
        rows = rng.randrange(self.caches[begin].num_rows), rng.randrange(self.caches[to].num_rows)
        most = min(self.caches[to].capacity, self.caches[begin].capacity)
        length = rng.choice([0, 1, 3, most - 1, most, rng.randint(0, most)])
        kinds = [self.copy, self.move, self.copy_from, self.export]
        rng.choice([*kinds, self.bring_in] if self.exported else kinds)(to, begin, rows, length)
        for cache, expected in zip(self.caches, self.slow, strict=True):
            for tensor, one in zip(self.look(cache), expected, strict=True):
                np.testing.assert_array_equal(bits(tensor), one)


def check_random_copies(caches: list[Any], look: Look, seed: int, steps: int) -> None:
    """After each copy all slots are those of the slow way; what was exported never changes."""
    copies = RandomCopies(caches, look, seed)
    for _ in range(steps):
        copies.step()
    for arrays, kept in copies.exported:
        for array, tensor in zip(arrays, kept, strict=True):
            np.testing.assert_array_equal(bits(array), tensor[0])
    for cache in caches:  # whoever gets the memory next must find numbers
        zeros = np.zeros_like(cache.slots.empty(cache.capacity))
        for row in range(cache.num_rows):
            cache.import_prefix(row, 0, list(zeros))


def check_forwards_behind_a_prefix(session: Any, graph_names: tuple[GraphName, ...]) -> None:
    """Forwards behind a prefix that came into a row in any way are those behind one that was
    computed there, to the bit; all other slots hold garbage.
    """
    rng = np.random.default_rng(5)
    text = rng.integers(12, 90, (1, 97))
    donor = session.new_batch_cache(2)
    donor.reserve(100)
    one = np.array([1])
    session.run_rows("ar", donor, range(1, 2), text, 0 * one, 97 * one)
    small, large = session.new_batch_cache(3), session.new_batch_cache(3)
    small.reserve(150)
    large.reserve(300)
    for length in (1, 2, 31, 64, 89):
        alone = session.new_batch_cache(1)
        alone.reserve(150)
        alone.import_prefix(0, 0, donor.export_prefix(1, 0, length))
        for way in ("copy", "copy from", "import in parts", "move"):
            cache = large if way == "copy from" else small
            for row in range(3):
                _spoil(cache, row, rng)
            _bring(way, cache, donor, length)
            for graph_name in graph_names:
                block = text[:, length : length + 8] if graph_name != "ar" else text[:, length:]
                inputs = (block, length * one, block.shape[1] * one)
                found, expected = (
                    [
                        np.array(out)
                        for out in session.run_rows(graph_name, c, range(r, r + 1), *inputs)
                    ]
                    for c, r in ((cache, 2), (alone, 0))
                )
                for ours, theirs in zip(found, expected, strict=True):
                    assert np.isfinite(theirs).all()
                    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
                    if ours.dtype == np.int64:
                        np.testing.assert_array_equal(ours, theirs)


def _spoil(cache: Any, row: int, rng: Any) -> None:
    like = cache.slots.empty(cache.capacity)
    numbers = (3 * rng.standard_normal(like.shape)).astype(like.dtype)
    cache.import_prefix(row, 0, list(numbers))


def _bring(way: str, cache: Any, donor: Any, length: int) -> None:
    """Let row 2 have a prefix of the donor's row 1."""
    if way == "import in parts":
        for start, end in ((0, length // 2), (length // 2, length)):
            cache.import_prefix(2, start, donor.export_prefix(1, start, end - start))
    elif way in ("copy", "move"):
        cache.copy_from(donor, 1, 0, length)
        (cache.copy_prefix if way == "copy" else cache.move)(0, 2, length)
    else:
        cache.copy_from(donor, 1, 2, length)


def check_refusals(cache: Any, other: Any) -> None:
    """What names rows, slots or arrays that there are not is refused, and changes nothing.

    Args:
        cache: Has rows 0 and 1 and at least 10 slots.
        other: Cache of another session or target.
    """
    capacity = cache.capacity
    before = [cache.export_prefix(row, 0, capacity) for row in (0, 1)]
    good = cache.export_prefix(0, 0, 2)
    calls: list[Callable[[], object]] = [
        lambda: cache.copy_prefix(0, 2, 1),
        lambda: cache.copy_prefix(-1, 0, 1),
        lambda: cache.copy_prefix(0, 1, capacity + 1),
        lambda: cache.copy_prefix(0, 1, -1),
        lambda: cache.move(2, 0),
        lambda: cache.export_prefix(0, 1, capacity),
        lambda: cache.export_prefix(0, -1, 1),
        lambda: cache.import_prefix(0, capacity - 1, good),
        lambda: cache.import_prefix(2, 0, good),
        lambda: cache.import_prefix(0, 0, good[:-1]),
        lambda: cache.import_prefix(0, 0, []),
        lambda: cache.import_prefix(0, 0, [*good[:-1], good[-1][:, :1]]),
        lambda: cache.import_prefix(0, 0, [*good[:-1], good[-1][:1]]),
        lambda: cache.import_prefix(0, 0, [one.astype(np.float64) for one in good]),
        lambda: cache.import_prefix(0, 0, [one[0] for one in good]),
        lambda: cache.copy_from(other, 0, 0, 1),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"expected .*, found"):
            call()
    for row in (0, 1):
        for array, kept in zip(cache.export_prefix(row, 0, capacity), before[row], strict=True):
            np.testing.assert_array_equal(bits(array), bits(kept))

"""Holds what sequences occupy on the GPU, and hands it on.

That is one sequence, or several side by side. The next ones take the memory over.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import numpy as np

from trimode.errors import DeviceError
from trimode.formats.contract import GraphName
from trimode.runtime.sessions.base import Array, BatchCache, Closable
from trimode.runtime.sessions.prefix import (
    SlotFormat,
    beyond_target,
    check_same_session,
    check_slots,
)
from trimode.runtime.sessions.tensorrt.graph import Runner
from trimode.runtime.sessions.tensorrt.memory import DeviceMemory, Lines, RecordedWork, Stream
from trimode.runtime.sessions.tensorrt.target import PreparedEngines


class TensorRTCache:
    """Holds keys and values of sequences.

    Its capacity is the smallest that engines were built for and that holds what was asked for. The
    memory goes to the next ones when this is dropped.

    Args:
        pool: Pool that lends the memory.
        num_rows: Number of sequences.
    """

    def __init__(self, pool: MemoryPool, num_rows: int) -> None:
        self._pool, self.num_rows = pool, num_rows
        self.slots = pool.slots
        self.bytes_per_token = self.slots.bytes_per_token
        self._lease: Lease | None = None
        if pool.has_one_capacity:  # there is nothing to wait for
            self.reserve(1)

    @property
    def capacity(self) -> int:
        """Number of slots of a sequence; 0 before any were asked for."""
        return self._lease.memory.capacity if self._lease else 0

    @property
    def lease(self) -> Lease:
        """The memory, for whoever needs it longer than this cache does."""
        if self._lease is None:
            self.reserve(1)
        assert self._lease is not None
        return self._lease

    @property
    def memory(self) -> SequenceMemory:
        """Where everything lies; another place after it has grown."""
        return self.lease.memory

    def reserve(self, length: int) -> None:
        if length > self.capacity:
            self._grow(self._pool.engines_for(length))

    def expect(self, num_tokens: int) -> None:
        """Have the capacity for a text of this length at once.

        The cache does not grow to it step by step.
        """
        engines = self._pool.engines_for_text(num_tokens)
        if engines.capacity > self.capacity:
            self._grow(engines)

    def move(self, source: int, destination: int, length: int | None = None) -> None:
        self.copy_prefix(source, destination, self.capacity if length is None else length)

    def copy_prefix(self, source: int, destination: int, length: int) -> None:
        self.copy_from(self, source, destination, length)

    def copy_from(self, other: BatchCache, source: int, destination: int, length: int) -> None:
        theirs = cast("TensorRTCache", other)
        check_same_session(self._pool, getattr(other, "_pool", None))
        check_slots(self, destination, 0, length)
        check_slots(theirs, source, 0, length)
        if length and (self, destination) != (theirs, source):
            to, begin = self.memory.lines(destination, 0), theirs.memory.lines(source, 0)
            with self._pool.turn() as stream:
                self._copy(stream, to, begin, length)

    def export_prefix(self, row: int, start: int, length: int) -> list[Array]:
        check_slots(self, row, start, length)
        arrays = list(self.slots.empty(length))
        if length:
            with self._pool.turn() as stream:
                self._copy(stream, _host_lines(arrays), self.memory.lines(row, start), length)
                stream.synchronize()
        return arrays

    def import_prefix(self, row: int, start: int, arrays: Sequence[Array]) -> None:
        length = self.slots.length_of(arrays)
        check_slots(self, row, start, length)
        if length:
            arrays = [np.ascontiguousarray(array) for array in arrays]
            with self._pool.turn() as stream:
                self._copy(stream, self.memory.lines(row, start), _host_lines(arrays), length)
                stream.synchronize()

    def _grow(self, engines: PreparedEngines) -> None:
        """Go to memory of a larger capacity, with all rows."""
        grown, old = self._pool.take(engines, self.num_rows), self._lease
        if old is not None:
            heads = self.num_rows * self.slots.num_heads  # those of all rows lie side by side
            with self._pool.turn() as stream:
                self._copy(
                    stream, grown.memory.lines(0, 0), old.memory.lines(0, 0), self.capacity, heads
                )
        self._lease = grown

    def _copy(
        self,
        stream: Stream,
        destination: list[Lines],
        source: list[Lines],
        length: int,
        num_heads: int | None = None,
    ) -> None:
        """Queue copying slots, tensor by tensor.

        They are those of one row, or of ``num_heads`` heads.
        """
        width, height = length * self.slots.head_bytes, num_heads or self.slots.num_heads
        for to, begin in zip(destination, source, strict=True):
            stream.copy_lines(to, begin, width, height)


def _host_lines(arrays: Sequence[Array]) -> list[Lines]:
    """Where the heads of contiguous arrays ``(heads, length, head size)`` lie."""
    return [Lines(array.ctypes.data, array.strides[0], is_on_gpu=False) for array in arrays]


class Lease:
    """Gives memory back when nobody refers to the lease any more.

    Caches refer to it, and outputs that lie in the memory.
    """

    def __init__(self, pool: MemoryPool, memory: SequenceMemory) -> None:
        self.memory = memory
        weakref.finalize(self, pool.give_back, memory).atexit = False


class MemoryPool(Closable):
    """Hands memory of sequences on from one cache to the next.

    Args:
        capacities: Prepared engines of each capacity, ascending.
        slots: Format of a slot of a sequence.
        stream: Stream on which everything is queued.

    Attributes:
        lock: Lock that is held while something is queued: what is queued while a forward is
            recorded would be recorded with it.
    """

    def __init__(
        self, capacities: Sequence[PreparedEngines], slots: SlotFormat, stream: Stream
    ) -> None:
        self._capacities, self.slots, self._stream = capacities, slots, stream
        self._free: dict[tuple[int, int], list[SequenceMemory]] = {}
        self.lock = threading.Lock()

    @property
    def has_one_capacity(self) -> bool:
        """Whether all sequences have the same."""
        return len(self._capacities) == 1

    def engines_for(self, length: int) -> PreparedEngines:
        """Return the engines of the smallest capacity that holds ``length`` slots.

        Raises:
            UsageError: the largest is smaller.
        """
        for engines in self._capacities:
            if length <= engines.capacity:
                return engines
        raise beyond_target(self._capacities[-1].capacity, length)

    def engines_for_text(self, num_tokens: int) -> PreparedEngines:
        """Return the engines of the smallest capacity that fits such texts.

        Where none does, they are those of the largest.
        """
        fitting = (one for one in self._capacities if num_tokens <= one.max_length)
        return next(fitting, self._capacities[-1])

    @contextmanager
    def turn(self) -> Iterator[Stream]:
        """The stream, for nobody else meanwhile.

        Raises:
            UsageError: the session has been closed.
        """
        with self.lock:
            self.check_open()
            yield self._stream

    def take(self, engines: PreparedEngines, num_rows: int) -> Lease:
        """Lend memory for so many sequences.

        It is that of some that nobody uses any more, or new.

        Where there is no room for new memory, that of other sizes which nobody uses makes room.
        """
        with self.turn() as stream:
            free = self._free.get((engines.capacity, num_rows))
            if free:
                return Lease(self, free.pop())
            try:
                memory = SequenceMemory(engines, self.slots, stream, num_rows)
            except DeviceError:
                if not self._close_free():
                    raise
                memory = SequenceMemory(engines, self.slots, stream, num_rows)
            return Lease(self, memory)

    def give_back(self, memory: SequenceMemory) -> None:
        """Keep memory for the next cache, while the session is open.

        Takes no lock: it is called when a lease is collected, whoever holds the lock.
        """
        if self.is_closed:
            memory.close()
        else:
            self._free.setdefault((memory.capacity, memory.batch), []).append(memory)

    def close(self) -> None:
        """Give back all memory that no cache uses; the lock is held."""
        self.is_closed = True
        self._close_free()

    def _close_free(self) -> bool:
        """Give back what nobody uses; whether there was anything."""
        unused = [memory for key in list(self._free) for memory in self._free.pop(key)]
        if unused:
            self._stream.synchronize()  # a copy from it may still be queued
        for memory in unused:
            memory.close()
        return bool(unused)


class Launchable(Protocol):
    """A forward that can be queued."""

    def launch(self) -> None:
        """Queue it."""
        ...


class RecordedForward:
    """A recorded forward, and the context that it was recorded from."""

    def __init__(self, work: RecordedWork, runner: Runner) -> None:
        self._work, self._runner = work, runner
        self.launch = work.launch


class SequenceMemory:
    """Holds what ``batch`` sequences occupy on the GPU.

    That is keys and values, inputs and outputs, and the forwards recorded over them.

    Attributes:
        capacity: Slots of a sequence.
        cache: Layout of keys and values in ``keys_values``.
        layouts: Layout of each graph's inputs and outputs in its memory.
        recorded: Forwards of all the sequences, by graph and rows.
    """

    def __init__(
        self, engines: PreparedEngines, slots: SlotFormat, stream: Stream, batch: int = 1
    ) -> None:
        self.batch, self.capacity, self._slots = batch, engines.capacity, slots
        self.cache, self.layouts = engines.lay_out(batch)
        self._io: dict[GraphName, DeviceMemory] = {}
        self.recorded: dict[tuple[GraphName, int], Launchable] = {}
        self.keys_values = DeviceMemory(
            self.cache.layout.num_bytes,
            f"the cache of {batch} sequences" if batch > 1 else "the cache of a sequence",
        )
        # slots that are not valid yet must hold numbers: attention multiplies them by 0
        self.keys_values.clear(stream)

    def io(self, graph_name: GraphName) -> DeviceMemory:
        """Return a graph's inputs and outputs, allocated at the first call."""
        if graph_name not in self._io:
            self._io[graph_name] = DeviceMemory(
                self.layouts[graph_name].layout.num_bytes, f"inputs and outputs of {graph_name}"
            )
        return self._io[graph_name]

    def lines(self, row: int, slot: int) -> list[Lines]:
        """Find a sequence's heads in each tensor, from a slot on."""
        begin = self.keys_values.address + row * self.cache.sequence_bytes
        begin += slot * self._slots.head_bytes
        pitch = self.capacity * self._slots.head_bytes
        return [Lines(begin + offset, pitch) for offset in self.cache.layout.offsets.values()]

    def close(self) -> None:
        """Give it back now, not when it happens to be collected."""
        self.recorded.clear()
        for memory in (self.keys_values, *self._io.values()):
            memory.close()

"""What a sequence, or several side by side, occupy on the GPU, and how the next ones take it
over.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import numpy as np

from trimode.errors import UsageError
from trimode.formats.contract import Role
from trimode.runtime.sessions.base import Array, BatchCache, Closable
from trimode.runtime.sessions.prefix import check_same_session, check_slots
from trimode.runtime.sessions.tensorrt.graph import Runner
from trimode.runtime.sessions.tensorrt.memory import DeviceMemory, Lines, RecordedWork, Stream
from trimode.runtime.sessions.tensorrt.target import Prepared


class TensorRTCache:
    """Keys and values of sequences in slots whose number the engines fix.

    The memory goes to the next ones when this is dropped.

    Args:
        pool: Lends the memory.
        num_rows: Sequences.
    """

    def __init__(self, pool: MemoryPool, num_rows: int) -> None:
        self._pool, self.num_rows = pool, num_rows
        self.slots = pool.slots
        self.bytes_per_token = self.slots.bytes_per_token
        self.memory = pool.take(num_rows)
        self.capacity = self.memory.capacity
        weakref.finalize(self, pool.give_back, self.memory).atexit = False

    def reserve(self, length: int) -> None:
        self._pool.capacity_for(length)

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
            with self._pool.turn() as stream:
                self._copy(
                    stream,
                    self.memory.lines(destination, 0),
                    theirs.memory.lines(source, 0),
                    length,
                )

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

    def _copy(
        self, stream: Stream, destination: list[Lines], source: list[Lines], length: int
    ) -> None:
        """Queue copying slots, tensor by tensor."""
        for to, begin in zip(destination, source, strict=True):
            stream.copy_lines(to, begin, length * self.slots.head_bytes, self.slots.num_heads)


def _host_lines(arrays: Sequence[Array]) -> list[Lines]:
    """Where the heads of contiguous arrays ``(heads, length, head size)`` lie."""
    return [Lines(array.ctypes.data, array.strides[0], is_on_gpu=False) for array in arrays]


class MemoryPool(Closable):
    """Memory of sequences, which one cache hands on to the next.

    Args:
        prepared: The target.
        stream: Where everything is queued.

    Attributes:
        lock: Held while something is queued: what is queued while a forward is recorded would be
            recorded with it.
        slots: What a slot of a sequence holds.
    """

    def __init__(self, prepared: Prepared, stream: Stream) -> None:
        self._prepared, self._stream = prepared, stream
        self._free: dict[int, list[SequenceMemory]] = {}
        self.lock = threading.Lock()
        self.slots = prepared.slots

    def capacity_for(self, length: int) -> int:
        """Smallest capacity that holds ``length`` slots.

        Raises:
            UsageError: it is smaller.
        """
        capacity = self._prepared.capacity
        if length > capacity:
            raise UsageError(
                f"expected at most {capacity} tokens, "
                f"which the cache of this target holds, found {length}",
                "shorten the text, or build with a larger --max-length",
            )
        return capacity

    @contextmanager
    def turn(self) -> Iterator[Stream]:
        """The stream, for nobody else meanwhile.

        Raises:
            UsageError: the session has been closed.
        """
        with self.lock:
            self.check_open()
            yield self._stream

    def take(self, num_rows: int) -> SequenceMemory:
        """Memory for so many sequences: of some that nobody uses any more, or new."""
        with self.turn() as stream:
            free = self._free.setdefault(num_rows, [])
            return free.pop() if free else SequenceMemory(self._prepared, stream, num_rows)

    def give_back(self, memory: SequenceMemory) -> None:
        """Keep memory for the next cache.

        Takes no lock: it is called when a cache is collected, whoever holds the lock.
        """
        if not self.is_closed:
            self._free.setdefault(memory.batch, []).append(memory)

    def close(self) -> None:
        """Give back all memory that no cache uses; the lock is held."""
        self.is_closed = True
        for memory in itertools.chain(*self._free.values()):
            memory.close()
        self._free.clear()


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
    """What ``batch`` sequences occupy on the GPU: keys and values, inputs and outputs, and the
    forwards recorded over them.

    Attributes:
        capacity: slots of a sequence.
        cache: where keys and values lie in ``keys_values``.
        layouts: where inputs and outputs of a role lie in its memory.
        recorded: forwards of all the sequences, by role and rows.
    """

    def __init__(self, prepared: Prepared, stream: Stream, batch: int = 1) -> None:
        self.batch = batch
        self.capacity, self._slots = prepared.capacity, prepared.slots
        self.cache, self.layouts = prepared.lay_out(batch)
        self._io: dict[Role, DeviceMemory] = {}
        self.recorded: dict[tuple[Role, int], Launchable] = {}
        self.keys_values = DeviceMemory(
            self.cache.layout.num_bytes,
            f"the cache of {batch} sequences" if batch > 1 else "the cache of a sequence",
        )
        # slots that are not valid yet must hold numbers: attention multiplies them by 0
        self.keys_values.clear(stream)

    def io(self, role: Role) -> DeviceMemory:
        """Inputs and outputs of a role; there from the first time it is asked for."""
        if role not in self._io:
            self._io[role] = DeviceMemory(
                self.layouts[role].layout.num_bytes, f"inputs and outputs of {role}"
            )
        return self._io[role]

    def lines(self, row: int, slot: int) -> list[Lines]:
        """Where the heads of a sequence lie in each tensor, from a slot on."""
        begin = self.keys_values.address + row * self.cache.sequence_bytes
        begin += slot * self._slots.head_bytes
        pitch = self.capacity * self._slots.head_bytes
        return [Lines(begin + offset, pitch) for offset in self.cache.layout.offsets.values()]

    def close(self) -> None:
        """Give it back now, not when it happens to be collected."""
        self.recorded.clear()
        for memory in (self.keys_values, *self._io.values()):
            memory.close()

"""What a sequence, or several side by side, occupy on the GPU, and how the next ones take it
over.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol, cast

from trimode.errors import UsageError
from trimode.formats.contract import Role, TensorSpec
from trimode.runtime.sessions.tensorrt.graph import Runner
from trimode.runtime.sessions.tensorrt.memory import DeviceMemory, RecordedWork, Stream
from trimode.runtime.sessions.tensorrt.target import Prepared


class TensorRTCache:
    """Keys and values of sequences in slots whose number the engines fix.

    The memory goes to the next ones when this is dropped.
    """

    def __init__(
        self,
        memory: SequenceMemory,
        spec: TensorSpec,
        free: list[SequenceMemory],
        lock: threading.Lock,
    ) -> None:
        self.memory, self._lock = memory, lock
        self.capacity = cast("int", spec.shape[2])
        weakref.finalize(self, free.append, memory).atexit = False

    def reserve(self, length: int) -> None:
        """See :class:`trimode.runtime.sessions.base.KVCache`."""
        if length > self.capacity:
            raise UsageError(
                f"expected at most {self.capacity} tokens, "
                f"which the cache of this target holds, found {length}",
                "shorten the text, or build with a larger --max-length",
            )

    def move(self, source: int, destination: int) -> None:
        with self._lock:
            self.memory.move(source, destination)


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
        cache: where keys and values lie in ``keys_values``.
        layouts: where inputs and outputs of a role lie in its memory.
        recorded: forwards of all the sequences, by role and rows.
    """

    def __init__(self, prepared: Prepared, stream: Stream, batch: int = 1) -> None:
        self.batch = batch
        self.cache, self.layouts = prepared.lay_out(batch)
        self._stream = stream
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

    def move(self, source: int, destination: int) -> None:
        """Queue copying one sequence's keys and values over another's."""
        size = self.cache.sequence_bytes
        for offset in self.cache.layout.offsets.values():
            begin = self.keys_values.address + offset
            self._stream.copy_over(begin + destination * size, begin + source * size, size)

    def close(self) -> None:
        """Give it back now, not when it happens to be collected."""
        self.recorded.clear()
        for memory in (self.keys_values, *self._io.values()):
            memory.close()

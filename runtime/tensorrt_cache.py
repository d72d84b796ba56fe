"""What one sequence occupies on the GPU, and how the next one takes it over."""

from __future__ import annotations

import weakref
from typing import Protocol, cast

from trimode.errors import UsageError
from trimode.graphs.contract import Role, TensorSpec
from trimode.runtime.tensorrt_graph import Runner
from trimode.runtime.tensorrt_memory import DeviceMemory, RecordedWork, Stream
from trimode.runtime.tensorrt_target import Prepared


class TensorRTCache:
    """Keys and values of one sequence in slots whose number the engines fix; the memory goes to the next sequence when this is dropped."""

    def __init__(self, memory: SequenceMemory, spec: TensorSpec, free: list[SequenceMemory]) -> None:
        self.memory = memory
        self.capacity = cast("int", spec.shape[2])
        weakref.finalize(self, free.append, memory).atexit = False

    def reserve(self, length: int) -> None:
        """See :class:`trimode.runtime.session.KVCache`."""
        if length > self.capacity:
            raise UsageError(f"expected at most {self.capacity} tokens, which the cache of this target holds, found {length}",
                             "shorten the text, or build with a larger --max-length")  # fmt: skip


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
    """What one sequence occupies on the GPU: keys and values, inputs and outputs, and the forwards recorded over them."""

    def __init__(self, prepared: Prepared, stream: Stream) -> None:
        self._layouts = {role: io.layout for role, io in prepared.io.items()}
        self._io: dict[Role, DeviceMemory] = {}
        self.recorded: dict[tuple[Role, int], Launchable] = {}
        self.keys_values = DeviceMemory(prepared.cache_layout.num_bytes, "the cache of a sequence")
        self.keys_values.clear(stream)  # slots that are not valid yet must hold numbers: attention multiplies them by 0

    def io(self, role: Role) -> DeviceMemory:
        """Inputs and outputs of a role; there from the first time it is asked for."""
        if role not in self._io:
            self._io[role] = DeviceMemory(self._layouts[role].num_bytes, f"inputs and outputs of {role}")
        return self._io[role]

    def close(self) -> None:
        """Give it back now, not when it happens to be collected."""
        self.recorded.clear()
        for memory in (self.keys_values, *self._io.values()):
            memory.close()

"""Records what the plan of an engine says."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trimode.formats.record import Record

Cause = Literal[
    "weights expanded",
    "weights transposed",
    "weights copied",
    "keys and values repeated",
    "keys and values copied",
]


class CopyRecord(Record):
    """Counts bytes that a kernel copies only to arrange them.

    Later kernels read them again: tensors do not lie as a product or attention wants them.

    Attributes:
        kernel: Library's name of the kernel that writes the copy.
        num_bytes: Number of bytes written and read, in one forward.
    """

    cause: Cause
    kernel: str
    num_bytes: int = Field(ge=0)


class Computed(Record):
    """Holds what follows from the counts and the GPU: computed, not measured.

    Attributes:
        floor: Bytes that a forward cannot do without.
        moved: Bytes that it moves.
        bandwidth_gb_s: Bandwidth of the GPU's memory, in 10^9 bytes a second; None where the
            target names no GPU.
        predicted_ms: Milliseconds that moving the bytes takes at that bandwidth; None without one.
    """

    floor: int = Field(ge=0)
    moved: int = Field(ge=0)
    bandwidth_gb_s: int | None
    predicted_ms: float | None


class PlanRecord(Record):
    """Counts what one forward moves through the GPU's memory.

    The counts follow the engine's plan. Caches of the GPU are not in it.

    Attributes:
        library: Name and version of what compiled the engine.
        profile: Index of the optimization profile.
        batch: Number of sequences of the forward that is counted.
        rows: Number of rows of each sequence.
        kernels: Number of launches.
        weights: Bytes of weights as they lie, each once; of tables, the rows that are looked up.
        keys_values: Bytes of the cache, over its whole capacity, that attention reads.
        activations: Bytes of all else that kernels read and write, in tensors of 1 MB and more.
        copies: Copies that come on top, the largest first.
        scratch: Bytes of memory for temporaries.
        computed: What follows for the target's GPU; None before a bundle's manifest has it.
    """

    library: str
    profile: int
    batch: int
    rows: int
    kernels: int
    weights: int
    keys_values: int
    activations: int
    copies: tuple[CopyRecord, ...]
    scratch: int
    computed: Computed | None = None

    @property
    def copied(self) -> int:
        """Bytes of all copies."""
        return sum(copy.num_bytes for copy in self.copies)

    @property
    def floor(self) -> int:
        """Bytes that a forward has to read, each once.

        They are weights, and keys and values.
        """
        return self.weights + self.keys_values

    @property
    def moved(self) -> int:
        """Bytes that the forward moves."""
        return self.floor + self.activations + self.copied

    @property
    def ratio(self) -> float:
        """``moved`` as a multiple of ``floor``."""
        return self.moved / max(self.floor, 1)


class UnreadPlan(Record):
    """Says why a plan could not be read."""

    library: str
    reason: str

"""What the plan of an engine says of a forward, as data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Cause = Literal[
    "weights expanded",
    "weights transposed",
    "weights copied",
    "keys and values repeated",
    "keys and values copied",
]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CopyRecord(_Record):
    """Bytes that a kernel writes, and later ones read again, only because tensors do not lie as a
    product or attention wants them.

    Attributes:
        kernel: the library's name of the kernel that writes the copy.
        num_bytes: written and read, in one forward.
    """

    cause: Cause
    kernel: str
    num_bytes: int = Field(ge=0)


class PlanRecord(_Record):
    """What one forward moves through the GPU's memory, by the engine's plan; caches of the GPU are
    not in it.

    Attributes:
        library: name and version of what compiled the engine.
        profile: index of the optimization profile.
        batch: sequences of the forward that is counted.
        rows: of each sequence.
        kernels: launches.
        weights: bytes of weights as they lie, each once; of tables, the rows that are looked up.
        keys_values: bytes of the cache, over its whole capacity, that attention reads.
        activations: bytes of all else that kernels read and write, in tensors of 1 MB and more.
        copies: what is moved on top, the most first.
        scratch: bytes of memory for temporaries.
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

    @property
    def copied(self) -> int:
        """Bytes of all copies."""
        return sum(copy.num_bytes for copy in self.copies)

    @property
    def floor(self) -> int:
        """Bytes that a forward cannot do without: weights, and keys and values, once each."""
        return self.weights + self.keys_values

    @property
    def moved(self) -> int:
        """Bytes that the forward moves."""
        return self.floor + self.activations + self.copied

    @property
    def ratio(self) -> float:
        """``moved`` as a multiple of ``floor``."""
        return self.moved / max(self.floor, 1)


class UnreadPlan(_Record):
    """A plan that the reader does not understand, and why."""

    library: str
    reason: str

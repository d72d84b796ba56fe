"""Counts what the kernels of a plan read and write.

Bytes are needed, activations, or copies with a reason.

The rules follow data, not kernels' names, but for attention and products, which are named:

- an input of the engine that is an output too is the cache; any other of a fixed size that is no
  integer and no single number is a weight, as is a constant
- a kernel that reads weights alone makes copies of them: expanded where they take more bytes, else
  transposed or copied
- a kernel that reads the cache alone, and is no attention, makes copies of it: repeated where they
  have more numbers
- a kernel that reads an integer beside a weight looks up rows of it, as many bytes as it writes
- what a kernel updates in place is not moved as a whole; the few rows that it writes are left out
- a temporary below 1 MB is left out: the GPU's own cache keeps it from one kernel to the next
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trimode.compiler.plans.sizes import INTEGERS, Sizes
from trimode.compiler.plans.text import Operation, PlanUnreadable, Program, Tensor, read_programs
from trimode.formats.manifest import ProfileRecord
from trimode.formats.plans import Cause, CopyRecord, PlanRecord, UnreadPlan

_PRODUCTS = frozenset({"fully_connected", "runtime_fusion"})
_KERNELS = frozenset({*_PRODUCTS, "function", "copy", "memset"})
_ATTENTION = "mha"
_SMALL = 1 << 20
Kind = Literal["weight", "cache", "weight copy", "cache copy", "activation", "index"]


def audit_engine(
    path: Path, library: str, profiles: Sequence[ProfileRecord]
) -> tuple[PlanRecord, ...] | UnreadPlan:
    """Return what each profile moves in a forward of usual size.

    Args:
        path: Engine file of TensorRT-RTX.
        library: Name and version of what compiled it.
        profiles: Optimization profiles in the engine's order.
    """
    try:
        programs = read_programs(path)
        if {program.profile for program in programs} != set(range(len(profiles))):
            raise PlanUnreadable(
                f"found programs for {len({p.profile for p in programs})}"
                f" of {len(profiles)} profiles"
            )
        counts = [
            (index, profile, [p for p in programs if p.profile == index])
            for index, profile in enumerate(profiles)
        ]
        return tuple(_record(library, index, profile, ours) for index, profile, ours in counts)
    except (PlanUnreadable, OSError, ValueError) as error:
        return UnreadPlan(library=library, reason=str(error) or type(error).__name__)


def _record(
    library: str, index: int, profile: ProfileRecord, programs: Sequence[Program]
) -> PlanRecord:
    batch, rows = profile.batch[1], profile.rows[1]
    counts = [_Count(program, Sizes(program, batch, rows)) for program in programs]
    copies: Counter[tuple[Cause, str]] = Counter()
    for count in counts:
        count.run()
        copies.update(count.copies)
    return PlanRecord(
        library=library,
        profile=index,
        batch=batch,
        rows=rows,
        kernels=sum(len(program.kernels) for program in programs),
        weights=sum(sum(count.weights.values()) for count in counts),
        keys_values=sum(sum(count.caches.values()) for count in counts),
        activations=sum(count.activations for count in counts),
        copies=tuple(
            CopyRecord(cause=cause, kernel=kernel, num_bytes=size)
            for (cause, kernel), size in copies.most_common()
        ),
        scratch=sum(program.scratch_bytes for program in programs),
    )


@dataclass
class _Count:
    """Counts the bytes of one program, kernel by kernel."""

    program: Program
    sizes: Sizes
    weights: dict[str, int] = field(default_factory=dict)
    caches: dict[str, int] = field(default_factory=dict)
    activations: int = 0
    copies: Counter[tuple[Cause, str]] = field(default_factory=Counter)
    _made: dict[str, tuple[Kind, Cause, str]] = field(default_factory=dict)
    _read: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def run(self) -> None:
        """Count every kernel."""
        for kernel in self.program.kernels:
            if kernel.kind not in _KERNELS:
                raise PlanUnreadable(f"found a kernel of kind {kernel.kind}")
            inputs, outputs = self._memory(kernel.inputs), self._memory(kernel.outputs)
            updated = {tensor.name for tensor in inputs} & {tensor.name for tensor in outputs}
            self._count(
                kernel,
                [t for t in inputs if t.name not in updated],
                [t for t in outputs if t.name not in updated],
                updated,
            )

    def _memory(self, names: Iterable[str]) -> list[Tensor]:
        """The tensors themselves, once each, in place of views of them."""
        found = {}
        for name in names:
            if not self.sizes.is_size(name):
                tensor = self._base(self.sizes.find(name))
                found[tensor.name] = tensor
        return list(found.values())

    def _base(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.base is None else self._base(self.sizes.find(tensor.base))

    def _kind(self, tensor: Tensor) -> Kind:
        if tensor.name in self._made:
            return self._made[tensor.name][0]
        if tensor.dtype in INTEGERS:
            return "index"
        if tensor.name in self.program.inputs and tensor.name in self.program.outputs:
            return "cache"
        is_weight = tensor.is_constant or tensor.name in self.program.inputs
        has_fixed_size = all(isinstance(size, int) for size in tensor.dims)
        return (
            "weight"
            if is_weight and has_fixed_size and self.sizes.elements(tensor) > 1
            else "activation"
        )

    def _count(
        self, kernel: Operation, inputs: list[Tensor], outputs: list[Tensor], updated: set[str]
    ) -> None:
        kinds = {tensor.name: self._kind(tensor) for tensor in inputs}
        copied = (
            None
            if updated or kernel.kind in _PRODUCTS
            else self._copied(kernel, set(kinds.values()))
        )
        written = sum(map(self.sizes.num_bytes, outputs))
        moved = sum(size for size in map(self.sizes.num_bytes, outputs) if size >= _SMALL)
        looks_up = kernel.kind not in _PRODUCTS and "index" in kinds.values()
        for tensor in inputs:
            self._read_one(tensor, kinds[tensor.name], written if looks_up and not copied else None)
        if copied is None:
            self.activations += moved
            for tensor in outputs:
                self._made.pop(tensor.name, None)
        else:
            sources = [tensor for tensor in inputs if kinds[tensor.name] != "index"]
            for tensor in outputs:
                self._write_copy(kernel, copied, sources, tensor)

    def _copied(self, kernel: Operation, kinds: set[Kind]) -> Literal["weight", "cache"] | None:
        """What a kernel copies, if that is all it does."""
        if kinds and kinds <= {"weight", "weight copy"}:
            return "weight"
        is_attention = _ATTENTION in kernel.name
        return (
            "cache"
            if kinds & {"cache", "cache copy"}
            and kinds <= {"cache", "cache copy", "index"}
            and not is_attention
            else None
        )

    def _read_one(self, tensor: Tensor, kind: Kind, looked_up: int | None) -> None:
        size = self.sizes.num_bytes(tensor)
        if kind == "weight":
            part = size if looked_up is None else min(size, looked_up)
            again = min(part, self.weights.get(tensor.name, 0))
            self.weights[tensor.name] = max(part, again)
            self.activations += again
        elif kind == "cache":
            self.activations += self.caches.get(tensor.name, 0)
            self.caches[tensor.name] = size
        elif kind in ("weight copy", "cache copy"):
            _, cause, made_by = self._made[tensor.name]
            self.copies[cause, made_by] += size
        elif size >= _SMALL:
            self.activations += size

    def _write_copy(
        self,
        kernel: Operation,
        what: Literal["weight", "cache"],
        sources: list[Tensor],
        tensor: Tensor,
    ) -> None:
        cause = (
            self._weight_cause(sources, tensor)
            if what == "weight"
            else self._cache_cause(sources, tensor)
        )
        self._made[tensor.name] = (
            "weight copy" if what == "weight" else "cache copy",
            cause,
            kernel.name,
        )
        self.copies[cause, kernel.name] += self.sizes.num_bytes(tensor)

    def _weight_cause(self, sources: list[Tensor], tensor: Tensor) -> Cause:
        largest = max(sources, key=self.sizes.elements)
        earlier = self._made.get(largest.name)
        if self.sizes.num_bytes(tensor) > self.sizes.num_bytes(largest) or (
            earlier and earlier[1] == "weights expanded"
        ):
            return "weights expanded"
        return (
            "weights transposed"
            if tensor.order != largest.order or tensor.dims != largest.dims
            else "weights copied"
        )

    def _cache_cause(self, sources: list[Tensor], tensor: Tensor) -> Cause:
        largest = max(map(self.sizes.elements, sources))
        return (
            "keys and values repeated"
            if self.sizes.elements(tensor) > largest
            else "keys and values copied"
        )

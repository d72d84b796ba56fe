"""Predicts what each GPU will hold, and what fits at most.

That is how far text and batch could grow. Engines of the first layers are compiled: as asked, with
a layer more, with shorter texts, and with more sequences. Their sizes grow evenly with each. All
else follows from the checkpoint's header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from trimode.compiler.memory.assumed import plan_uncalibrated
from trimode.compiler.memory.room import memory_of
from trimode.compiler.memory.shallow import ShallowEngines, compile_shallow, keep_layers
from trimode.compiler.memory.use import MemoryUse, engine_use, fixed_use, scratch_of
from trimode.compiler.options import MAX_BATCH, BuildOptions
from trimode.compiler.passes.recipes import constants_of
from trimode.compiler.plan import BuildPlan, resize
from trimode.compiler.plans.report import bandwidth_ms
from trimode.compiler.stages.pack import lay_out_pack
from trimode.compiler.store.cache import ContentCache
from trimode.compiler.targets import Target, resolve_targets
from trimode.compiler.toolchain import require_toolchain
from trimode.errors import UsageError
from trimode.formats.contract import GraphName
from trimode.graphs.checkpoint import Checkpoint
from trimode.progress import Progress, Silent
from trimode.runtime.sessions.prefix import SlotFormat

RESERVED_BYTES = 1 << 30
"""Left for the driver and what else is on the screen. An assumption."""

_DEPTHS = (2, 3)
_SHORTEST = 256


@dataclass(frozen=True)
class ForwardCost:
    """Predicts one forward of one sequence, computed from bytes.

    Attributes:
        graph: Name of the graph.
        tokens: Tokens of the forward.
        moved: Bytes that it moves.
        predicted_ms: Milliseconds at the GPU's bandwidth; None where that is not known.
    """

    graph: GraphName
    tokens: int
    moved: int
    predicted_ms: float | None


@dataclass(frozen=True)
class TargetMemory:
    """Predicts what a target's GPU holds.

    Attributes:
        target: Name of the target.
        precision: Precision of the build.
        max_length: Most tokens of a text.
        max_batch: Most sequences side by side.
        use: Bytes on the GPU with ``max_batch`` sequences.
        cache_bytes_per_token: Bytes of keys and values of a token.
        memory_bytes: Memory of the GPU; None where the target names no GPU.
        longest_text: Most tokens of a text that fit with ``max_batch`` sequences, at most the
            model's limit; 0 where none fits, None where the memory is not known.
        largest_batch: Most sequences of ``max_length`` tokens that fit, at most 128; likewise.
        forwards: Cost of each forward.
    """

    target: str
    precision: str
    max_length: int
    max_batch: int
    use: MemoryUse
    cache_bytes_per_token: int
    memory_bytes: int | None
    longest_text: int | None
    largest_batch: int | None
    forwards: tuple[ForwardCost, ...]

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the memory is not known."""
        if self.memory_bytes is None:
            return None
        return self.use.total <= self.memory_bytes - RESERVED_BYTES


def predict_memory(
    checkpoint: Checkpoint,
    options: BuildOptions,
    cache: ContentCache | None = None,
    progress: Progress | None = None,
) -> list[TargetMemory]:
    """Predict what the GPU of each target will hold.

    Args:
        checkpoint: Opened checkpoint; its weights are not read.
        options: Choices of the build. A calibration may be missing.
        cache: Cache of engines, which a second question is answered from.
        progress: Listener that is told about stages.

    Raises:
        UsageError: an option is out of range, or a target's engines hold no plan.
        CheckpointError: the calibration cannot be read or does not fit the checkpoint.
        DependencyError: the library that compiles for a target is not installed.
        BuildError: a target cannot be compiled for here.
    """
    for target in resolve_targets(options.targets):
        _check_target(target)
        require_toolchain(target)
    plan = plan_uncalibrated(checkpoint, options)
    shapes = _Shapes(plan, cache, progress or Silent())
    return [_predict(plan, name, shapes) for name in plan.targets]


def _check_target(target: Target) -> None:
    if target.backend != "tensorrt_rtx":
        raise UsageError(
            f"{target.name}: expected a target whose engines are compiled without its GPU, "
            f"found one of {target.backend}",
            "choose a target of TensorRT-RTX (see `trimode targets`)",
        )


class _Shapes:
    """Compiles shallow engines of different sizes when they are first needed.

    The sizes: as asked, with a layer more, with shorter texts, or with more sequences. Where a
    GPU's memory is not known, nobody asks how far text and batch could grow.
    """

    def __init__(self, plan: BuildPlan, cache: ContentCache | None, progress: Progress) -> None:
        self._plan, self._cache, self._progress = plan, cache, progress
        self._length, self._batch = plan.model.max_length, plan.options.max_batch
        half = max(self._length // 2, min(_SHORTEST, self._length))
        wide = self._batch * 4
        self._other_length = half
        self._other_batch = wide if wide <= MAX_BATCH else self._batch // 4

    @cached_property
    def asked(self) -> ShallowEngines:
        """Engines for the texts and the batch that were asked for."""
        return self._compile(_DEPTHS[0], self._length, self._batch)

    @cached_property
    def deeper(self) -> ShallowEngines:
        """Engines with a layer more."""
        return self._compile(_DEPTHS[1], self._length, self._batch)

    @cached_property
    def shorter(self) -> ShallowEngines:
        """Engines for texts of half the length."""
        return self._compile(_DEPTHS[0], self._other_length, self._batch)

    @cached_property
    def wider(self) -> ShallowEngines:
        """Engines for another batch."""
        return self._compile(_DEPTHS[0], self._length, self._other_batch)

    def _compile(self, num_layers: int, max_length: int, max_batch: int) -> ShallowEngines:
        plan = resize(self._plan, max_length, max_batch)
        return compile_shallow(keep_layers(plan, num_layers), self._cache, self._progress)

    def grown(self, figure: Callable[[ShallowEngines], int], length: int, batch: int) -> int:
        """A figure of the shallow engines, for other texts and batches."""
        found, growth = figure(self.asked), 0.0
        if length != self._length and self._length != self._other_length:
            slope = (found - figure(self.shorter)) / (self._length - self._other_length)
            growth += slope * (length - self._length)
        if batch != self._batch:
            step = (figure(self.wider) - found) / (self._other_batch - self._batch)
            growth += step * (batch - self._batch)
        return found + round(growth)

    def deepened(self, figure: Callable[[ShallowEngines], int], num_layers: int) -> int:
        """What all further layers add to a figure of the shallow engines."""
        return (figure(self.deeper) - figure(self.asked)) * (num_layers - _DEPTHS[0])


def _predict(plan: BuildPlan, name: str, shapes: _Shapes) -> TargetMemory:
    room = _Room(plan, name, shapes)
    model, options, target = plan.model, plan.options, plan.targets[name]
    memory = memory_of(target, options.gpu_memory_gb)
    budget = None if memory is None else memory - RESERVED_BYTES
    limit = plan.checkpoint.config.max_position_embeddings
    batch, length = options.max_batch, model.max_length
    return TargetMemory(
        target=name,
        precision=plan.precision,
        max_length=length,
        max_batch=batch,
        use=room.use(length, batch),
        cache_bytes_per_token=room.cache_bytes_per_token,
        memory_bytes=memory,
        longest_text=None
        if budget is None
        else largest(lambda n: room.use(n, batch).total <= budget, limit),
        largest_batch=None
        if budget is None
        else largest(lambda n: room.use(length, n).total <= budget, MAX_BATCH),
        forwards=tuple(_forwards(name, shapes, model.num_hidden_layers)),
    )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 0 to ``most`` that fits.

    Each number below it has to fit, too.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class _Room:
    """Computes the memory of one target for any length and batch."""

    def __init__(self, plan: BuildPlan, name: str, shapes: _Shapes) -> None:
        self._plan, self._name, self._shapes = plan, name, shapes
        tensors = lay_out_pack(plan, plan.checkpoint.read).tensors
        held = constants_of(plan.records[name], tensors)
        constants = sum(tensors[one].num_bytes for one in held)
        files = {engine.file for engine in plan.records[name].graphs.values()}
        # weights that engines hold are in each of them, and not uploaded
        self._constants = constants * len(files)
        tables = sum(one.num_bytes for name, one in tensors.items() if name.startswith("rope."))
        self._position_bytes = tables // plan.model.num_positions
        self._weights = sum(one.num_bytes for one in tensors.values()) - constants - tables

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token."""
        dtype = self._plan.records[self._name].compute_dtype
        return SlotFormat.of(self._plan.model, dtype).bytes_per_token

    def use(self, length: int, batch: int) -> MemoryUse:
        """Return the bytes for ``batch`` texts of ``length`` tokens side by side."""
        if length < 2 or batch < 1:  # no text is shorter
            return MemoryUse(self._weights, self._constants, 0, 0, 0)
        plan = resize(self._plan, length, batch)
        io, cache = fixed_use(plan.model, plan.records[self._name], batch)
        depth = plan.model.num_hidden_layers
        files = self._shapes.grown(self._engines, length, batch)
        return MemoryUse(
            weights=self._weights + self._position_bytes * plan.model.num_positions,
            engines=self._constants + files + self._shapes.deepened(self._engines, depth),
            scratch=self._shapes.grown(self._scratch, length, batch),
            io=io,
            cache=cache,
        )

    def _engines(self, shallow: ShallowEngines) -> int:
        return engine_use(shallow.sizes, shallow.records[self._name])

    def _scratch(self, shallow: ShallowEngines) -> int:
        return scratch_of(shallow.records[self._name])


def _forwards(name: str, shapes: _Shapes, num_layers: int) -> Iterator[ForwardCost]:
    """Yield the cost of each profile's forward.

    The bytes of a layer are those that one layer more adds.
    """
    asked, deeper = shapes.asked.records[name], shapes.deeper.records[name]
    for graph, engine in asked.graphs.items():
        for plan, more in zip(engine.plans, deeper.graphs[graph].plans, strict=True):
            moved = plan.moved + (more.moved - plan.moved) * (num_layers - _DEPTHS[0])
            yield ForwardCost(graph, plan.rows, moved, bandwidth_ms(moved, name))

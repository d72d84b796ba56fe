"""Builds engines with TensorRT or TensorRT-RTX.

Both have the same Python interface, so the library is an argument.

TensorRT-RTX compiles ahead of time for a *named* compute capability and needs no GPU; TensorRT
compiles for the GPU it finds. Networks are strongly typed: every type is the graph's own.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trimode.formats.manifest import ProfileRecord
from trimode.formats.record import Record
from trimode.runtime.bundle.weights import PrecisionWeights
from trimode.runtime.sessions.tensorrt.library import make_logger


class EngineJob(Record):
    """Says what to compile.

    Attributes:
        library: Module that compiles.
        graph: Lowered ONNX file.
        packs: Packs of the precision, its own first, where the graph keeps its weights as
            initializers; else none.
        output: Engine file to write.
        compute_capability: Compute capability of the GPU, as ``8.9``.
        profiles: Optimization profiles of the engine, in this order.
        workspace_bytes: Most scratch memory on the GPU; None = the library's choice.
        timing_cache: File that is read before and written after, where the library has timing
            caches (TensorRT has, TensorRT-RTX has not).
    """

    library: Literal["tensorrt_rtx", "tensorrt"]
    graph: Path
    packs: tuple[Path, ...]
    output: Path
    compute_capability: str
    profiles: tuple[ProfileRecord, ...]
    workspace_bytes: int | None = None
    timing_cache: Path | None = None


class EngineRefusedError(Exception):
    """Says that the library did not build the engine.

    ``messages`` are its own.
    """

    def __init__(self, messages: list[str]) -> None:
        super().__init__(messages[0] if messages else "no message")
        self.messages = messages


def build_engine(job: EngineJob, on_progress: Callable[[float], bool]) -> None:
    """Compile one engine into ``job.output``.

    Args:
        job: Job to compile.
        on_progress: Listener that is told the fraction done, from 0 to 1; False cancels.

    Raises:
        EngineRefusedError: the graph, a profile or the GPU does not suit the library.
    """
    trt = importlib.import_module(job.library)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    # must outlive the build: the parser keeps its addresses
    weights = PrecisionWeights(job.packs) if job.packs else None
    _parse(trt, network, logger, job.graph, weights)
    config = builder.create_builder_config()
    config.progress_monitor = monitor = _make_monitor(trt, on_progress)
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    for profile in job.profiles:
        config.add_optimization_profile(_make_profile(builder, network, profile))
    _choose_gpu(trt, config, job.compute_capability)
    cache = _load_timing_cache(config, job)
    engine = builder.build_serialized_network(network, config)
    del monitor
    if engine is None:
        raise EngineRefusedError(logger.errors)
    job.output.write_bytes(engine)
    if cache is not None and job.timing_cache is not None:
        job.timing_cache.write_bytes(cache.serialize())


def _network_flags(trt: Any) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(
    trt: Any, network: Any, logger: Any, graph: Path, weights: PrecisionWeights | None
) -> None:
    parser = trt.OnnxParser(network, logger)
    if weights is None:
        parsed = parser.parse(graph.read_bytes())
    else:
        parser.load_model_proto(graph.read_bytes())
        for name in weights.entries:
            data = weights.raw(name)
            # False for what this graph does not use
            parser.load_initializer(name, data.ctypes.data, data.nbytes)
        parsed = parser.parse_model_proto()
    if not parsed:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise EngineRefusedError(
            [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors] or logger.errors
        )


def _make_profile(builder: Any, network: Any, record: ProfileRecord) -> Any:
    """Make an optimization profile.

    Dimension 0 of a dynamic input is the batch, any other the rows. Everything else is static.
    """
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shape = tuple(tensor.shape)
        if -1 in shape:
            sizes = [
                tuple(
                    (batch if axis == 0 else rows) if size == -1 else size
                    for axis, size in enumerate(shape)
                )
                for batch, rows in zip(record.batch, record.rows, strict=True)
            ]
            profile.set_shape(tensor.name, *sizes)
    return profile


def _choose_gpu(trt: Any, config: Any, compute_capability: str) -> None:
    """Tell TensorRT-RTX the GPU.

    TensorRT takes the one it finds, and the caller has checked that it is the right one.
    """
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = 1
        name = f"SM{compute_capability.replace('.', '')}"
        if not hasattr(trt.ComputeCapability, name):
            raise EngineRefusedError(
                [f"{trt.__name__} {trt.__version__} does not compile for {name}"]
            )
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _make_monitor(trt: Any, on_progress: Callable[[float], bool]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Turns the library's nested phases into one fraction."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = PhaseTree()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.step(phase_name, step)
            return on_progress(self.phases.fraction)

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor()


class PhaseTree:
    """Follows nested phases with steps.

    A phase inside another counts as part of the step that the outer one is at.
    """

    def __init__(self) -> None:
        self._open: dict[str, tuple[str | None, int, int]] = {}
        self.fraction = 0.0

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """A phase of ``num_steps`` steps begins inside ``parent``."""
        self._open[name] = (parent, max(num_steps, 1), 0)

    def step(self, name: str, step: int) -> None:
        """Step ``step``, counted from 0, of a phase is done."""
        if name in self._open:
            parent, total, _ = self._open[name]
            self._open[name] = (parent, total, min(step + 1, total))
            self.fraction = max(self.fraction, self._root_fraction(name))

    def finish(self, name: str) -> None:
        """A phase is done, wherever it was."""
        self._open.pop(name, None)

    def _root_fraction(self, name: str) -> float:
        inner, done = 0.0, 0.0
        current: str | None = name
        while current is not None and current in self._open:
            parent, total, steps = self._open[current]
            done = min((steps + inner) / total, 1.0)
            inner, current = done, parent
        return done


def _load_timing_cache(config: Any, job: EngineJob) -> Any:
    if job.timing_cache is None or job.library == "tensorrt_rtx":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = config.create_timing_cache(
            job.timing_cache.read_bytes() if job.timing_cache.is_file() else b""
        )
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache

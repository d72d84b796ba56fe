"""The engines of one capacity: loaded, and ready to queue forwards."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from trimode.errors import DeviceError
from trimode.formats.contract import ModelInfo, Role
from trimode.runtime.sessions.tensorrt.cache import Launchable, RecordedForward, SequenceMemory
from trimode.runtime.sessions.tensorrt.graph import LoadedGraph, Runner
from trimode.runtime.sessions.tensorrt.library import EngineLibrary
from trimode.runtime.sessions.tensorrt.memory import RecordedWork, Stream
from trimode.runtime.sessions.tensorrt.plan import choose_profile, recurs
from trimode.runtime.sessions.tensorrt.target import Prepared, PreparedEngines

logger = logging.getLogger("trimode.runtime")


class LoadedEngines:
    """The engines of one capacity.

    Args:
        graphs: loaded engine of each role.
        model: the model's facts.
        addresses: where each tensor of the weights lies, once they are uploaded.
        stream: where forwards go.
    """

    def __init__(
        self,
        graphs: Mapping[Role, LoadedGraph],
        model: ModelInfo,
        addresses: Mapping[str, int],
        stream: Stream,
    ) -> None:
        self._graphs, self._model = graphs, model
        self._addresses, self._stream = addresses, stream

    @cached_property
    def _runners(self) -> dict[Role, Runner]:
        """Made for the first forward: contexts have scratch memory, which a capacity that no text
        needs should not take.
        """
        return {
            role: self._runner(graph, graph.new_context()) for role, graph in self._graphs.items()
        }

    def _runner(self, graph: LoadedGraph, context: object) -> Runner:
        return Runner(graph, context, self._addresses, self._stream)

    def warm_up(self) -> None:
        """Make ready for forwards, which the first one would do otherwise."""
        _ = self._runners

    def choose_profile(self, role: Role, rows: int, batch: int) -> int:
        """Profile for ``batch`` sequences of ``rows`` rows; :class:`UsageError` where none fits."""
        return choose_profile(self._graphs[role].record, rows, batch)

    def forward(
        self, role: Role, memory: SequenceMemory, sequences: range, profile: int, rows: int
    ) -> None:
        """Queue a forward: as recorded before, or step by step, and then record it where that is
        possible.

        Of a batch, forwards of all its sequences are recorded: there are many ways to take some of
        them, and each would need a context.
        """
        graph, is_whole = self._graphs[role], len(sequences) == memory.batch
        recorded = memory.recorded.get((role, rows)) if is_whole else None
        if recorded is not None:
            recorded.launch()
        elif (
            graph.replays_itself
            or not is_whole
            or not recurs(graph.record.profiles[profile], rows, self._model)
        ):
            runner = self._runners[role]
            runner.prepare(memory, sequences, profile, rows)
            runner.launch()
        else:
            # A recorded forward holds only as long as its context is left alone, so it gets one of
            # its own. The first forward on it is executed step by step: it settles what depends on
            # the shapes, which must not be recorded.
            runner = self._runner(graph, graph.new_recorded_context())
            runner.prepare(memory, sequences, profile, rows)
            runner.launch()
            memory.recorded[role, rows] = self._record(runner)

    def _record(self, runner: Runner) -> Launchable:
        self._stream.synchronize()
        try:
            return RecordedForward(RecordedWork(self._stream, runner.launch), runner)
        except DeviceError as error:
            logger.info("forwards are queued step by step: %s", error.message)
            return runner


def load_graphs(
    library: EngineLibrary,
    prepared: Prepared,
    engines: PreparedEngines,
    model: ModelInfo,
    runtime_cache: Path | None,
) -> dict[Role, LoadedGraph]:
    """Load the engines of one capacity.

    ``runtime_cache`` is the folder for compiled kernels; None = they are not kept.
    """
    is_largest = engines is prepared.capacities[-1]
    suffix = "" if is_largest else f"-{engines.max_length}"
    return {
        role: LoadedGraph(
            library,
            role,
            engines.graphs[role],
            path,
            io=engines.io[role],
            cache=engines.cache,
            model=model,
            pack=prepared.weights.entries,
            runtime_cache=runtime_cache / f"{role}{suffix}.kernels" if runtime_cache else None,
        )
        for role, path in engines.files.items()
    }

"""The engines of one capacity: loaded, and ready to queue forwards."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from trimode.errors import DeviceError
from trimode.formats.contract import GraphName, ModelInfo
from trimode.formats.manifest import EngineRecord
from trimode.runtime.sessions.tensorrt.cache import Launchable, RecordedForward, SequenceMemory
from trimode.runtime.sessions.tensorrt.graph import LoadedGraph, Runner
from trimode.runtime.sessions.tensorrt.library import EngineLibrary
from trimode.runtime.sessions.tensorrt.memory import RecordedWork, Stream
from trimode.runtime.sessions.tensorrt.plan import choose_profile, recurs
from trimode.runtime.sessions.tensorrt.target import Prepared, PreparedEngines

logger = logging.getLogger("trimode.runtime")


class LoadedEngines:
    """Holds the engines of one capacity.

    Args:
        graphs: Loaded engine of each graph; one that is several is the same object.
        records: Profiles of each graph.
        model: Facts of the model.
        addresses: Address of each tensor of the weights, once they are uploaded.
        stream: Stream that forwards go to.
    """

    def __init__(
        self,
        graphs: Mapping[GraphName, LoadedGraph],
        records: Mapping[GraphName, EngineRecord],
        model: ModelInfo,
        addresses: Mapping[str, int],
        stream: Stream,
    ) -> None:
        self._graphs, self._records, self._model = graphs, records, model
        self._addresses, self._stream = addresses, stream

    @cached_property
    def _runners(self) -> dict[GraphName, Runner]:
        """Runner of each graph, made for the first forward.

        Contexts have scratch memory, which a capacity that no text needs should not take.
        """
        runners = {
            graph: self._runner(graph, graph.new_context())
            for graph in dict.fromkeys(self._graphs.values())
        }
        return {graph_name: runners[graph] for graph_name, graph in self._graphs.items()}

    def _runner(self, graph: LoadedGraph, context: object) -> Runner:
        return Runner(graph, context, self._addresses, self._stream)

    def warm_up(self) -> None:
        """Make ready for forwards, which the first one would do otherwise."""
        _ = self._runners

    def place(self, graph_name: GraphName) -> GraphName:
        """Return the graph whose inputs and outputs a forward uses.

        All graphs of one engine have the same.
        """
        return self._graphs[graph_name].graph_name

    def choose_profile(self, graph_name: GraphName, rows: int, batch: int) -> int:
        """Profile for ``batch`` sequences of ``rows`` rows; :class:`UsageError` where none fits."""
        return choose_profile(self._records[graph_name], rows, batch)

    def forward(
        self,
        graph_name: GraphName,
        memory: SequenceMemory,
        sequences: range,
        profile: int,
        rows: int,
    ) -> None:
        """Queue a forward, as recorded before or step by step.

        One that was queued step by step is then recorded where that is possible.

        Of a batch, forwards of all its sequences are recorded: there are many ways to take some of
        them, and each would need a context.
        """
        graph, is_whole = self._graphs[graph_name], len(sequences) == memory.batch
        record = self._records[graph_name]
        number = record.first_profile + profile
        recorded = memory.recorded.get((graph_name, rows)) if is_whole else None
        if recorded is not None:
            recorded.launch()
        elif (
            graph.replays_itself
            or not is_whole
            or not recurs(record.profiles[profile], rows, self._model)
        ):
            runner = self._runners[graph_name]
            runner.prepare(memory, sequences, number, rows)
            runner.launch()
        else:
            # A recorded forward holds only as long as its context is left alone, so it gets one of
            # its own. The first forward on it is executed step by step: it settles what depends on
            # the shapes, which must not be recorded.
            runner = self._runner(graph, graph.new_recorded_context())
            runner.prepare(memory, sequences, number, rows)
            runner.launch()
            memory.recorded[graph_name, rows] = self._record(runner)

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
) -> dict[GraphName, LoadedGraph]:
    """Load the engines of one capacity.

    One that is several graphs is loaded once, under the first.

    ``runtime_cache`` is the folder for compiled kernels; None = they are not kept.
    """
    is_largest = engines is prepared.capacities[-1]
    suffix = "" if is_largest else f"-{engines.max_length}"
    loaded: dict[Path, LoadedGraph] = {}
    for graph_name, path in engines.files.items():
        if path not in loaded:
            loaded[path] = LoadedGraph(
                library,
                graph_name,
                engines.graphs[graph_name],
                path,
                io=engines.io[graph_name],
                cache=engines.cache,
                model=model,
                pack=prepared.weights.entries,
                runtime_cache=runtime_cache / f"{graph_name}{suffix}.kernels"
                if runtime_cache
                else None,
            )
    return {graph_name: loaded[path] for graph_name, path in engines.files.items()}

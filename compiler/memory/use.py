"""Adds up what a target's engines hold on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimode.formats.contract import ModelInfo, graph_contract
from trimode.formats.manifest import TargetRecord
from trimode.runtime.sessions.tensorrt.plan import lay_out_cache
from trimode.runtime.sessions.tensorrt.target import lay_out_graph


@dataclass(frozen=True)
class MemoryUse:
    """Counts the bytes on a GPU, by purpose.

    The driver's own memory comes on top. It is not known without the GPU.

    Attributes:
        weights: Weights, scales and position tables, each once.
        engines: Engines with the weights that they hold themselves.
        scratch: Temporaries of a forward, of the largest profile of each engine.
        io: Inputs and outputs of the graphs.
        cache: Keys and values of all sequences, over their whole capacity.
    """

    weights: int
    engines: int
    scratch: int
    io: int
    cache: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.engines + self.scratch + self.io + self.cache


def fixed_use(model: ModelInfo, record: TargetRecord, batch: int) -> tuple[int, int]:
    """Return the bytes of inputs and outputs, and of the cache.

    Both follow from the plan alone. The cache holds keys and values.

    Args:
        model: Facts of the model.
        record: Planned target, of one capacity.
        batch: Sequences side by side.
    """
    places = {
        engine.file: lay_out_graph(
            model, graph_contract(name, model), record, name, batch
        ).layout.num_bytes
        for name, engine in record.graphs.items()
    }
    capacity = record.capacity or model.num_positions
    cache = lay_out_cache(model, record.compute_dtype, capacity, batch)
    return sum(places.values()), cache.layout.num_bytes


def scratch_of(record: TargetRecord) -> int:
    """Return the bytes of temporaries, by the engines' plans.

    Each engine has a place of its own.
    """
    largest: dict[str, int] = {}
    for engine in record.graphs.values():
        most = max((plan.scratch for plan in engine.plans), default=0)
        largest[engine.file] = max(most, largest.get(engine.file, 0))
    return sum(largest.values())


def engine_use(sizes: Mapping[str, int], record: TargetRecord) -> int:
    """Bytes of a target's engine files, without the weights that they hold."""
    held = {engine.file: engine.constant_bytes for engine in record.graphs.values()}
    return sum(sizes[file] - constants for file, constants in held.items())

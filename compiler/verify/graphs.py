"""Runs each graph and the trunk on the same inputs.

Several positions, several numbers of rows, the drafter off and on. Twice: the target's session with
its own cache, as decoding uses it; and the portable graphs as files, on a ragged batch. These are
given the cache, and their updated keys and values are compared too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from trimode.calib.reference.torch_session import TorchCache, TorchSession
from trimode.compiler.verify.outputs import compare_outputs
from trimode.compiler.verify.rounding import Guide
from trimode.compiler.verify.runners import (
    CachedText,
    CodedRunner,
    Feed,
    SessionRunner,
    TrunkRunner,
    graph_feed,
    portable_runner,
)
from trimode.compiler.verify.tolerance import Tolerance
from trimode.errors import UsageError
from trimode.formats.contract import (
    GRAPH_NAMES,
    GraphContract,
    GraphName,
    ModelInfo,
    cache_specs,
    graph_contract,
    slots_written,
)
from trimode.formats.verification import GraphParity
from trimode.runtime.sessions.base import Ids, Session

ODD_ROWS = 7
SHORT_POSITION = 11
_GARBAGE_SLOTS = 5


@dataclass(frozen=True)
class Block:
    """Holds new tokens at one position of the text.

    Attributes:
        draft_ids: Token of the position, then slots of which most are masked; (1, T) int64.
        verify_ids: Token of the position, then drafts of which the first half are the reference's
            own; (1, T) int64.
        scale: Largest absolute logit of the reference over ``verify_ids``.
    """

    position: int
    draft_ids: Ids
    verify_ids: Ids
    scale: float

    @property
    def rows(self) -> int:
        """Number of new tokens, T."""
        return int(self.draft_ids.shape[1])

    def ids(self, graph_name: GraphName) -> Ids:
        """The input of a graph."""
        return self.draft_ids if graph_name == "draft" else self.verify_ids


def make_block(
    text: CachedText, position: int, rows: int, model: ModelInfo, rng: np.random.Generator
) -> Block:
    """Make a block at ``position`` of a text that the reference reads."""
    text.read_to(position)
    verify_ids = rng.integers(0, model.vocab_size, (1, rows))
    verify_ids[0, 0] = text.token_ids[position]
    draft_ids = np.where(rng.random((1, rows)) < 0.8, model.mask_token_id, verify_ids)
    draft_ids[0, 0] = text.token_ids[position]
    for slot in range(rows // 2):
        greedy, *_ = text.session.run("verify", text.cache, verify_ids[:, : slot + 1], position)
        verify_ids[0, slot + 1] = greedy[0, slot]
    *_, logits = text.session.run("verify", text.cache, verify_ids, position)
    return Block(position, draft_ids, verify_ids, float(np.abs(np.asarray(logits)).max()))


def row_counts(session: Session, graph_name: GraphName, model: ModelInfo) -> list[int]:
    """List 1, an odd number and the block, as far as built."""

    def is_built(rows: int) -> bool:
        if graph_name == "ar":
            return session.max_prefill_rows is None or rows <= session.max_prefill_rows
        try:
            session.check_block_length(rows, (graph_name,))
        except UsageError:
            return False
        return rows <= (
            model.max_quadratic_length if graph_name == "quadratic" else model.max_block_length
        )

    return sorted({rows for rows in (1, ODD_ROWS, model.block_size) if is_built(rows)})


def count_comparisons(
    session: Session,
    model: ModelInfo,
    positions: Sequence[int],
    graph_names: Sequence[GraphName] = GRAPH_NAMES,
) -> int:
    """Count the records that :func:`compare_target` yields."""
    return len(positions) * sum(
        len(row_counts(session, graph_name, model)) * len(_drafter_scales(graph_name, model))
        for graph_name in graph_names
    )


def compare_target(
    reference: CachedText,
    target: CachedText,
    model: ModelInfo,
    positions: Sequence[int],
    tolerance: Tolerance,
    seed: int,
    *,
    perturbed: Sequence[CachedText] = (),
    graph_names: Sequence[GraphName] = GRAPH_NAMES,
) -> Iterator[GraphParity]:
    """Compare the graphs of a target's session with the trunk.

    All texts are the same.

    Args:
        reference: Text that the trunk reads.
        target: Text that the target reads.
        model: Facts of the bundle's model.
        positions: Numbers of tokens in the cache, ascending.
        tolerance: Tolerance of the target.
        seed: Seed of the blocks.
        perturbed: Texts that the trunk reads as it rounds inputs at random within the bound. How
            far that takes it from ``reference``, times :data:`SPREAD_FACTOR`, is allowed beyond the
            tolerance.
        graph_names: Graphs to compare.
    """
    rng = np.random.default_rng(seed)
    counts = {
        graph_name: row_counts(target.session, graph_name, model) for graph_name in graph_names
    }
    for position in positions:
        blocks = {
            rows: make_block(reference, position, rows, model, rng)
            for rows in sorted({n for graph_name in graph_names for n in counts[graph_name]})
        }
        for graph_name in graph_names:
            contract = graph_contract(graph_name, model)
            runners = [
                SessionRunner("reference", reference, contract),
                SessionRunner("target", target, contract),
            ]
            spreading = [SessionRunner("perturbed", text, contract) for text in perturbed]
            for block in (blocks[rows] for rows in counts[graph_name]):
                for scale in _drafter_scales(graph_name, model):
                    feed = graph_feed(
                        graph_name, model, block.ids(graph_name), np.array([position]), scale
                    )
                    yield compare_outputs(
                        "target", contract, runners, feed, block.scale, tolerance, spreading
                    )


def compare_portable(
    reference: CachedText,
    folder: Path,
    files: dict[GraphName, str],
    model: ModelInfo,
    position: int,
    tolerance: Tolerance,
    *,
    seed: int,
    guide: Guide | None = None,
) -> Iterator[GraphParity]:
    """Compare the portable graphs with the trunk on a ragged batch.

    The batch has two sequences: the text up to ``position``, and up to half of it.

    Args:
        reference: Text that the trunk reads.
        folder: Folder of the bundle.
        files: File of each graph that is compared.
        model: Facts of the bundle's model.
        position: Number of tokens in the cache of the longer sequence.
        tolerance: Tolerance of the portable graphs.
        seed: Seed of the blocks and of the noise in unused slots.
        guide: Guide of the trunk, where it quantizes inputs; it then follows the codes that the
            graph has chosen.
    """
    rng = np.random.default_rng(seed)
    blocks = [make_block(reference, at, ODD_ROWS, model, rng) for at in (position // 2, position)]
    past = np.array([block.position for block in blocks])
    capacity = (
        int(past.max())
        + max(slots_written(graph_name, ODD_ROWS) for graph_name in files)
        + _GARBAGE_SLOTS
    )
    caches = _caches(cast("TorchCache", reference.cache), past, capacity, model, rng)
    for graph_name in files:
        contract = graph_contract(graph_name, model)
        trunk = cast("TorchSession", reference.session)
        runners = _portable_runners(
            trunk, folder / files[graph_name], contract, model, tolerance, guide
        )
        ids = np.concatenate([block.ids(graph_name) for block in blocks])
        for scale in _drafter_scales(graph_name, model):
            feed = {
                **graph_feed(
                    graph_name, model, ids, past, scale, np.array([ODD_ROWS - 2, ODD_ROWS])
                ),
                **caches,
            }
            largest = max(block.scale for block in blocks)
            yield compare_outputs("portable", contract, runners, feed, largest, tolerance)


def _portable_runners(
    trunk: TorchSession,
    path: Path,
    contract: GraphContract,
    model: ModelInfo,
    tolerance: Tolerance,
    guide: Guide | None,
) -> list[Any]:
    """The trunk and the graph, in the order in which they run."""
    if guide is None:
        return [TrunkRunner("reference", trunk, model, contract), portable_runner("portable", path)]
    # The graph runs first: the reference needs its codes.
    graph = CodedRunner("portable", path, contract, model)
    followed = (guide, graph, tolerance.relative)
    return [graph, TrunkRunner("reference", trunk, model, contract, followed)]


def _drafter_scales(graph_name: GraphName, model: ModelInfo) -> tuple[float, ...]:
    return (0.0, 1.0) if graph_name == "draft" and model.has_drafter else (0.0,)


def _caches(
    cache: TorchCache, past: Ids, capacity: int, model: ModelInfo, rng: np.random.Generator
) -> Feed:
    """Copy the text's keys and values for each sequence of the batch.

    The slots behind hold noise, which must not matter.
    """
    tensors = [part.numpy()[0] for layer in cache.layers for part in layer]  # (G, n, D)
    feed: Feed = {}
    for spec, tensor in zip(cache_specs(model, "past_key_values"), tensors, strict=True):
        values = rng.standard_normal(
            (len(past), tensor.shape[0], capacity, tensor.shape[2]), np.float32
        )
        for index, length in enumerate(past):
            values[index, :, :length] = tensor[:, :length]
        feed[spec.name] = values
    return feed

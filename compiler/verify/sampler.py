"""Compares a bundle's learned sampler with its network in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trimode.compiler.plan import SamplerSource
from trimode.errors import UsageError
from trimode.formats.contract import TOP_K, ModelInfo
from trimode.formats.manifest import SamplerRecord
from trimode.formats.sampler import load_sampler_record
from trimode.formats.texts import name_of
from trimode.formats.verification import SamplerParity
from trimode.graphs.sampler.network import BlockSampler
from trimode.graphs.sampler.trace import load_sampler
from trimode.runtime.decode.forward import NotFiniteError
from trimode.runtime.decode.unmasking import Scorer

TOLERANCE = 1e-4
"""Largest error of a score. Scores lie between 0 and 1 and are compared with thresholds; those who
choose them do so to two or three digits.
"""
STATES_PER_LENGTH = 24
_SHARPNESS = (0.5, 2.0, 8.0)
"""Of the probabilities' logits: from slots that could be anything to slots that are certain."""


class BlockState(NamedTuple):
    """Holds what a denoise forward took and returned.

    These are the block ``(L,)``, its masked slots, and candidates and probabilities ``(L, 5)``.
    """

    block: NDArray[np.int64]
    masked: NDArray[np.bool_]
    ids: NDArray[np.int64]
    probabilities: NDArray[np.float32]


def read_trained(folder: Path, expected: SamplerRecord | None) -> SamplerSource:
    """The sampler that a bundle was built with.

    Raises:
        CheckpointError: it cannot be read.
        UsageError: the bundle has none, or another.
    """
    if expected is None:
        raise UsageError(
            "expected `sampler` with a bundle that has a learned sampler, found one without",
            "leave `sampler` out",
        )
    record = load_sampler_record(folder)
    if record.sampler_sha256 != expected.sha256:
        raise UsageError(
            f"{folder}: expected the sampler that the bundle was built with,"
            f" {expected.name} ({expected.sha256[:16]}…),"
            f" found {record.sampler_sha256[:16]}…",
            "pass the `sampler` that the bundle was built with",
        )
    return SamplerSource(folder, record)


def compare_sampler(
    scorer: Scorer, trained: SamplerSource, model: ModelInfo, seed: int
) -> SamplerParity:
    """Compare scores of random states with those of the network.

    States have every block length that the sampler was trained on, and 1.

    Args:
        scorer: Scorer of the bundle.
        trained: Network that the bundle's was built from.
        model: The facts of the bundle's model.
        seed: Seed of the states.
    """
    network, rng = (
        load_sampler(trained.folder, trained.record).double(),
        np.random.default_rng(seed),
    )
    errors = [
        _error(_scores(scorer, state), _expected(network, state), state.masked)
        for length in (1, *trained.record.block_lengths)
        for state in _states(model, length, rng)
    ]
    scores = np.concatenate(errors)
    largest = float(scores.max()) if np.isfinite(scores).all() else None
    passed = largest is not None and largest <= TOLERANCE
    return SamplerParity(
        passed=passed,
        name=name_of(trained.folder),
        num_scores=len(scores),
        max_error=largest,
        tolerance=TOLERANCE,
    )


def _states(model: ModelInfo, length: int, rng: np.random.Generator) -> Iterator[BlockState]:
    count = min(TOP_K, model.vocab_size)
    for number in range(STATES_PER_LENGTH):
        masked = rng.random(length) < rng.random()
        masked[rng.integers(length)] = True  # a block without a masked slot is not asked about
        block = np.where(masked, model.mask_token_id, rng.integers(0, model.vocab_size, length))
        ids = np.stack([rng.choice(model.vocab_size, count, replace=False) for _ in range(length)])
        logits = rng.normal(scale=_SHARPNESS[number % len(_SHARPNESS)], size=(length, count + 1))
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        best = -np.sort(-shares[:, :count] / shares.sum(-1, keepdims=True), axis=-1)
        yield BlockState(block, masked, ids, best.astype(np.float32))


@torch.inference_mode()
def _expected(network: BlockSampler, state: BlockState) -> NDArray[np.float64]:
    arrays: Sequence[NDArray[np.generic]] = (
        state.block,
        state.masked,
        state.ids,
        state.probabilities.astype(np.float64),
    )
    scores: NDArray[np.float64] = network(*(torch.from_numpy(array)[None] for array in arrays))[
        0
    ].numpy()
    return scores


def _scores(scorer: Scorer, state: BlockState) -> NDArray[np.float32]:
    try:
        return scorer.score(*state)
    except NotFiniteError:
        return np.full(len(state.block), np.nan, np.float32)


def _error(
    found: NDArray[np.float32], expected: NDArray[np.float64], masked: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Absolute errors of masked slots: other scores mean nothing."""
    if found.shape != expected.shape:
        return np.full(1, np.inf)
    return np.abs(found.astype(np.float64) - expected)[masked]

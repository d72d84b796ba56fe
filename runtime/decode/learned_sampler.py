"""Scores masked slots with the learned sampler of a bundle.

The sampler is ``sampler.onnx``. ONNX Runtime runs it on the CPU, whatever runs the model.

Its inputs are lists of five candidates, a few kilobytes a block, which have come to the CPU anyway;
all that becomes of them is in the graph (:mod:`trimode.graphs.sampler.network`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimode.formats.finite import first_not_finite
from trimode.runtime.decode.forward import NotFiniteError
from trimode.runtime.decode.unmasking import Slots
from trimode.runtime.sessions.base import Array, Ids
from trimode.runtime.sessions.ort.library import load_graph, session_options


class LearnedScorer:
    """Scores slots with a bundle's sampler graph.

    It is a :class:`trimode.runtime.decode.unmasking.Scorer`.

    Args:
        path: Path of the graph.
        num_threads: Number of threads inside one operator; None = one per physical core.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        DependencyError: ONNX Runtime is not installed.
    """

    def __init__(self, path: Path, num_threads: int | None = None) -> None:
        self._session = load_graph(path, session_options(0, num_threads), ["CPUExecutionProvider"])

    def score(
        self, block: Ids, masked: Slots, ids: Array, probabilities: Array
    ) -> NDArray[np.float32]:
        """Score the slots, and refuse scores that are not finite.

        Raises:
            NotFiniteError: the score of a masked slot is NaN or infinite.
        """
        feeds = {
            "input_ids": block[None],
            "masked": masked[None],
            "top_ids": ids[None],
            "top_probabilities": probabilities[None],
        }
        scores: NDArray[np.float32] = self._session.run(["scores"], feeds)[0][0]
        slots = np.flatnonzero(masked)  # scores of others mean nothing
        if (found := first_not_finite(scores[slots])) is not None:
            raise NotFiniteError(
                "graph sampler: expected finite scores, "
                f"found {found.value} at slot {slots[found.offset]}",
                "train the sampler again, or generate without it",
            )
        return scores

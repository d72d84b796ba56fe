"""Forward times of a runtime session, as decoding calls it: token ids in, ids out, the logits left
where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.gpu.common import median_ms
from trimode.errors import TrimodeError
from trimode.formats.contract import GraphName
from trimode.runtime.sessions.base import Session

CELLS: tuple[tuple[GraphName, int], ...] = (
    ("ar", 1),
    ("draft", 8),
    ("verify", 8),
    ("draft", 16),
    ("verify", 16),
    ("draft", 32),
    ("verify", 32),
)


def forward_times(session: Session, pasts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Median milliseconds of one `run` for each graph, number of rows and number of cached tokens;
    an error in its place where there is one.
    """
    cells: list[dict[str, Any]] = []
    cache = session.new_cache()
    for past in pasts:
        for graph_name, rows in CELLS:
            ids = np.full((1, rows), 5)
            cell: dict[str, Any] = {"graph": graph_name, "rows": rows, "past": past}
            try:
                cell["ms"] = median_ms(
                    lambda graph_name=graph_name, ids=ids, past=past: session.run(
                        graph_name, cache, ids, past
                    ),
                    lambda: None,
                    repeats,
                )
            except TrimodeError as error:
                cell["error"] = error.message
            cells.append(cell)
    return cells


def compare_sessions(
    session: Session, reference: Session, vocab_size: int, rows: int
) -> dict[str, Any]:
    """A random block through every graph of two sessions, fresh caches: largest error of the
    logits, and share of equal greedy ids.
    """
    ids = np.random.default_rng(0).integers(0, vocab_size, (1, rows))
    found, expected = session.new_cache(), reference.new_cache()
    logits = [
        np.asarray(s.run("verify", c, ids, 0)[2]).astype(np.float32)
        for s, c in ((session, found), (reference, expected))
    ]
    best = [
        np.asarray(s.run("draft", c, ids, 0)[0])[..., 0]
        for s, c in ((session, found), (reference, expected))
    ]
    return {
        "largest_logit_error": float(np.abs(logits[0] - logits[1]).max()),
        "largest_logit": float(np.abs(logits[1]).max()),
        "verify_ids_equal": float((logits[0].argmax(-1) == logits[1].argmax(-1)).mean()),
        "draft_ids_equal": float((best[0] == best[1]).mean()),
    }

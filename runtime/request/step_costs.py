"""Picks the measured step costs that mode ``auto`` chooses by."""

from __future__ import annotations

from trimode.errors import UsageError
from trimode.formats.contract import ModelInfo
from trimode.runtime.auto.policy import StepCosts
from trimode.runtime.auto.timings import Timings
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.sessions.base import Session, takes_block


class StepCostTable:
    """Keeps the step costs of each kind of run.

    They are made once from the timings.
    """

    def __init__(self, session: Session, model: ModelInfo) -> None:
        self._session, self._model = session, model
        self._known: dict[tuple[bool, int, int], StepCosts] = {}

    def find(self, timings: Timings, options: DecodeOptions, batch: int) -> StepCosts:
        """Find the costs where ``batch`` texts run side by side.

        Raises:
            UsageError: the table has no block length that the graphs and the options allow.
        """
        key = (options.use_drafter and self._model.has_drafter, batch, options.block_length)
        if key not in self._known:
            self._known[key] = self._usable(timings, *key)
        return self._known[key]

    def _usable(
        self, timings: Timings, use_drafter: bool, batch: int, block_length: int
    ) -> StepCosts:
        costs = timings.costs(use_drafter=use_drafter, batch=batch)
        usable = costs.only(
            lambda length: length <= block_length and takes_block(self._session, length)
        )
        if not usable.lengths:
            raise UsageError(
                f"expected timings of a block of at most {block_length} that the graphs take, "
                f"found {', '.join(map(str, costs.lengths))}",
                f"measure it: `trimode bench BUNDLE --rows 1,{block_length}`",
            )
        return usable

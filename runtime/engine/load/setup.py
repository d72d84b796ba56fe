"""Makes what modes by load need, from a table of timings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trimode.formats.contract import GraphName
from trimode.formats.hints import BENCH_BATCH
from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.auto.prior import AcceptanceHistory
from trimode.runtime.auto.timings import Timings
from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.load.drift import DriftAlarm
from trimode.runtime.engine.load.policy import LoadPolicy, LoadSettings
from trimode.runtime.engine.load.rows import Pools, RowPolicy

logger = logging.getLogger("trimode.runtime")


@dataclass(frozen=True)
class LoadModes:
    """Holds the parts of modes by load that share a table.

    Attributes:
        policy: Policy that plans for the running rows.
        table: Costs of the forwards.
        pools: Pools of what texts have shown, by kind of prompt.
        alarm: Alarm that warns when the table has become wrong.
    """

    policy: LoadPolicy
    table: CostTable
    pools: Pools
    alarm: DriftAlarm = field(default_factory=DriftAlarm)

    def observe(
        self, graph_name: GraphName, rows: int, tokens: int, cached: int, ms: float
    ) -> None:
        """Learn from a forward that took ``ms`` milliseconds."""
        ratio = self.table.observe(graph_name, rows, tokens, cached, ms)
        if ratio is not None:
            self.alarm.note(ratio)

    def row(self, prompt: Sequence[int], length_of_plan: Callable[[], int]) -> RowPolicy:
        """Make the policy of a row that follows the plan.

        Its prompt is token ids ``(n,)``.
        """
        return RowPolicy(self.pools.of(prompt), length_of_plan)


def load_modes(
    timings: Timings,
    *,
    use_drafter: bool,
    takes_length: Callable[[int], bool] = lambda _: True,
    settings: LoadSettings | None = None,
    is_frozen: bool = False,
) -> LoadModes | None:
    """Make modes by load.

    Args:
        timings: Timings that ``trimode bench --batch`` has measured.
        use_drafter: Whether drafts are made with the adapter.
        takes_length: Function that says whether the graphs take a block of a length.
        settings: Settings of when plans change; None = the defaults.
        is_frozen: Whether the table stays as it was measured.

    Returns:
        Parts of modes by load; None where the table says nothing of several texts in a forward.
            The log says so.
    """
    table = CostTable.from_timings(timings, use_drafter=use_drafter, is_frozen=is_frozen)
    if not table.has_batches:
        logger.warning(
            "no timings of several texts in a forward: each text chooses its own mode; %s",
            BENCH_BATCH,
        )
        return None
    lengths = [length for length in table.lengths if takes_length(length)]
    found = [one for one in timings.acceptance if one.drafter == use_drafter]
    history = AcceptanceHistory(found[0].rate, found[0].kinds) if found else AcceptanceHistory()
    pools = Pools(history, max(lengths, default=2 * AR_STEP))
    policy = LoadPolicy(table, settings, lengths, is_prior_measured=bool(found))
    return LoadModes(policy, table, pools)

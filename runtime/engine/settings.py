"""Holds the settings of an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.load.drift import DriftAlarm
from trimode.runtime.engine.load.rows import MakeRowPolicy, unmeasured_rows
from trimode.runtime.engine.load.state import ModePolicy
from trimode.runtime.engine.steps import Observe


@dataclass(frozen=True)
class Settings:
    """Says how an engine works.

    Attributes:
        max_rows: Most texts at a time.
        kv_bytes: Most bytes of host memory for what ended texts have computed.
        latency_target_s: Most seconds that reading may keep a decoding row waiting.
        prefill_share: Share of the time that reading has while others decode.
        is_fair: Whether requests of one priority take turns by key.
        mode_policy: Policy that plans for all rows in mode ``auto``; None = each has its own.
        make_row_policy: Function that makes the policy of a row that follows such a plan.
        table: Costs of forwards, by which rows wait for others; None = none does.
        alarm: Alarm that warns when that table has become wrong; None = nobody is warned.
        observe: Function told of each forward how long it took; None = nobody is.
        clock: Function that gives the time in seconds; never goes back.
    """

    max_rows: int = 8
    kv_bytes: int = 1 << 30
    latency_target_s: float = 0.05
    prefill_share: float = 0.5
    is_fair: bool = False
    mode_policy: ModePolicy | None = None
    make_row_policy: MakeRowPolicy = field(default_factory=unmeasured_rows)
    table: CostTable | None = None
    alarm: DriftAlarm | None = None
    observe: Observe | None = None
    clock: Callable[[], float] = time.perf_counter

"""Reads the counts of an engine at work."""

from __future__ import annotations

from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.engine.core import EngineCore
from trimode.runtime.engine.row import EngineRow
from trimode.runtime.engine.stats import EngineStats, RowStats


def snapshot(core: EngineCore) -> EngineStats:
    """Read what an engine counts; from any thread."""
    counts, rows, reuse = core.counts, list(core.rows), core.reuse
    groups = [row.group for row in rows]
    modes = [row.request.mode for row in rows]
    capacities = [group.capacity for group in groups if group is not None]
    return EngineStats(
        is_healthy=core.error is None,
        running=len(rows),
        waiting=len(core.waiting),
        free_rows=core.settings.max_rows - len(rows),
        rows_by_capacity={size: capacities.count(size) for size in sorted(set(capacities))},
        rows_by_mode={mode: modes.count(mode) for mode in sorted(set(modes))},
        finished=counts.finished,
        failed=counts.failed,
        steps=counts.steps,
        failed_steps=counts.failed_steps,
        forwards=dict(counts.forwards),
        rows_per_forward=counts.rows_per_forward,
        forward_rows=counts.rows_served,
        forward_tokens=counts.forward_tokens,
        padding_tokens=counts.padding_tokens,
        step_sizes=dict(counts.step_sizes),
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        completion_tokens=counts.completion_tokens,
        hits=reuse.num_hits,
        kept_tokens=reuse.num_tokens,
        kept_bytes=reuse.num_bytes,
        evicted_tokens=reuse.num_evicted,
        copied_tokens=core.groups.num_copied,
        prefill_s=counts.prefill_s,
        decode_s=counts.decode_s,
        mode_switches=tuple(core.modes.switches),
        num_mode_switches=core.modes.num_switches,
        prediction_ratio=None if (table := core.settings.table) is None else table.drift,
        rows=tuple(_row(row) for row in rows),
        detours=core.num_detours,
        timing_alarms=0 if core.settings.alarm is None else core.settings.alarm.count,
    )


def _row(row: EngineRow) -> RowStats:
    request, group = row.request, row.group
    own = AR_STEP if request.mode == "ar" else request.options.block_length
    return RowStats(
        mode=request.mode,
        block_length=own if row.policy is None else row.policy.block_length,
        is_reading=row.is_reading,
        prompt_tokens=len(request.ids),
        shared_tokens=request.handle.usage.cached_tokens,
        tokens=len(row.sequence.tokens),
        cached_tokens=row.sequence.cached_length,
        capacity=0 if group is None else group.capacity,
    )

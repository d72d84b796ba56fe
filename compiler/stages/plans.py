"""Records what the new engines move, by their plans."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from trimode.compiler.plans.audit import audit_engine
from trimode.compiler.plans.report import carries_plans, compute, plans_of
from trimode.compiler.stages.state import BuildState
from trimode.formats.manifest import EngineRecord, TargetRecord
from trimode.formats.plans import PlanRecord, UnreadPlan


def record_plans(state: BuildState) -> None:
    """Add the plan of each new engine to the target's record.

    The engine itself is read, whether it was compiled or came from the cache. A plan that is not
    understood leaves no record; ``trimode build`` says so.
    """
    found = {
        name: _with_plans(record, name, state.folder)
        for name, record in state.plan.records.items()
        if carries_plans(record)
    }
    state.plan = replace(state.plan, records={**state.plan.records, **found})


def _with_plans(record: TargetRecord, target: str, folder: Path) -> TargetRecord:
    @cache
    def audited(file: str) -> tuple[PlanRecord, ...] | UnreadPlan:
        return audit_engine(folder / file, record.library, record.profiles_in(file))

    return record.with_engines(lambda engine: _with_own(engine, audited(engine.file), target))


def _with_own(
    engine: EngineRecord, plans: tuple[PlanRecord, ...] | UnreadPlan, target: str
) -> EngineRecord:
    own = plans_of(engine, plans)
    if isinstance(own, UnreadPlan):
        return engine
    known = tuple(plan.model_copy(update={"computed": compute(plan, target)}) for plan in own)
    return engine.model_copy(update={"plans": known})

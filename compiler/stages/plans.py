"""Records what the new engines move, by their plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trimode.compiler.plans.audit import audit_engine
from trimode.compiler.plans.report import carries_plans, compute
from trimode.compiler.stages.state import BuildState
from trimode.formats.manifest import EngineRecord, TargetRecord
from trimode.formats.plans import UnreadPlan


def record_plans(state: BuildState) -> None:
    """Enter what the plan of each new engine says into the target's record.

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
    return record.with_engines(lambda engine: _audited(engine, record.library, target, folder))


def _audited(engine: EngineRecord, library: str, target: str, folder: Path) -> EngineRecord:
    plans = audit_engine(folder / engine.file, library, engine.profiles)
    if isinstance(plans, UnreadPlan):
        return engine
    known = tuple(plan.model_copy(update={"computed": compute(plan, target)}) for plan in plans)
    return engine.model_copy(update={"plans": known})

"""Reports the plans of a bundle's engines, as text and data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.compiler.plans.audit import audit_engine
from trimode.compiler.targets import TARGETS
from trimode.formats.manifest import EngineRecord, PrecisionName, PrecisionRecord, TargetRecord
from trimode.formats.plans import Computed, PlanRecord, UnreadPlan

WARN_ABOVE = 1.1
"""A build warns where weights, keys and values, and copies of them are more than this multiple of
what they are once each.
"""


@dataclass(frozen=True)
class EnginePlan:
    """Holds one engine of a bundle with its plan.

    Attributes:
        capacity: Slots of its cache; None where the target has one capacity.
    """

    precision: str
    target: str
    graph_name: str
    plan: tuple[PlanRecord, ...] | UnreadPlan
    capacity: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        slots = "" if self.capacity is None else f", {self.capacity} slots"
        return f"{self.precision} {self.target} {self.graph_name}{slots}"

    def as_data(self) -> dict[str, Any]:
        """For JSON; every ``predicted_ms`` is computed, not measured."""
        facts: dict[str, Any] = {"precision": self.precision, "target": self.target}
        facts["graph"] = self.graph_name
        if self.capacity is not None:
            facts["capacity"] = self.capacity
        if isinstance(self.plan, UnreadPlan):
            return {**facts, "library": self.plan.library, "not_understood": self.plan.reason}
        return {**facts, "profiles": [self._profile(record) for record in self.plan]}

    def _profile(self, record: PlanRecord) -> dict[str, Any]:
        figures = {"floor": record.floor, "moved": record.moved, "ratio": record.ratio}
        return {
            **record.model_dump(mode="json", exclude={"computed"}),
            **figures,
            "predicted_ms": predict_ms(record, self.target),
        }


def read_plans(
    bundle: Path, precisions: Mapping[PrecisionName, PrecisionRecord], target: str | None = None
) -> list[EnginePlan]:
    """Return the plans of all engines of TensorRT-RTX.

    With ``target`` these are the engines of that target alone.

    They come from the manifest, or from the engine where the manifest has none.
    """
    return [
        EnginePlan(
            name,
            target_name,
            graph_name,
            engine.plans or _audit(bundle, record, engine),
            capacity=one.capacity if record.smaller else None,
        )
        for name, precision in precisions.items()
        for target_name, record in precision.targets.items()
        if carries_plans(record) and target in (None, target_name)
        for one in record.by_capacity()
        for graph_name, engine in one.graphs.items()
    ]


def _audit(
    bundle: Path, record: TargetRecord, engine: EngineRecord
) -> tuple[PlanRecord, ...] | UnreadPlan:
    profiles = record.profiles_in(engine.file)
    return plans_of(engine, audit_engine(bundle / engine.file, record.library, profiles))


def plans_of(
    engine: EngineRecord, plans: tuple[PlanRecord, ...] | UnreadPlan
) -> tuple[PlanRecord, ...] | UnreadPlan:
    """Choose a graph's own plans from all plans of its engine."""
    if isinstance(plans, UnreadPlan):
        return plans
    return plans[engine.first_profile : engine.first_profile + len(engine.profiles)]


def carries_plans(record: TargetRecord) -> bool:
    """Whether the engines of a target hold their plans as text.

    Engines that are compiled without the GPU do.
    """
    return record.backend == "tensorrt_rtx"


def compute(record: PlanRecord, target: str) -> Computed:
    """Compute a forward's milliseconds from its bytes and the GPU's bandwidth.

    Computed, not measured.
    """
    return Computed(
        floor=record.floor,
        moved=record.moved,
        bandwidth_gb_s=_bandwidth_of(target),
        predicted_ms=bandwidth_ms(record.moved, target),
    )


def bandwidth_ms(num_bytes: int, target: str) -> float | None:
    """Return the milliseconds that moving bytes takes; None where the target names no GPU."""
    bandwidth = _bandwidth_of(target)
    return None if bandwidth is None else num_bytes / (bandwidth * 1e6)


def _bandwidth_of(target: str) -> int | None:
    known = TARGETS.get(target)
    return None if known is None else known.bandwidth_gb_s


def predict_ms(record: PlanRecord, target: str) -> float | None:
    """Predict a forward's milliseconds; None where the target names no GPU.

    The manifest's figure, if it has one. Computed, not measured.
    """
    return (record.computed or compute(record, target)).predicted_ms


def warnings_of(plans: list[EnginePlan]) -> Iterator[str]:
    """Yield one line for each engine with many copies.

    An engine is named where it copies more than a tenth of what it has to read, or cannot be read.
    """
    for engine in plans:
        if isinstance(engine.plan, UnreadPlan):
            unread = engine.plan
            yield (
                f"warning: {engine.name}: plan not understood: {unread.reason} ({unread.library})"
            )
            continue
        worst = max(engine.plan, key=_copied_ratio)
        if _copied_ratio(worst) > WARN_ABOVE:
            causes = ", ".join(
                f"{cause} ({size / 1e6:.1f} MB)" for cause, size in causes_of(worst).items()
            )
            yield (
                f"warning: {engine.name}: a forward of {worst.rows} rows moves"
                f" {_copied_ratio(worst):.1f} times the bytes of its weights, keys and values:"
                f" {causes}"
            )


def causes_of(record: PlanRecord) -> dict[str, int]:
    """Bytes of copies by cause, the most first."""
    sums: dict[str, int] = {}
    for copy in record.copies:
        sums[copy.cause] = sums.get(copy.cause, 0) + copy.num_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _copied_ratio(record: PlanRecord) -> float:
    """Without activations, which the rows of a forward need."""
    return (record.floor + record.copied) / max(record.floor, 1)

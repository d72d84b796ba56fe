"""Makes parts of the records that jobs write."""

from __future__ import annotations

from pathlib import Path

from trimode.calib.reference.served import ServedTrunk
from trimode.formats.calibration import ScalesRecord
from trimode.formats.texts import name_of


def scales_record(served: ServedTrunk, calibration: Path | None) -> ScalesRecord | None:
    """Name the calibration of the weights; None if they are not quantized."""
    if served.calibration is None or calibration is None:
        return None
    record = served.calibration
    return ScalesRecord(
        name=name_of(calibration), precision=record.precision, scales_sha256=record.scales_sha256
    )

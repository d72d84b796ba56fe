"""Makes parts of the records that jobs write beside their results."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
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


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of these libraries."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }

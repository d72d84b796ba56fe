"""Loads the trunk with a bundle's weights, rounded and quantized alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimode.calib.reference.fake_quant import quantize_trunk
from trimode.calib.reference.torch_session import load_trunk
from trimode.formats.calibration import Calibration, check_source, load_calibration
from trimode.formats.contract import DType
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.identity import SourceDigest
from trimode.graphs.numerics.scales import linear_scales


@dataclass(frozen=True)
class ServedTrunk:
    """Holds a trunk in float32 arithmetic.

    Attributes:
        base_sha256: Digest of the checkpoint without its adapter.
        sha256: Digest of the checkpoint with its adapter.
        calibration: Calibration of the weights; None = they are not quantized.
    """

    trunk: TriModeTrunk
    base_sha256: str
    sha256: str
    calibration: Calibration | None


def load_served(
    checkpoint: Checkpoint, num_positions: int, dtype: DType, calibration: Path | None
) -> ServedTrunk:
    """Read a checkpoint as a bundle would hold it.

    It takes four bytes of memory a parameter.

    Args:
        checkpoint: Opened checkpoint.
        num_positions: Rows of the position tables.
        dtype: Type of the bundle's scales, and of its weights that are not quantized.
        calibration: Folder of the scales; None = nothing is quantized.

    Raises:
        CheckpointError: the checkpoint or the calibration cannot be read, or do not belong
            together.
        BuildError: a weight is too large for ``dtype``.
    """
    digest = SourceDigest(checkpoint)
    if calibration is None:
        trunk = load_trunk(checkpoint, num_positions, dtype, digest.read)
        return ServedTrunk(trunk, digest.base_hexdigest(), digest.hexdigest(), None)
    record, scales = load_calibration(calibration)
    layers = linear_scales(scales, record.precision, dtype)
    # A bundle quantizes the weights as they are in the checkpoint, not what rounding to its type
    # would leave of them.
    trunk = load_trunk(
        checkpoint, num_positions, dtype, digest.read, exact={f"{name}.weight" for name in layers}
    )
    check_source(str(calibration), record.source_sha256, digest.base_hexdigest())
    quantize_trunk(trunk, record.precision, layers)
    return ServedTrunk(trunk, digest.base_hexdigest(), digest.hexdigest(), record)

"""Loads the trunk that a bundle is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, get_args

from trimode.calib.reference.fake_quant import InputQuantizer
from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.compiler.verify.rounding import NUM_DITHERED, DitheredSession, Guide, guide_inputs
from trimode.compiler.verify.weights import load_quantized_trunk
from trimode.formats.calibration import QuantizedPrecision
from trimode.formats.verification import ScalesParity, WeightsParity
from trimode.graphs.checkpoint import Checkpoint, Read
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.runtime.model import TriModeModel


class LoadedTrunk(NamedTuple):
    """Holds the reference's trunk, and what loading it has compared."""

    trunk: TriModeTrunk
    weights: WeightsParity | None = None
    scales: ScalesParity | None = None


def load_reference(
    model: TriModeModel, checkpoint: Checkpoint, read: Read, calibration: Path | None
) -> LoadedTrunk:
    """Load the checkpoint's trunk, its weights stored as the bundle stores them.

    Args:
        model: The bundle.
        checkpoint: Checkpoint of the bundle.
        read: Function that reads the checkpoint's tensors; each is read once, in order.
        calibration: Folder of the scales that quantized weights were built by; None takes those of
            the bundle.
    """
    bundle = model.bundle
    for precision in get_args(QuantizedPrecision):
        if bundle.precision == precision:
            return LoadedTrunk(
                *load_quantized_trunk(bundle, precision, checkpoint, read, calibration)
            )
    return LoadedTrunk(
        load_trunk(checkpoint, model.model.num_positions, bundle.manifest.dtype, read)
    )


class Reference:
    """Runs the trunk as sessions, as it is and perturbed.

    Attributes:
        session: The trunk as it is.
        guide: Guide of its quantized inputs; None where it quantizes none.
        perturbed: Sessions perturbed within the target's bound; none where it quantizes no inputs.

    Args:
        trunk: The trunk.
        relative: Largest error of an input, over the largest of its layer.
        seed: Seed of the perturbed sessions.
        rounds_inputs: Whether the target rounds inputs of int4 products to int8. The portable
            graphs do not.
    """

    def __init__(
        self, trunk: TriModeTrunk, relative: float, seed: int, *, rounds_inputs: bool = False
    ) -> None:
        self._rounded = [
            module
            for module in trunk.modules()
            if rounds_inputs and isinstance(module, InputQuantizer) and module.block_size
        ]
        self._round(is_rounded=True)
        self.session = TorchSession(trunk)
        self.guide: Guide | None = guide_inputs(trunk)
        guide = self.guide
        self.perturbed = (
            [
                DitheredSession(trunk, guide, relative, seed + number)
                for number in range(NUM_DITHERED)
            ]
            if guide
            else []
        )

    @contextmanager
    def portable(self) -> Iterator[Guide | None]:
        """Compute as the portable graphs do meanwhile; the guide of their inputs."""
        self._round(is_rounded=False)
        try:
            yield None if self._rounded else self.guide
        finally:
            self._round(is_rounded=True)

    def _round(self, *, is_rounded: bool) -> None:
        for quantizer in self._rounded:
            quantizer.is_rounded = is_rounded

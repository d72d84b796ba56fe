"""Holds the settings of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from trimode.calib.data.checks import check_at_least, check_device_name
from trimode.errors import UsageError
from trimode.formats.calibration import QuantizedPrecision
from trimode.formats.contract import GRAPH_NAMES, GraphName

SMALLEST_BLOCK = 16
DEFAULT_BLOCK = 128


@dataclass(frozen=True)
class QuantizeSettings:
    """Holds the choices of a caller.

    Attributes:
        precision: Precision ``fp8``, ``int8`` (SmoothQuant), ``int4`` (AWQ) or ``nvfp4``.
        modes: Graphs whose rows the scales have to fit. ``ar`` is always among them, for every mode
            begins with a causal prefill.
        num_samples: Number of texts to draw; None = all of them.
        max_new_tokens: Longest answer that is decoded after each text, in each mode.
        seed: Seed for drawing prompts.
        block_size: Most inputs that share a scale, for int4: a power of two from 16 on. None = 128.
        is_per_channel: Whether each row of a weight has a scale, for fp8.
        quantizes_head: Whether ``diffusion_head`` is quantized too.
        device: Device of the model, ``cpu`` or ``cuda``.
        memory_gib: Most memory that float32 weights may take while decoding; larger weights stay in
            the checkpoint's files. None = half of what is free.
    """

    precision: QuantizedPrecision
    modes: tuple[GraphName, ...] = GRAPH_NAMES
    num_samples: int | None = None
    max_new_tokens: int = 128
    seed: int = 0
    block_size: int | None = None
    is_per_channel: bool = False
    quantizes_head: bool = False
    device: str = "cpu"
    memory_gib: float | None = None

    def check(self) -> None:
        """Check every value, and that the precision has use for it.

        Raises:
            UsageError: a value cannot be used.
        """
        if self.precision not in get_args(QuantizedPrecision):
            raise UsageError(
                f"expected `precision` {', '.join(get_args(QuantizedPrecision))}, "
                f"found {self.precision!r}",
                "choose one of these",
            )
        self._check_modes()
        check_at_least(self, num_samples=1, max_new_tokens=1, seed=0)
        self._check_granularity()
        if self.memory_gib is not None and not self.memory_gib >= 0:
            raise UsageError(
                f"expected `memory_gib` of at least 0, found {self.memory_gib}",
                "leave it out for half of what is free",
            )
        check_device_name(self.device)

    def _check_modes(self) -> None:
        unknown = [mode for mode in self.modes if mode not in GRAPH_NAMES]
        if unknown or not self.modes:
            raise UsageError(
                f"expected `modes` among {','.join(GRAPH_NAMES)}, "
                f"found {unknown[0] if unknown else 'none'}",
                "separate them by commas",
            )
        if "ar" not in self.modes:
            raise UsageError(
                f"expected `modes` to include ar, found {','.join(self.modes)}",
                "every mode begins with a causal prefill",
            )

    def _check_granularity(self) -> None:
        if self.is_per_channel and self.precision != "fp8":
            finer = "each row in any case" if self.precision == "int8" else "blocks"
            raise UsageError(
                f"expected `is_per_channel` with `precision` fp8, found {self.precision}",
                f"{self.precision} has scales for {finer}",
            )
        if self.block_size is None:
            return
        if self.precision != "int4":
            hint = (
                "blocks of nvfp4 are of 16"
                if self.precision == "nvfp4"
                else "only int4 has scales for blocks of a size to choose"
            )
            raise UsageError(
                f"expected `block_size` with `precision` int4, found {self.precision}", hint
            )
        if self.block_size < SMALLEST_BLOCK or self.block_size & (self.block_size - 1):
            raise UsageError(
                f"expected `block_size` to be a power of two from {SMALLEST_BLOCK} on, "
                f"found {self.block_size}",
                "128 is usual",
            )

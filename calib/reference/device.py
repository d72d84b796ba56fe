"""Checks that the device of a job is here."""

from __future__ import annotations

import torch

from trimode.errors import DeviceError


def check_device(device: str) -> None:
    """Raise :class:`DeviceError` where ``device``, ``cpu`` or ``cuda``, is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "expected a CUDA device, found none that torch can use",
            "leave out `device` to use the CPU",
        )

"""Checks the settings that several jobs have."""

from __future__ import annotations

from typing import Any

from trimode.errors import UsageError
from trimode.formats.contract import DType

DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
_DEFAULT = "leave it out for the default"


def check_at_least(settings: Any, **least: int) -> None:
    """Check that settings are not too small; None is always good.

    Args:
        settings: Object whose attributes are checked.
        least: Least value of each attribute, by name.

    Raises:
        UsageError: a value is too small.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise UsageError(f"expected `{name}` of at least {bound}, found {value}", _DEFAULT)


def check_above_zero(name: str, value: float | None) -> None:
    """Check that a value is positive and finite; None is good.

    Raises:
        UsageError: it is not.
    """
    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"expected `{name}` above 0, found {value}", _DEFAULT)


def check_learning_rate(value: float | None) -> None:
    """Check that a learning rate is in range; None is good.

    Raises:
        UsageError: it is not.
    """
    if value is not None and not 0 < value <= 1:
        raise UsageError(f"expected `learning_rate` above 0 and up to 1, found {value}", _DEFAULT)


def check_dtype(dtype: str) -> None:
    """Raise :class:`UsageError` if no bundle computes in this type."""
    if dtype not in DTYPES:
        raise UsageError(
            f"expected `dtype` {', '.join(DTYPES)}, found {dtype!r}",
            "what the bundle computes in; `trimode inspect BUNDLE` shows it",
        )


def check_device_name(device: str) -> None:
    """Raise :class:`UsageError` if the device has another name than ``cpu`` or ``cuda``.

    :func:`trimode.calib.reference.device.check_device` says whether the device is here.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"expected `device` cpu or cuda, found {device!r}", "choose one of these")

"""Checks of settings that several jobs have, in the words of the command line."""

from __future__ import annotations

from collections.abc import Iterable

from trimode.errors import UsageError
from trimode.formats.contract import DType

DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
_DEFAULT = "leave it out for the default"


def check_at_least(values: Iterable[tuple[str, float | None, int]]) -> None:
    """Raise :class:`UsageError` for the first value that is too small.

    Each entry is (option, value, least value). None is the default, and always good.
    """
    for name, value, least in values:
        if value is not None and value < least:
            raise UsageError(f"expected --{name} of at least {least}, found {value}", _DEFAULT)


def check_above_zero(name: str, value: float | None) -> None:
    """Raise :class:`UsageError` for a value that is not positive and finite.

    None is the default, and always good.
    """
    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"expected --{name} above 0, found {value}", _DEFAULT)


def check_learning_rate(value: float | None) -> None:
    """Raise :class:`UsageError` for a learning rate out of its range; None is the default."""
    if value is not None and not 0 < value <= 1:
        raise UsageError(f"expected --learning-rate above 0 and up to 1, found {value}", _DEFAULT)


def check_dtype(dtype: str) -> None:
    """Raise :class:`UsageError` for a type that no bundle computes in."""
    if dtype not in DTYPES:
        raise UsageError(
            f"expected --dtype {', '.join(DTYPES)}, found {dtype!r}",
            "what the bundle computes in; `trimode inspect BUNDLE` shows it",
        )


def check_device_name(device: str) -> None:
    """Raise :class:`UsageError` for an unknown name of a device.

    Whether the device is here, :func:`trimode.calib.reference.device.check_device` says.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"expected --device cpu or cuda, found {device!r}", "choose one of these")

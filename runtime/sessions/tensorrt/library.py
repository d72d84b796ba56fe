"""Imports the tensorrt and tensorrt_rtx packages, and loads engines with them.

They are the same Python interface twice, so the rest takes the package as a value.
"""

from __future__ import annotations

import importlib
import logging
import mmap
from pathlib import Path
from typing import Any

from trimode.errors import BundleError, DependencyError, DeviceError
from trimode.formats.disk import what_is_wrong
from trimode.formats.files import replace_bytes
from trimode.formats.hints import REBUILD_TARGET

_EXTRAS: dict[str, str] = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}

logger = logging.getLogger("trimode.runtime")


def import_library(backend: str) -> Any:
    """The package ``tensorrt_rtx`` or ``tensorrt``.

    Raises:
        DependencyError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module(backend)
    except (ImportError, OSError) as error:
        found = (
            "it not installed"
            if isinstance(error, ModuleNotFoundError) and error.name == backend
            else str(error).splitlines()[0]
        )
        raise DependencyError(
            f"expected the package {backend}, found {found}",
            f"pip install 'trimode[{_EXTRAS[backend]}]'",
        ) from error


class EngineLibrary:
    """Reads engines through a loaded library.

    Its logger keeps what the library says about a failure.

    Args:
        trt: Package ``tensorrt`` or ``tensorrt_rtx``.
    """

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)

    def load(self, path: Path) -> Any:
        """Deserialize an engine.

        Raises:
            BundleError: the library refuses it.
        """
        self._logger.errors.clear()
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BundleError(
                f"{path}: {self.trt.__name__} refuses the engine: {self.last_error}", REBUILD_TARGET
            )
        return engine

    def accept(self, result: Any, what: str) -> Any:
        """Return ``result`` unless it is None or False.

        With these the library says that a call failed.

        Raises:
            DeviceError: it is; names ``what`` was attempted.
        """
        if result is None or result is False:
            raise DeviceError(
                f"expected {self.trt.__name__} to {what}, found: {self.last_error}",
                "nvidia-smi shows the state of the GPU",
            )
        return result

    @property
    def last_error(self) -> str:
        """What the library said last, in one line."""
        return self._logger.errors[-1].splitlines()[0] if self._logger.errors else "no message"


def make_logger(trt: Any) -> Any:
    """A logger for the library that keeps its last errors in ``errors``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last errors.

        Nothing else is of use to somebody who runs a model.
        """

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors[:] = [*self.errors[-7:], message]
                logger.debug("%s: %s", trt.__name__, message)

    return Logger()


def load_runtime_cache(config: Any, path: Path) -> Any:
    """Give a runtime configuration a cache of compiled kernels.

    It is filled from ``path`` where that fits this machine.

    Returns:
        The cache, or None where the library has none (it then compiles no kernels while running).
    """
    if not hasattr(config, "create_runtime_cache"):
        return None
    cache = config.create_runtime_cache()
    _fill_runtime_cache(cache, path)
    config.set_runtime_cache(cache)
    return cache


def _fill_runtime_cache(cache: Any, path: Path) -> None:
    try:
        kernels = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning(
            "%s: the kernels kept there cannot be used, they are compiled again: %s",
            path.parent,
            what_is_wrong(error, path),
        )
        return
    if not cache.deserialize(kernels):
        logger.info(
            "%s: kernels were compiled for another GPU, driver or library version; "
            "they are compiled again",
            path,
        )


def save_runtime_cache(cache: Any, path: Path) -> None:
    """Write a cache of compiled kernels.

    Readers see the old file or the new one, never a part. A place that cannot be written costs
    a warning.
    """
    try:
        replace_bytes(path, bytes(memoryview(cache.serialize())))
    except OSError as error:
        logger.warning(
            "%s: the compiled kernels cannot be kept: %s", path.parent, what_is_wrong(error, path)
        )

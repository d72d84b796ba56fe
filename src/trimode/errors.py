"""Every error that trimode raises on purpose.

TrimodeError
├── UsageError            a value the caller passed is out of range (command line: exit 2)
├── CheckpointError       a Hugging Face checkpoint is incomplete or not of this family
├── BuildError            a bundle could not be built or written
├── BundleError           a bundle is missing, damaged or of an unknown schema
├── DeviceError           a GPU call failed, or the GPU cannot be used
├── EngineError           an engine cannot answer a request
│   ├── QueueFullError          as many requests wait as may
│   ├── RequestCancelledError   somebody gave the request up
│   └── RequestTimeoutError     the request's time ran out
└── DependencyError       an optional package is not installed

Each carries one line of ``message`` (what was expected, what was found) and a ``hint`` (what to do
next). Libraries name parameters in backticks; a command names its flags instead.
"""

import contextlib
import re
import sys
from collections.abc import Mapping
from typing import NoReturn


class TrimodeError(Exception):
    """Carries the message and the hint of an error raised on purpose.

    Attributes:
        message: Expected and found values, in one line.
        hint: Next step for the user, in one line; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\nhint: {hint}" if hint else message)
        self.message = message
        self.hint = hint

    def rename(self, names: Mapping[str, str]) -> None:
        """Replace `parameters` that the message and the hint name by other names."""

        def renamed(text: str) -> str:
            return re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), text)

        TrimodeError.__init__(self, renamed(self.message), renamed(self.hint))

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.message, self.hint)


class UsageError(TrimodeError):
    """A value the caller passed cannot be used."""

    exit_code = 2


class CheckpointError(TrimodeError):
    """A checkpoint is missing parts, damaged, or of another architecture."""


class BuildError(TrimodeError):
    """A bundle could not be built or written."""


class BundleError(TrimodeError):
    """A bundle is missing, damaged, or of a schema this version does not read."""


class DeviceError(TrimodeError):
    """A GPU call failed, or the GPU cannot be used."""


class EngineError(TrimodeError):
    """An engine cannot answer a request."""


class QueueFullError(EngineError):
    """As many requests wait as may; a later attempt can succeed."""


class RequestCancelledError(EngineError):
    """A request was given up before its text had ended."""


class RequestTimeoutError(EngineError):
    """A request's time ran out before its text had ended."""


class DependencyError(TrimodeError):
    """An optional package is needed and not installed."""


def exit_with(error: TrimodeError) -> NoReturn:
    """End a command: the message and the hint on stderr, the error's exit code."""
    report(error)
    sys.exit(error.exit_code)


def report(error: TrimodeError) -> None:
    """Write the message and the hint to stderr; where it is closed or full they are lost."""
    text = f"error: {error.message}\n" + (f"\nhint: {error.hint}\n" if error.hint else "")
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be closed, or None
        sys.stderr.write(text.encode("utf-8", "backslashreplace").decode())
        sys.stderr.flush()

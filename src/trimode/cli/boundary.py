"""Ends every command with one line, a hint and an exit code.

Nothing that a command does or meets may end in a traceback. ``TRIMODE_TRACEBACK=1`` shows it all
the same.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from trimode.cli.flags import COMMON_FLAGS
from trimode.errors import TrimodeError, report
from trimode.formats.texts import reason_of

TRACEBACK = "TRIMODE_TRACEBACK"
"""Environment variable that asks for tracebacks."""
INTERRUPTED = 130
_HINTS = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EROFS: "write to another place",
    errno.EMFILE: "allow more open files: ulimit -n 4096",
    errno.ENFILE: "close other programs, which hold too many open files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.EIO: "check the disk",
    errno.EBADF: "open the stream, or send it to a file",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
}


def run_guarded(command: Callable[[], object]) -> NoReturn:
    """Run a command; leave Python with its exit code, whatever happens."""
    _prepare_streams()
    code = _code_of(command)
    sys.exit(_flushed(code))


def as_error(error: BaseException) -> TrimodeError:
    """Explain an unexpected exception in one line and a hint."""
    if isinstance(error, TrimodeError):
        return error
    if isinstance(error, OSError):
        return TrimodeError(_in_words(error), _HINTS.get(error.errno or 0, _bug_hint()))
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return TrimodeError(
            f"expected enough memory, found too little{detail}", _HINTS[errno.ENOMEM]
        )
    if isinstance(error, RecursionError):
        return TrimodeError(
            "expected data of ordinary depth, found it nested too deep", _bug_hint()
        )
    if isinstance(error, UnicodeError):
        found = f"expected names and texts in UTF-8, found others: {reason_of(error)}"
        return TrimodeError(found, "rename the file, or write the text in UTF-8")
    if isinstance(error, ImportError):
        found = f"expected the package {error.name or '?'} to load, found: {reason_of(error)}"
        return TrimodeError(found, "install it again, or with it the extra that the README names")
    return TrimodeError(f"internal: {type(error).__name__}: {reason_of(error)}", _bug_hint())


def _code_of(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return 1  # whoever read has read enough
    except BaseException as error:  # a panic of a Rust library is no Exception
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        found = as_error(error)
        found.rename(COMMON_FLAGS)
        report(found)
        return found.exit_code
    return 0


def _flushed(code: int) -> int:
    """Write what is still held back, while a failure can be told."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or 1
    except (OSError, ValueError) as error:
        if not code:
            found = f"stdout: expected to be able to write, found: {reason_of(error)}"
            number = error.errno if isinstance(error, OSError) else None
            report(TrimodeError(found, _HINTS.get(number or 0, "send it to a file")))
        code = code or 1
    else:
        return code
    _discard_stdout()
    return code


def _discard_stdout() -> None:
    """Send the rest of stdout nowhere when Python ends.

    A second failure would be a traceback.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _prepare_streams() -> None:
    """Make the standard streams take any text.

    Where they are closed, files are kept off their numbers.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # stdout is opened for reading, so that writing to it fails as it should
            # the lowest free number
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  (a number, not a path)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = _lossy_stderr(sys.stderr)


class _Lossy(io.FileIO):
    """Writes messages; one that cannot be shown is lost.

    The work goes on.
    """

    def write(self, data: object) -> int:
        """Write, or pretend to."""
        try:
            return super().write(data)  # type: ignore[arg-type]  # whatever a buffer hands on
        except OSError:
            return memoryview(data).nbytes  # type: ignore[arg-type]


def _lossy_stderr(given: io.TextIOBase | object | None) -> io.TextIOWrapper:
    encoding = getattr(given, "encoding", None) or "utf-8"
    raw = io.BufferedWriter(_Lossy(2, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def _in_words(error: OSError) -> str:
    names = [_name(name) for name in (error.filename, error.filename2) if name is not None]
    return (
        f"{' -> '.join(names)}: {reason_of(error)}"
        if names
        else f"the system says: {reason_of(error)}"
    )


def _name(value: object) -> str:
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)


def _bug_hint() -> str:
    return f"set {TRACEBACK}=1 to see where it happened"

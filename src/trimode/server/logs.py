"""Writes a server's log as lines of text or of JSON.

What users and models say is not in it.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import IO, Any, Literal

LogFormat = Literal["text", "json"]
LOGGERS = ("trimode", "uvicorn")
MOST_WAITING = 10_000
"""Lines that wait for a slow reader of the log; later ones are lost, and nobody waits."""
PATIENCE_S = 5.0
"""Seconds for the lines that wait at the end."""

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", 0x2028: "\\u2028"}


class _Formatter(logging.Formatter):
    """Takes a record apart.

    The messages of exceptions may quote what a user wrote, so that only their types are told.
    """

    def __init__(self, *, with_texts: bool) -> None:
        super().__init__()
        self._with_texts = with_texts

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return what a line says, by name."""
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            found["exception"] = self._told(record.exc_info[1])
        return found

    def _told(self, error: BaseException) -> str:
        if self._with_texts:
            return "".join(traceback.format_exception(error))
        parts: list[str] = []
        found: BaseException | None = error
        while found is not None and len(parts) < 10:
            frames = "".join(traceback.format_tb(found.__traceback__))
            parts.append(f"{frames}{type(found).__module__}.{type(found).__qualname__}\n")
            found = found.__cause__ or found.__context__
        return "caused by\n".join(parts)


class JsonFormatter(_Formatter):
    """Writes a record as one JSON object in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return json.dumps(self.fields(record), default=str)


class TextFormatter(_Formatter):
    """Writes a record as one line for people.

    An exception follows in lines of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = self.fields(record)
        head = " ".join(str(fields.pop(name)) for name in ("time", "level", "logger", "message"))
        exception = fields.pop("exception", None)
        line = " ".join([head, *(f"{name}={value}" for name, value in fields.items())])
        line = line.translate(_ESCAPES)  # nobody may forge a line
        return line if exception is None else f"{line}\n{exception.rstrip()}"


@contextmanager
def logging_to(
    stream: IO[str] | None = None,
    log_format: LogFormat = "text",
    *,
    with_texts: bool = False,
    level: int = logging.INFO,
) -> Iterator[None]:
    """Log the server and uvicorn while the block runs.

    A thread of its own writes, so that a slow reader holds up neither the event loop nor the
    engine.

    Args:
        stream: Stream to write to; None = stderr.
        log_format: Form of the lines.
        with_texts: Whether messages of exceptions are told, which may quote users.
        level: Least level that is written.
    """
    make = JsonFormatter if log_format == "json" else TextFormatter
    writer = logging.StreamHandler(stream or sys.stderr)
    writer.setFormatter(make(with_texts=with_texts))
    waiting: queue.Queue[Any] = queue.Queue(MOST_WAITING)
    handler, listener = _Handler(waiting), _Listener(waiting, writer)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(one.level, one.propagate) for one in loggers]
    listener.start()
    for one in loggers:
        one.addHandler(handler)
        one.setLevel(level)
        one.propagate = False
    try:
        yield
    finally:
        for one, (old_level, propagates) in zip(loggers, before, strict=True):
            one.removeHandler(handler)
            one.setLevel(old_level)
            one.propagate = propagates
        listener.stop()


class _Handler(logging.handlers.QueueHandler):
    """Hands records on unformatted, since the formatter needs their exceptions."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.msg, record.args = record.getMessage(), None
        return record

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lose a line that nobody has room for, without a word."""


class _Listener(logging.handlers.QueueListener):
    """Waits a limited time at its end for a slow reader.

    A reader that reads no more cannot hold up the end.
    """

    def stop(self) -> None:
        with suppress(queue.Full):
            self.queue.put(None, timeout=PATIENCE_S)  # type: ignore[attr-defined]  # as typed there
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
            self._thread = None

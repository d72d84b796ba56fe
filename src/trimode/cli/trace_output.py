"""Writes the trace of ``trimode run``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimode.formats.contract import Mode
    from trimode.runtime.decode.stream import Stream
    from trimode.runtime.measure.trace import RunTrace
    from trimode.runtime.model import TriModeModel


class TraceFile:
    """Collects the trace of all answers, and writes it whole.

    Args:
        model: Opened model that answers.
        path: File to write.
    """

    def __init__(self, model: TriModeModel, path: Path) -> None:
        from trimode.runtime.measure.trace import TraceWriter, codec_of, header_of

        self._path = path
        self._lines: list[str] = []
        bundle = model.bundle
        header = header_of(bundle.manifest, bundle.precision, model.target)
        self._writer = TraceWriter(
            header, codec_of(model), lambda record: self._lines.append(record.line())
        )

    def begin(self, stream: Stream, mode: Mode, token_ids: Sequence[int]) -> RunTrace:
        """Observe a stream that nobody has read."""
        run = self._writer.begin(mode, token_ids, stream.options)
        stream.observer = run
        return run

    def save(self) -> None:
        """Write the file, or leave an old one as it is."""
        from trimode.formats.disk import disk_errors
        from trimode.formats.files import replace_text

        with disk_errors(self._path):
            replace_text(self._path, "".join(f"{line}\n" for line in self._lines))


@contextlib.contextmanager
def traced(
    trace: TraceFile | None, stream: Stream, mode: Mode, token_ids: Sequence[int]
) -> Iterator[None]:
    """Trace what is read of a stream within the block.

    Without a trace it does nothing.
    """
    if trace is None:
        yield
        return
    run = trace.begin(stream, mode, token_ids)
    try:
        yield
    except BaseException as error:
        run.end(stream.so_far, error)
        raise
    run.end(stream.result)

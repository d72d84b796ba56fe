"""Keeps the work of a calibration in a folder.

The folder is ``CALIBRATION.work`` beside the calibration:

- ``work.json``            facts of the run (checkpoint, data, settings, versions); another run
  cannot continue it
- ``episodes.jsonl``       a line for each prompt: what was decoded from it
- ``hidden-N.f32``         what enters part N (a decoder layer, or the head behind them): float32,
  ``(rows, hidden_size)``
- ``part-N.safetensors``   the scales of part N, and its layers' statistics in the metadata

A file is written under another name and renamed, or ends with a line that is whole. Of the hidden
states only those of the first part without scales are kept.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from trimode.calib.jobs.work import START_OVER, Contents, Facts, Work
from trimode.calib.reference.episodes import BlockForward, Episode
from trimode.calib.scales.layer_replay import Hidden
from trimode.errors import UsageError
from trimode.formats.calibration import LayerRecord, Scales
from trimode.formats.disk import NO_LOCKS, disk_errors
from trimode.formats.files import replace_bytes, replace_text
from trimode.formats.places import companion
from trimode.formats.texts import Unreadable, decode_text, lines_of, parse_json, read_json

log = logging.getLogger("trimode.calib")

LAYOUT_VERSION = 1
RECORD = "work.json"


class WorkFolder(Work):
    """Keeps the work of a calibration in a locked folder."""

    what = "calibration"
    is_replaced = True

    @classmethod
    def beside(cls, output: Path) -> WorkFolder:
        """Return the folder beside the calibration ``output``."""
        return cls(companion(output, ".work"))

    def contents(self) -> Contents:
        """Tell what lies there; an empty folder is nothing."""
        if not self.path.exists():
            return "nothing"
        if (self.path / RECORD).is_file():
            return "work"
        is_empty = self.path.is_dir() and not any(self.path.iterdir())
        return "nothing" if is_empty else "something else"

    def begin(self, facts: Facts) -> None:
        """Delete all files, and write the facts."""
        with disk_errors(self.path):
            _clear(self.path)
            replace_text(self.path / RECORD, json.dumps(facts, indent=1) + "\n")

    def take_up(self) -> dict[str, Any]:
        """Read the facts of the interrupted run.

        Raises:
            UsageError: they cannot be read.
        """
        file = self.path / RECORD
        try:
            record = read_json(file)
        except Unreadable as error:
            raise UsageError(
                f"{file}: expected a JSON object, found a file that cannot be read", START_OVER
            ) from error
        if not isinstance(record, dict):
            raise UsageError(
                f"{file}: expected a JSON object, found {type(record).__name__}", START_OVER
            )
        return record

    def discard(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and lock it.

        Raises:
            UsageError: another process is at work there.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY)
        try:
            _lock(handle, self.path)
            yield
        finally:
            os.close(handle)

    def append_episodes(self, episodes: list[Episode]) -> None:
        """Append what was decoded from the next prompt."""
        with (self.path / "episodes.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(
                json.dumps([[e.tokens, e.prompt_length, e.blocks] for e in episodes]) + "\n"
            )

    def episodes(self) -> list[list[Episode]]:
        """Read what was decoded so far, by prompt.

        A line that was being written when the run ended is cut off.
        """
        path = self.path / "episodes.jsonl"
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        with _readable(path):
            return [
                [_episode(*values) for values in parse_json(line)]
                for _, line in lines_of(decode_text(whole))
            ]

    def has_hidden(self, part: int) -> bool:
        """Tell whether the hidden states that enter a part are here."""
        return self._hidden(part).exists()

    def hidden(self, part: int, num_rows: int, width: int) -> Hidden:
        """Map the hidden states that enter a part, ``(num_rows, width)``."""
        path, expected = self._hidden(part), num_rows * width * 4
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UsageError(f"{path}: expected {expected} bytes, found {found}", START_OVER)
        return np.memmap(path, np.float32, "r", shape=(num_rows, width))

    @contextmanager
    def write_hidden(self, part: int) -> Iterator[Callable[[Tensor], None]]:
        """Take in the hidden states that enter a part, in order.

        They are there when the block ends well.
        """
        partial = self.path / "hidden.partial"
        with partial.open("wb") as stream:

            def write(rows: Tensor) -> None:
                stream.write(rows.numpy(force=True).tobytes())

            yield write
        partial.replace(self._hidden(part))

    def finish_part(self, part: int, scales: Scales, records: Mapping[str, LayerRecord]) -> None:
        """Write the scales of a part, and delete what entered it."""
        metadata = {name: record.model_dump_json() for name, record in records.items()}
        # save_file hides what the system says of a full disk
        replace_bytes(self._part(part), save(dict(scales), metadata))
        self._hidden(part).unlink(missing_ok=True)

    def has_part(self, part: int) -> bool:
        """Tell whether a part has its scales."""
        return self._part(part).exists()

    def part(self, part: int) -> tuple[Scales, dict[str, LayerRecord]]:
        """Read the scales of a part, and its layers' records."""
        with _readable(self._part(part)), safe_open(self._part(part), "np") as file:
            scales = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return scales, {
                name: LayerRecord.model_validate_json(text)
                for name, text in (file.metadata() or {}).items()
            }

    def _hidden(self, part: int) -> Path:
        return self.path / f"hidden-{part}.f32"

    def _part(self, part: int) -> Path:
        return self.path / f"part-{part}.safetensors"


def _clear(folder: Path) -> None:
    # the record last: it says that the rest may be deleted
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RECORD):
        path.unlink() if path.is_file() else shutil.rmtree(path)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{folder}: expected no other run at work there, found one",
            "wait for it, or name another output",
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s: this file system has no locks; see to it that no other run is at work there",
            folder,
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (Unreadable, ValueError, TypeError, SafetensorError) as error:
        raise UsageError(
            f"{path}: expected what an interrupted run wrote, found a file that cannot be read",
            START_OVER,
        ) from error


def _episode(tokens: list[int], prompt_length: int, blocks: list[Any]) -> Episode:
    return Episode(tokens, prompt_length, tuple(BlockForward(*block) for block in blocks))

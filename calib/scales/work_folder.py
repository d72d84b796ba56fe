"""Keeps what a calibration has done, so that an interrupted run can go on.

The folder is ``CALIBRATION.work`` beside the calibration.

======================
=======================================================================================================
``work.json``          what the run is of: checkpoint, data, settings, versions. Another run cannot
go on with it ``episodes.jsonl``     a line for each prompt: what was decoded from it
``hidden-N.f32``       what enters part N (a decoder layer, or the head behind them): float32,
``(rows, hidden_size)`` ``part-N.safetensors`` the scales that part N has got; the statistics of its
layers in the file's metadata ======================
=======================================================================================================

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

from trimode.calib.reference.episodes import BlockForward, Episode
from trimode.calib.scales.layer_replay import Hidden
from trimode.errors import UsageError
from trimode.formats.calibration import LayerRecord, Scales
from trimode.formats.disk import NO_LOCKS, disk_errors
from trimode.formats.places import companion
from trimode.formats.texts import Unreadable, decode_text, lines_of, parse_json, read_json

log = logging.getLogger("trimode.calib")

LAYOUT_VERSION = 1
RECORD = "work.json"
_START_OVER = "leave out --resume to start over"


def work_folder_of(output: Path) -> Path:
    """Where the work on a calibration lies."""
    return companion(output, ".work")


def check_work_folder(folder: Path, *, resume: bool) -> None:
    """Raise :class:`UsageError` where the work folder does not fit the run.

    There is nothing to resume, or something that is no work folder stands in the way.
    """
    with disk_errors(folder):
        _check_ours(folder, resume=resume)


def _check_ours(folder: Path, *, resume: bool) -> None:
    is_ours = folder.is_dir() and ((folder / RECORD).is_file() or not any(folder.iterdir()))
    if resume and not (is_ours and (folder / RECORD).is_file()):
        raise UsageError(
            f"{folder}: expected the work of an interrupted calibration, found none", _START_OVER
        )
    if folder.exists() and not is_ours:
        raise UsageError(
            f"{folder}: expected no such folder, or the work of an interrupted calibration, "
            "found something else",
            "name another output",
        )


class WorkFolder:
    """An open work folder; use :func:`open_work`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append_episodes(self, episodes: list[Episode]) -> None:
        """Keep what was decoded from the next prompt."""
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
        """Whether the hidden states that enter a part are here."""
        return self._hidden(part).exists()

    def hidden(self, part: int, num_rows: int, width: int) -> Hidden:
        """The hidden states that enter a part, ``(num_rows, width)``, mapped."""
        path, expected = self._hidden(part), num_rows * width * 4
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UsageError(f"{path}: expected {expected} bytes, found {found}", _START_OVER)
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
        """Keep what a part has got, and drop what entered it."""
        metadata = {name: record.model_dump_json() for name, record in records.items()}
        partial = self.path / "part.partial"
        # save_file hides what the system says of a full disk
        partial.write_bytes(save(dict(scales), metadata))
        partial.replace(self._part(part))
        self._hidden(part).unlink(missing_ok=True)

    def has_part(self, part: int) -> bool:
        """Whether a part has got its scales."""
        return self._part(part).exists()

    def part(self, part: int) -> tuple[Scales, dict[str, LayerRecord]]:
        """What a part has got."""
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


@contextmanager
def open_work(folder: Path, facts: Mapping[str, Any], *, resume: bool) -> Iterator[WorkFolder]:
    """Open a work folder: emptied, or with ``resume`` as the run before left it.

    It stays when the block ends.

    Args:
        folder: Folder from :func:`work_folder_of`.
        facts: Facts that identify the run; JSON.
        resume: go on with what is there.

    Raises:
        UsageError: there is nothing to resume, it is the work of another run, or another process is
            at it.
    """
    check_work_folder(folder, resume=resume)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _begin(folder, {"layout_version": LAYOUT_VERSION, **facts}, resume=resume)
        yield WorkFolder(folder)


def _begin(folder: Path, facts: Mapping[str, Any], *, resume: bool) -> None:
    with disk_errors(folder):
        if resume:
            _check_facts(folder, facts)
        else:
            _clear(folder)
            write_record(folder / RECORD, facts)


def read_record(folder: Path) -> dict[str, Any]:
    """What the work in a folder is of.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        record = read_json(folder / RECORD)
    except Unreadable as error:
        raise UsageError(
            f"{folder / RECORD}: expected a JSON object, found a file that cannot be read",
            _START_OVER,
        ) from error
    if not isinstance(record, dict):
        raise UsageError(
            f"{folder / RECORD}: expected a JSON object, found {type(record).__name__}", _START_OVER
        )
    return record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _check_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    found = read_record(folder)
    for name, value in json.loads(json.dumps(facts)).items():  # a tuple is a list there
        if found.get(name) != value:
            raise UsageError(
                f"{folder}: expected the work of a calibration with {name} {json.dumps(value)}, "
                f"found {json.dumps(found.get(name))}",
                f"repeat the interrupted command and add --resume, or {_START_OVER}",
            )


def _clear(folder: Path) -> None:
    # the record last: it says that the rest may be deleted
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RECORD):
        path.unlink() if path.is_file() else shutil.rmtree(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with disk_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


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
            _START_OVER,
        ) from error


def _episode(tokens: list[int], prompt_length: int, blocks: list[Any]) -> Episode:
    return Episode(tokens, prompt_length, tuple(BlockForward(*block) for block in blocks))

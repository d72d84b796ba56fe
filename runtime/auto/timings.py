"""Keeps the milliseconds of each kind of forward on one machine.

``trimode bench`` writes them, mode ``auto`` reads them.

A table belongs to a machine as much as to a bundle, so it does not lie in the bundle but in the
user's cache folder, as ``timings/<key>.json``. The key is the digest of all that the figures depend
on: the files that run, the target, the library, the threads, the processor and, where one is used,
the GPU. A table is therefore right or absent, never of something else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from trimode.errors import UsageError
from trimode.formats.contract import GraphName
from trimode.formats.disk import what_is_wrong
from trimode.formats.files import replace_text
from trimode.formats.hints import BENCH
from trimode.formats.record import OtherVersion, Record, read_record
from trimode.formats.texts import Unreadable, reason_of
from trimode.formats.versions import version_of
from trimode.runtime.auto.policy import StepCosts
from trimode.runtime.auto.prior import (
    AcceptanceHistory,
    FinishedText,
    PromptGroup,
    acceptance_rate,
    tell_apart,
)
from trimode.runtime.bundle.cache_folder import TIMINGS, default_folder
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.sessions.gpu import Gpu, find_gpu

SCHEMA_VERSION = 2
logger = logging.getLogger("trimode.runtime")
_Key = tuple[GraphName, int, int, bool]


class ForwardTime(Record):
    """Records the wall time of one kind of forward, in milliseconds.

    It is taken from ids in to ids out.

    Attributes:
        rows: Number of tokens of the forward, per sequence.
        past: Number of tokens cached before it.
        batch: Number of sequences in it.
        drafter: Whether the drafter's adapter was on.
        num_runs: Number of forwards that were timed.
        least_ms: Least time of these. The others are of these, too; the quartiles say how much they
            vary.
    """

    graph: GraphName
    rows: int = Field(ge=1)
    past: int = Field(ge=0)
    batch: int = Field(default=1, ge=1)
    drafter: bool = False
    num_runs: int = Field(ge=1)
    least_ms: float = Field(gt=0)
    lower_quartile_ms: float = Field(gt=0)
    median_ms: float = Field(gt=0)
    upper_quartile_ms: float = Field(gt=0)


class Subject(Record):
    """Says what was measured where: all that the figures depend on.

    Attributes:
        source_name: Name of the checkpoint.
        files_sha256: Digest over the digests of the weight packs and graphs that ran.
        target: Name of the bundle's target, or ``portable``.
        library: Library that ran the graphs, and its version.
        num_threads: Number of threads inside one operator on the CPU; None = the library's choice.
        gpu: Name and compute capability of the GPU; None where the target runs on the CPU.
    """

    source_name: str
    precision: str
    files_sha256: str
    target: str
    library: str
    num_threads: int | None
    cpu: str
    num_cores: int | None
    gpu: str | None

    @property
    def key(self) -> str:
        """Digest of all of it but the name."""
        facts = self.model_dump(mode="json", exclude={"source_name"})
        return hashlib.sha256(
            json.dumps([SCHEMA_VERSION, facts], sort_keys=True).encode()
        ).hexdigest()


class AcceptanceRecord(Record):
    """Records the share of drafts that are accepted, over some prompts.

    A draft counts where those before it in the block were accepted.

    Attributes:
        drafter: Whether the drafter's adapter was on.
        rate: Share of drafts that are accepted.
        block_length: Number of slots of a block.
        num_prompts: Number of prompts.
        kinds: Kinds that the prompts are of.
    """

    drafter: bool
    rate: float = Field(ge=0, le=1)
    block_length: int
    num_prompts: int
    kinds: tuple[PromptGroup, ...] = ()

    @classmethod
    def of(
        cls, texts: Sequence[FinishedText], block_length: int, *, drafter: bool
    ) -> AcceptanceRecord | None:
        """Record what texts have shown; None where no draft was judged."""
        rate = acceptance_rate(texts)
        if rate is None:
            return None
        return cls(
            drafter=drafter,
            rate=rate,
            block_length=block_length,
            num_prompts=len(texts),
            kinds=tell_apart(texts),
        )


class Timings(Record):
    """Holds the timings of one machine and bundle.

    ``command``, ``date`` and ``system`` say how they came about. ``acceptance`` is there if
    prompts were given.
    """

    schema_version: int = SCHEMA_VERSION
    trimode_version: str
    command: str
    date: str
    system: str
    subject: Subject
    forwards: tuple[ForwardTime, ...] = Field(min_length=1)
    acceptance: tuple[AcceptanceRecord, ...] = ()

    def costs(self, *, use_drafter: bool, batch: int = 1) -> StepCosts:
        """Make the step costs of mode ``auto`` from the least times.

        Whatever else the machine does is added to a time, and never taken from it.

        Times are those of as many sequences in a forward, or of the next larger number that was
        measured, or else of the largest. On a busy machine a median says how often a forward was
        interrupted, which happens to long ones far more often than to short ones.

        Raises:
            UsageError: it has no AR step, or no block length that was both drafted and verified,
                over the same cached tokens.
        """
        batches = sorted({one.batch for one in self.forwards})
        nearest = next((size for size in batches if size >= batch), batches[-1])
        least: dict[_Key, float] = {
            (one.graph, one.rows, one.past, one.drafter): one.least_ms
            for one in self.forwards
            if one.batch == nearest
        }
        past = tuple(sorted(past for graph, rows, past, _ in least if (graph, rows) == ("ar", 1)))
        drafts: dict[int, tuple[float, ...]] = {}
        verifications: dict[int, tuple[float, ...]] = {}
        for length in sorted({rows for graph, rows, _, _ in least if graph == "draft"}):
            draft: list[_Key] = [("draft", length, p, use_drafter) for p in past]
            verify: list[_Key] = [("verify", length, p, False) for p in past]
            if past and all(key in least for key in (*draft, *verify)):
                drafts[length], verifications[length] = (
                    tuple(least[key] for key in draft),
                    tuple(least[key] for key in verify),
                )
        if not drafts:
            raise UsageError(
                "expected timings of one row and of a block, "
                "over the same cached tokens, found none",
                BENCH,
            )
        found = [
            AcceptanceHistory(one.rate, one.kinds)
            for one in self.acceptance
            if one.drafter == use_drafter
        ]
        return StepCosts(
            past, tuple(least["ar", 1, p, False] for p in past), drafts, verifications, *found[:1]
        )


def subject_of(bundle: Bundle, target: str, num_threads: int | None) -> Subject:
    """Describe what a table of this bundle would be about.

    That is the table that would be measured here and now.
    """
    record = bundle.chosen.targets.get(target)
    graphs = (
        bundle.chosen.graphs.values()
        if record is None
        else [engine.file for engine in record.engines]
    )
    digests = [bundle.manifest.files[name].sha256 for name in (*bundle.chosen.packs, *graphs)]
    gpu = find_gpu() if record is not None and record.device == "cuda" else None
    return Subject(
        source_name=bundle.manifest.source.name,
        precision=bundle.precision,
        files_sha256=hashlib.sha256("".join(digests).encode()).hexdigest(),
        target=target,
        library=_onnxruntime()
        if record is None or record.backend == "onnxruntime"
        else record.library,
        num_threads=num_threads,
        cpu=_cpu(),
        num_cores=os.cpu_count(),
        gpu=f"{gpu.name}, compute capability {gpu.compute_capability}"
        if isinstance(gpu, Gpu)
        else None,
    )


def table_path(subject: Subject) -> Path:
    """Return the path where the table of a subject is kept.

    Raises:
        OSError: the user has no home.
    """
    return default_folder() / TIMINGS / f"{subject.key}.json"


def save_timings(timings: Timings, path: Path) -> None:
    """Write a table, or leave what is there.

    Raises:
        OSError: it cannot be written; names the disk.
    """
    try:
        replace_text(path, timings.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise OSError(error.errno, what_is_wrong(error, path)) from error


def read_timings(path: Path) -> Timings:
    """Read a table.

    Raises:
        UsageError: it cannot be read, or is of another schema.
    """
    try:
        return read_record(path, Timings, (SCHEMA_VERSION,))
    except OtherVersion as error:
        raise UsageError(f"{path}: {error.reason}", BENCH) from error
    except Unreadable as error:
        raise UsageError(
            f"{path}: expected a table of timings, "
            f"found a file that cannot be read ({error.reason})",
            BENCH,
        ) from error


def find_timings(subject: Subject, given: Timings | None = None) -> Timings | None:
    """Find the table for a subject.

    It is the given one, or the kept one. The log says where there is none, or one of something
    else.
    """
    if given is not None:
        _warn_of_differences(given.subject, subject)
        return given
    try:
        path = table_path(subject)
        if path.is_file():
            return read_timings(path)
        reason = "none were measured here"
    except (OSError, UsageError) as error:
        reason = reason_of(error)
    logger.warning(
        "no timings for mode auto (%s): it speculates with one block length throughout; %s",
        reason,
        BENCH,
    )
    return None


def _warn_of_differences(given: Subject, here: Subject) -> None:
    differing = [
        f"{name} {value} (here {getattr(here, name)})"
        for name, value in vars(given).items()
        if value != getattr(here, name)
    ]
    if differing:
        logger.warning("the timings were measured otherwise, with %s", ", ".join(differing))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    facts = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    kind = [
        facts[name]
        for name in ("model name", "cpu family", "model", "CPU implementer", "CPU part")
        if name in facts
    ]
    return ", ".join([platform.machine(), *(kind or [platform.processor()])])


def _onnxruntime() -> str:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        if version := version_of(name):
            return f"{name} {version}"
    return "onnxruntime"

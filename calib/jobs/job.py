"""Runs a job: check, read, resume, write, learn, measure, record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from trimode.calib.data.prompts import Prompts
from trimode.calib.jobs.work import Facts, Work
from trimode.errors import BuildError, CheckpointError, UsageError
from trimode.formats.contract import ModelInfo
from trimode.formats.disk import mount_of
from trimode.formats.files import check_apart, check_replaceable
from trimode.graphs.checkpoint import Checkpoint
from trimode.progress import Progress

W = TypeVar("W", bound=Work)
Data = TypeVar("Data")
Learned = TypeVar("Learned")
Measured = TypeVar("Measured")
Record = TypeVar("Record")
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class OutputKind(Generic[W]):
    """Describes the folder that a job writes.

    Attributes:
        record: Name of the file that marks the folder.
        what: Name of the folder in messages.
        work: Type of the work that an interrupted run leaves beside the folder.
    """

    record: str
    what: str
    work: type[W]

    def check(self, folder: Path) -> None:
        """Check that ``folder`` holds nothing that would be lost.

        Raises:
            UsageError: it holds something else than :attr:`what`.
        """
        check_replaceable(folder, self.record, self.what)

    def check_run(self, folder: Path, checkpoint: Path, *inputs: Path | None, resume: bool) -> None:
        """Check before anything is read that a run can write ``folder``.

        Args:
            folder: Folder to write.
            checkpoint: Folder of the checkpoint.
            inputs: Other files and folders that are read.
            resume: Whether an interrupted run is continued.

        Raises:
            UsageError: the folder holds something else or overlaps an input, or its work does not
                allow the run.
        """
        self.check(folder)
        check_apart(folder, checkpoint, *inputs)
        self.work.beside(folder).check(resume=resume)


class Job(ABC, Generic[Settings, W, Data, Learned, Measured, Record]):
    """Runs once from its checks to its record.

    Args:
        checkpoint: Checkpoint that the job is about.
        model: Facts that decoding needs.
        prompts: Prompts that the model answers.
        output: Folder to write: new, empty, or an earlier output, which is replaced whole.
        settings: Choices of the caller.
        progress: Display of the stages.
        resume: Whether an interrupted run with the same arguments is continued.

    Attributes:
        kind: Description of the folder.
    """

    kind: OutputKind[W]

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelInfo,
        prompts: Prompts,
        output: Path,
        settings: Settings,
        progress: Progress,
        *,
        resume: bool = False,
    ) -> None:
        self.checkpoint, self.model, self.prompts = checkpoint, model, prompts
        self.output, self.settings, self.progress = output, settings, progress
        self.resume = resume

    def run(self) -> Record:
        """Run every step, and return the record.

        What is done lies beside the output until the result is written. An error of the input
        deletes that work, since a resumed run would meet it again.

        Raises:
            UsageError: a setting or a prompt cannot be used, the output is something else, or there
                is nothing to resume.
            CheckpointError: the checkpoint or a calibration cannot be read, they do not belong
                together, or numbers are not finite.
            DeviceError: the device is not here.
            DependencyError: a library is missing.
            BuildError: the job gives up, or the work cannot be written.
        """
        self.check()
        work = self.kind.work.beside(self.output)
        facts = self.read(work)
        with work.opened(facts, resume=self.resume):
            try:
                record = self._finish(work)
            except (UsageError, CheckpointError):
                work.discard()
                raise
            except OSError as error:
                raise BuildError(
                    f"{work.path}: expected to write what is done, "
                    f"found: {error} (on the disk {mount_of(work.path)})",
                    "free disk space, then continue with `resume`",
                ) from error
            work.discard()
        return record

    def _finish(self, work: W) -> Record:
        data = self.write(work)
        learned = self.learn(work, data)
        measured = self.measure(data, learned)
        return self.record(data, learned, measured)

    @abstractmethod
    def check(self) -> None:
        """Check all that can be checked before the checkpoint is read."""

    @abstractmethod
    def read(self, work: W) -> Facts:
        """Read the checkpoint; return the facts that tell this run from others."""

    @abstractmethod
    def write(self, work: W) -> Data:
        """Have the model write what ``work`` lacks; return all of it."""

    @abstractmethod
    def learn(self, work: W, data: Data) -> Learned:
        """Compute the result, from where ``work`` stands."""

    @abstractmethod
    def measure(self, data: Data, learned: Learned) -> Measured:
        """Measure the result."""

    @abstractmethod
    def record(self, data: Data, learned: Learned, measured: Measured) -> Record:
        """Write the folder, all or nothing; return its record."""

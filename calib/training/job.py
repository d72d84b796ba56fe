"""Holds the steps that the trainings of drafters and samplers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from trimode.calib.data.prompts import Prompts, Split, split_texts
from trimode.calib.jobs.job import Data, Job, Learned, Measured, Record
from trimode.calib.jobs.records import scales_record
from trimode.calib.jobs.work import Facts
from trimode.calib.reference.device import check_device
from trimode.calib.reference.served import ServedTrunk, load_served
from trimode.calib.training.run_state import RunState, write_missing
from trimode.calib.training.settings import TrainingSettings
from trimode.formats.calibration import PromptsRecord
from trimode.formats.contract import ModelInfo
from trimode.formats.texts import name_of
from trimode.formats.versions import PYTHON, versions
from trimode.graphs.checkpoint import Checkpoint
from trimode.progress import Progress
from trimode.runtime.text.prompts import Text

LIBRARIES = (PYTHON, "torch", "numpy", "safetensors")
S = TypeVar("S", bound=TrainingSettings)


class TrainingJob(
    Job[S, RunState, Data, Learned, Measured, Record], Generic[S, Data, Learned, Measured, Record]
):
    """Trains on the model's own answers, against the model as served.

    Takes four bytes of memory a parameter, and what the steps need. Ctrl-C leaves a state beside
    the output that ``resume`` continues. If the budget is one of steps, the run then ends with the
    same bytes as without the interruption. :class:`trimode.calib.jobs.job.Job` has the other
    arguments.

    Args:
        calibration: Folder of the scales that the bundle will have; None = its weights are not
            quantized.

    Attributes:
        split: Prompts by their use; known after :meth:`check`.
        served: Model as it will be served; known after :meth:`read`.
    """

    split: Split
    served: ServedTrunk

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelInfo,
        prompts: Prompts,
        output: Path,
        settings: S,
        progress: Progress,
        *,
        calibration: Path | None = None,
        resume: bool = False,
    ) -> None:
        super().__init__(checkpoint, model, prompts, output, settings, progress, resume=resume)
        self.calibration = calibration

    @property
    @abstractmethod
    def longest_window(self) -> int:
        """Positions behind the longest text that a forward may still use."""

    @property
    def run_sha256(self) -> str:
        """Digest of the checkpoint, as far as the training depends on it."""
        return self.served.base_sha256

    def check(self) -> None:
        """Check settings, folders and the device, and split the prompts."""
        chosen, inputs = self.settings, (self.checkpoint.path, self.calibration)
        chosen.check()
        self.kind.check_run(self.output, *inputs, resume=self.resume)
        check_device(chosen.device)
        draw = chosen.num_samples, chosen.num_held_out, chosen.seed
        self.split = split_texts(self.prompts.texts, *draw, self.model)

    def read(self, work: RunState) -> Facts:  # noqa: ARG002  # a state does not say what was read
        """Load the model as it will be served; return the run's facts.

        The device is none of them: it may change between runs, though the bytes will then differ.
        """
        advance = self.progress.stage("read checkpoint", 1)
        self.served = load_served(
            self.checkpoint,
            self.model.max_length + self.longest_window,
            self.settings.dtype,
            self.calibration,
        )
        self.served.trunk.to(self.settings.device)
        advance(1)
        calibration = self.served.calibration
        return {
            "checkpoint": self.run_sha256,
            "scales": calibration.scales_sha256 if calibration else None,
            "data": self.prompts.sha256,
            **{name: value for name, value in asdict(self.settings).items() if name != "device"},
        }

    def write_each(
        self, work: RunState, stage: str, write: Callable[[int, Text], Any]
    ) -> list[Any]:
        """Write the entries that ``work`` lacks; return all, in order."""
        texts = self.split.texts
        write_missing(work, texts, write, self.progress.stage(stage, len(texts)))
        return work.written

    def common_record(self) -> dict[str, Any]:
        """Return the fields that the records of all trainings have."""
        return {
            "source_name": name_of(self.checkpoint.path),
            "source_sha256": self.served.base_sha256,
            "calibration": scales_record(self.served, self.calibration),
            "dtype": self.settings.dtype,
            "libraries": versions(LIBRARIES),
        }

    def prompts_record(self, train: int, validation: int, held_out: int) -> PromptsRecord:
        """Return the record of the prompts, with the number in each part."""
        return PromptsRecord(
            sha256=self.prompts.sha256,
            num_train=train,
            num_validation=validation,
            num_held_out=held_out,
        )

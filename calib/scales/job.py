"""Calibrates from beginning to end.

The checkpoint is decoded, then calibrated a part at a time, and every step can be resumed after.
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import trimode
from trimode.calib.data.draw import draw_texts
from trimode.calib.reference.device import check_device
from trimode.calib.reference.episodes import (
    Episode,
    RecordingSession,
    answer,
    count_rows,
    forwards_of,
    merged,
)
from trimode.calib.reference.mapped import (
    MappedEmbedding,
    float32_tensor,
    mapped_tensor,
    open_trunk,
)
from trimode.calib.reference.memory import free_memory_bytes
from trimode.calib.scales.layer_replay import DecoderPart, HeadPart, Part, replay
from trimode.calib.scales.layers import Shapes, quantized_layers
from trimode.calib.scales.modelopt import ALGORITHMS, load_modelopt
from trimode.calib.scales.modelopt_inputs import find_scales
from trimode.calib.scales.settings import QuantizeSettings
from trimode.calib.scales.statistics import InputStatistics, quantize_weight, snr_db
from trimode.calib.scales.work_folder import (
    WorkFolder,
    check_work_folder,
    open_work,
    read_record,
    work_folder_of,
)
from trimode.errors import BuildError, CheckpointError, UsageError
from trimode.formats.calibration import (
    RECORD,
    SCHEMA_VERSION,
    Calibration,
    CalibrationDataRecord,
    LayerRecord,
    Scales,
    save_calibration,
)
from trimode.formats.contract import ModelInfo, Role
from trimode.formats.disk import mount_of
from trimode.formats.files import check_apart, check_replaceable
from trimode.formats.texts import name_of
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.decoder.trunk import Rope
from trimode.graphs.identity import SourceDigest, stamp_of
from trimode.progress import Progress
from trimode.runtime.decode.forward import NotFiniteError
from trimode.runtime.text.prompts import Text

log = logging.getLogger(__name__)
LIBRARIES = ("nvidia-modelopt", "torch", "numpy")


def calibrate(
    checkpoint: Checkpoint,
    model: ModelInfo,
    texts: Sequence[Text],
    texts_sha256: str,
    output: Path,
    settings: QuantizeSettings,
    progress: Progress,
    *,
    resume: bool = False,
) -> Calibration:
    """Find the scales of a checkpoint's linear layers and write them to the folder ``output``.

    Work that is done lies in a folder beside ``output`` until the calibration is written. It stays
    there when anything ends the run but an error in what the caller gave, with which nobody can go
    on.

    Args:
        checkpoint: Checkpoint whose weights are quantized.
        model: Facts that decoding needs.
        texts: token ids of prompts.
        texts_sha256: Digest of the file that they came from.
        output: new, empty, or an earlier calibration, which is replaced whole.
        settings: Choices of the caller.
        progress: Display of the stages.
        resume: go on where a run with the same arguments was interrupted. Without it, what such a
            run left is deleted.

    Raises:
        UsageError: a setting or a text cannot be used, ``output`` is something else, a layer never
            saw anything but zeros, or there is nothing that could be resumed.
        CheckpointError: the checkpoint cannot be read, or a layer's input is not finite.
        DeviceError: the device is not here.
        DependencyError: ModelOpt is not installed.
        BuildError: ModelOpt gives up, or the work cannot be written.
    """
    settings.check()
    check_output(output)
    check_apart(output, checkpoint.path)
    folder = work_folder_of(output)
    check_work_folder(folder, resume=resume)
    check_device(settings.device)
    drawn = draw_texts(texts, settings.num_samples, settings.seed, model)
    layers, block_size = quantized_layers(checkpoint.config, settings)
    load_modelopt()  # it takes minutes to need it, and no time to miss it
    job = _Job(checkpoint, model, settings, layers, block_size, progress)
    facts = _facts(checkpoint, texts_sha256, settings)
    facts["source_sha256"] = _source_digest(
        checkpoint, read_record(folder) if resume else {}, facts, progress
    )
    with open_work(folder, facts, resume=resume) as work:
        try:
            episodes = job.decode(work, drawn)
            scales, records = job.calibrate_parts(work, episodes)
            if job.failures:
                raise CheckpointError(job.failures[0].message, job.failures[0].hint)
        except (UsageError, CheckpointError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except OSError as error:
            found = (
                f"{folder}: expected to write what is done, "
                f"found: {error} (on the disk {mount_of(folder)})"
            )
            raise BuildError(found, "free disk space, then go on with --resume") from error
        worst = min(records, key=lambda name: records[name].weight_snr_db)
        log.info(
            "%d layers; the weight that loses most is %s, %.1f dB",
            len(records),
            worst,
            records[worst].weight_snr_db,
        )
        calibration = job.record(facts, count_rows(episodes), len(drawn), records)
        save_calibration(output, calibration, scales)
        shutil.rmtree(folder, ignore_errors=True)
    return calibration


def check_output(output: Path) -> None:
    """Raise :class:`UsageError` where ``output`` is neither empty nor a calibration."""
    check_replaceable(output, RECORD, "a calibration")


@dataclass(frozen=True)
class _Job:
    """What all steps of one calibration need."""

    checkpoint: Checkpoint
    model: ModelInfo
    settings: QuantizeSettings
    layers: Shapes
    block_size: int | None
    progress: Progress
    failures: list[NotFiniteError] = field(default_factory=list)

    def decode(self, work: WorkFolder, texts: Sequence[Text]) -> list[Episode]:
        """Answer the texts that are not answered yet."""
        done = work.episodes()
        advance = self.progress.stage("decode", len(texts))
        advance(len(done))
        if len(done) < len(texts):
            trunk = open_trunk(
                self.checkpoint,
                self.model.num_positions,
                self.settings.device,
                self._memory_bytes(),
            )
            session = RecordingSession(trunk, self.settings.modes)
            for text in texts[len(done) :]:
                done.append(
                    answer(
                        session, self.model, text, self.settings.modes, self.settings.max_new_tokens
                    )
                )
                if session.failure is not None:  # the replay names the layer
                    self.failures.append(session.failure)
                    break
                work.append_episodes(done[-1])
                advance(1)
        return merged([episode for answers in done for episode in answers])

    def calibrate_parts(
        self, work: WorkFolder, episodes: Sequence[Episode]
    ) -> tuple[Scales, dict[str, LayerRecord]]:
        """Calibrate the parts that have no scales yet, in order; those of all."""
        num_parts = self.checkpoint.config.num_hidden_layers + self.settings.quantizes_head
        advance = self.progress.stage("calibrate", num_parts)
        rope = Rope(self.checkpoint.config, self.model.num_positions).to(self.settings.device)
        scales: Scales = {}
        records: dict[str, LayerRecord] = {}
        for index in range(num_parts):
            if not work.has_part(index):
                if index == 0 and not work.has_hidden(0):
                    self._embed(work, episodes)
                self._calibrate_part(work, index, rope, episodes)
                # in AWQ ModelOpt's modules refer to themselves: their weights would stay while the
                # next part is loaded
                gc.collect()
            part_scales, part_records = work.part(index)
            scales.update(part_scales)
            records.update(part_records)
            advance(1)
        return scales, {name: records[name] for name in self.layers}

    def record(
        self,
        facts: dict[str, Any],
        num_rows: Mapping[Role, int],
        num_samples: int,
        layers: dict[str, LayerRecord],
    ) -> Calibration:
        """What the folder says; the digest of its scales is added when they are written."""
        return Calibration(
            schema_version=SCHEMA_VERSION,
            trimode_version=trimode.__version__,
            precision=self.settings.precision,
            algorithm=_algorithm_name(self.settings),
            block_size=self.block_size,
            source_name=name_of(self.checkpoint.path),
            source_sha256=facts["source_sha256"],
            scales_sha256="",
            data=CalibrationDataRecord(
                sha256=facts["data_sha256"],
                num_samples=num_samples,
                seed=self.settings.seed,
                num_tokens=dict(num_rows),
            ),
            layers=layers,
            libraries=_libraries(),
        )

    def _memory_bytes(self) -> int:
        if self.settings.memory_gib is not None:
            return int(self.settings.memory_gib * 2**30)
        return free_memory_bytes(self.settings.device) // 2

    def _embed(self, work: WorkFolder, episodes: Sequence[Episode]) -> None:
        embedding = MappedEmbedding(
            mapped_tensor(self.checkpoint.tensors["encoder.embed_tokens.weight"])
        )
        with work.write_hidden(0) as write:
            for episode in episodes:
                for forward in forwards_of(episode):
                    write(embedding(torch.tensor(forward.ids)))

    def _calibrate_part(
        self, work: WorkFolder, index: int, rope: Rope, episodes: Sequence[Episode]
    ) -> None:
        """Look at the inputs and compute the next part's, then let ModelOpt quantize."""
        part = self._part(index, rope)
        hidden = work.hidden(
            index, sum(count_rows(episodes).values()), self.checkpoint.config.hidden_size
        )
        statistics = InputStatistics(part.linears)
        with work.write_hidden(index + 1) as write:
            for forward, step in replay(part, episodes, hidden):
                for name, x in step.inputs.items():
                    statistics.observe(forward.role, name, x)
                write(step.outputs)
        statistics.check_seen()
        scales: Scales = {}
        if part.linears:
            weights = {name: linear.weight for name, linear in part.linears.items()}
            scales = find_scales(
                weights,
                statistics,
                lambda: (step.inputs for _, step in replay(part, episodes, hidden)),
                self.block_size,
                self.settings,
            )
        records = {name: self._record(name, scales, amax) for name, amax in statistics.amax.items()}
        work.finish_part(index, scales, records)

    def _part(self, index: int, rope: Rope) -> Part:
        if index < self.checkpoint.config.num_hidden_layers:
            return DecoderPart(self.checkpoint, index, rope, self.layers)
        return HeadPart(self.checkpoint, self.settings.device)

    def _record(self, name: str, scales: Scales, input_amax: dict[str, float]) -> LayerRecord:
        """Record statistics for people.

        The weight is read again: ModelOpt has smoothed the other in place.
        """
        weight = float32_tensor(self.checkpoint.tensors[f"{name}.weight"], "cpu").numpy()
        quantized = quantize_weight(
            weight,
            scales[f"{name}.weight_amax"],
            self.settings.precision,
            scales.get(f"{name}.pre_quant_scale"),
        )
        return LayerRecord(input_amax=input_amax, weight_snr_db=round(snr_db(weight, quantized), 3))


def _facts(checkpoint: Checkpoint, texts_sha256: str, settings: QuantizeSettings) -> dict[str, Any]:
    """List what has to be the same when a run is resumed.

    Whether weights are mapped changes nothing.
    """
    return {
        "trimode_version": trimode.__version__,
        "libraries": _libraries(),
        "checkpoint": name_of(checkpoint.path),
        "checkpoint_stamp": stamp_of(checkpoint),
        "data_sha256": texts_sha256,
        **{name: value for name, value in asdict(settings).items() if name != "memory_gib"},
    }


def _source_digest(
    checkpoint: Checkpoint, resumed: dict[str, Any], facts: dict[str, Any], progress: Progress
) -> str:
    """Give the checkpoint's digest.

    Of files that nobody touched since the resumed run took it, that one.
    """
    if resumed.get("checkpoint_stamp") == facts["checkpoint_stamp"] and isinstance(
        resumed.get("source_sha256"), str
    ):
        return str(resumed["source_sha256"])
    digest = SourceDigest(checkpoint)
    advance = progress.stage(
        "read checkpoint", sum(entry.num_bytes for entry in checkpoint.tensors.values())
    )
    for num_bytes in digest.read_all():
        advance(num_bytes)
    return digest.base_hexdigest()


def _libraries() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _algorithm_name(settings: QuantizeSettings) -> str:
    algorithm: Any = ALGORITHMS[settings.precision]
    return algorithm if isinstance(algorithm, str) else str(algorithm["method"])

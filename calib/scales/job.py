"""Finds the scales of a checkpoint, from the checks to the calibration.

The checkpoint is decoded, then calibrated a part at a time; every step can be resumed.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import trimode
from trimode.calib.data.draw import draw_texts
from trimode.calib.jobs.job import Job, OutputKind
from trimode.calib.jobs.work import Facts
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
from trimode.calib.scales.layer_replay import DecoderPart, HeadPart, Hidden, Part, replay
from trimode.calib.scales.layers import quantized_layers
from trimode.calib.scales.modelopt import ALGORITHMS, load_modelopt
from trimode.calib.scales.modelopt_inputs import find_scales
from trimode.calib.scales.settings import QuantizeSettings
from trimode.calib.scales.statistics import InputStatistics, quantize_weight, snr_db
from trimode.calib.scales.work_folder import LAYOUT_VERSION, WorkFolder
from trimode.errors import CheckpointError
from trimode.formats.calibration import (
    RECORD,
    SCHEMA_VERSION,
    Calibration,
    CalibrationDataRecord,
    LayerRecord,
    Scales,
    save_calibration,
)
from trimode.formats.texts import name_of
from trimode.formats.versions import PYTHON, versions
from trimode.graphs.decoder.trunk import Rope
from trimode.graphs.identity import digest_of, stamp_of
from trimode.runtime.decode.forward import NotFiniteError
from trimode.runtime.text.prompts import Text

log = logging.getLogger(__name__)
LIBRARIES = (PYTHON, "nvidia-modelopt", "torch", "numpy")
CALIBRATION = OutputKind(RECORD, "a calibration", WorkFolder)


Parts = tuple[Scales, dict[str, LayerRecord]]


class ScalesJob(
    Job[QuantizeSettings, WorkFolder, list[Episode], Parts, None, Calibration],
):
    """Finds the scales of a checkpoint's linear layers.

    Work that is done lies in a folder beside the output until the calibration is written. Without
    ``resume``, what an interrupted run left is deleted.
    """

    kind = CALIBRATION
    failure: NotFiniteError | None = None
    source_sha256 = ""

    def check(self) -> None:
        """Check settings and folders, draw texts, choose layers, load ModelOpt."""
        settings = self.settings
        settings.check()
        self.kind.check_run(self.output, self.checkpoint.path, resume=self.resume)
        check_device(settings.device)
        self.drawn = draw_texts(self.prompts.texts, settings.num_samples, settings.seed, self.model)
        self.layers, self.block_size = quantized_layers(self.checkpoint.config, settings)
        load_modelopt()  # it takes minutes to need it, and no time to miss it

    def read(self, work: WorkFolder) -> Facts:
        """Take the checkpoint's digest; whether weights are mapped changes no result."""
        chosen = asdict(self.settings)
        facts = {
            "layout_version": LAYOUT_VERSION,
            "trimode_version": trimode.__version__,
            "libraries": versions(LIBRARIES),
            "checkpoint": name_of(self.checkpoint.path),
            "checkpoint_stamp": stamp_of(self.checkpoint),
            "data_sha256": self.prompts.sha256,
            **{name: value for name, value in chosen.items() if name != "memory_gib"},
        }
        resumed = work.take_up() if self.resume else {}
        self.source_sha256 = self._known_digest(resumed, facts) or self._digest()
        return {**facts, "source_sha256": self.source_sha256}

    def _known_digest(self, resumed: Facts, facts: Facts) -> str:
        """Return the resumed run's digest if nobody touched the files since."""
        is_same = resumed.get("checkpoint_stamp") == facts["checkpoint_stamp"]
        known = resumed.get("source_sha256")
        return known if is_same and isinstance(known, str) else ""

    def _digest(self) -> str:
        advance = self.progress.stage("read checkpoint", self.checkpoint.num_bytes)
        return digest_of(self.checkpoint, advance).base_hexdigest()

    def write(self, work: WorkFolder) -> list[Episode]:
        """Answer the texts that are not answered yet; return all episodes."""
        done = work.episodes()
        advance = self.progress.stage("decode", len(self.drawn))
        advance(len(done))
        if len(done) < len(self.drawn):
            session = self._session()
            for text in self.drawn[len(done) :]:
                done.append(self._answer(session, text))
                if session.failure is not None:  # the replay names the layer
                    self.failure = session.failure
                    break
                work.append_episodes(done[-1])
                advance(1)
        return merged([episode for answers in done for episode in answers])

    def _session(self) -> RecordingSession:
        settings, gib = self.settings, self.settings.memory_gib
        memory = free_memory_bytes(settings.device) // 2 if gib is None else int(gib * 2**30)
        trunk = open_trunk(self.checkpoint, self.model.num_positions, settings.device, memory)
        return RecordingSession(trunk, settings.modes)

    def _answer(self, session: RecordingSession, text: Text) -> list[Episode]:
        return answer(session, self.model, text, self.settings.modes, self.settings.max_new_tokens)

    def learn(self, work: WorkFolder, data: list[Episode]) -> Parts:
        """Calibrate the parts without scales, in order; return those of all."""
        config = self.checkpoint.config
        num_parts = config.num_hidden_layers + self.settings.quantizes_head
        advance = self.progress.stage("calibrate", num_parts)
        rope = Rope(config, self.model.num_positions).to(self.settings.device)
        scales: Scales = {}
        records: dict[str, LayerRecord] = {}
        for index in range(num_parts):
            if not work.has_part(index):
                if index == 0 and not work.has_hidden(0):
                    self._embed(work, data)
                self._calibrate_part(work, index, rope, data)
                # in AWQ ModelOpt's modules refer to themselves: their weights would stay while the
                # next part is loaded
                gc.collect()
            part_scales, part_records = work.part(index)
            scales.update(part_scales)
            records.update(part_records)
            advance(1)
        if self.failure is not None:
            raise CheckpointError(self.failure.message, self.failure.hint)
        return scales, {name: records[name] for name in self.layers}

    def _embed(self, work: WorkFolder, episodes: Sequence[Episode]) -> None:
        table = mapped_tensor(self.checkpoint.tensors["encoder.embed_tokens.weight"])
        embedding = MappedEmbedding(table)
        with work.write_hidden(0) as write:
            for episode in episodes:
                for forward in forwards_of(episode):
                    write(embedding(torch.tensor(forward.ids)))

    def _calibrate_part(
        self, work: WorkFolder, index: int, rope: Rope, episodes: Sequence[Episode]
    ) -> None:
        """Observe a part's inputs, compute the next part's, and find scales."""
        part = self._part(index, rope)
        num_rows = sum(count_rows(episodes).values())
        hidden = work.hidden(index, num_rows, self.checkpoint.config.hidden_size)
        statistics = InputStatistics(part.linears)
        with work.write_hidden(index + 1) as write:
            for forward, step in replay(part, episodes, hidden):
                for name, x in step.inputs.items():
                    statistics.observe(forward.graph_name, name, x)
                write(step.outputs)
        statistics.check_seen()
        scales = self._find_scales(part, statistics, episodes, hidden)
        records = {
            name: self._layer_record(name, scales, amax) for name, amax in statistics.amax.items()
        }
        work.finish_part(index, scales, records)

    def _find_scales(
        self,
        part: Part,
        statistics: InputStatistics,
        episodes: Sequence[Episode],
        hidden: Hidden,
    ) -> Scales:
        if not part.linears:
            return {}
        return find_scales(
            {name: linear.weight for name, linear in part.linears.items()},
            statistics,
            lambda: (step.inputs for _, step in replay(part, episodes, hidden)),
            self.block_size,
            self.settings,
        )

    def _part(self, index: int, rope: Rope) -> Part:
        if index < self.checkpoint.config.num_hidden_layers:
            return DecoderPart(self.checkpoint, index, rope, self.layers)
        return HeadPart(self.checkpoint, self.settings.device)

    def _layer_record(self, name: str, scales: Scales, input_amax: dict[str, float]) -> LayerRecord:
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

    def measure(self, data: list[Episode], learned: Parts) -> None:  # noqa: ARG002  # weights alone
        """Log the weight that loses most."""
        records = learned[1]
        worst = min(records, key=lambda name: records[name].weight_snr_db)
        snr = records[worst].weight_snr_db
        log.info("%d layers; the weight that loses most is %s, %.1f dB", len(records), worst, snr)

    def record(self, data: list[Episode], learned: Parts, measured: None) -> Calibration:  # noqa: ARG002  # it is in the parts
        """Write scales and record, all or nothing."""
        scales, layers = learned
        calibration = Calibration(
            schema_version=SCHEMA_VERSION,
            trimode_version=trimode.__version__,
            precision=self.settings.precision,
            algorithm=_algorithm_name(self.settings),
            block_size=self.block_size,
            source_name=name_of(self.checkpoint.path),
            source_sha256=self.source_sha256,
            scales_sha256="",  # is added when they are written
            data=CalibrationDataRecord(
                sha256=self.prompts.sha256,
                num_samples=len(self.drawn),
                seed=self.settings.seed,
                num_tokens=count_rows(data),
            ),
            layers=layers,
            libraries=versions(LIBRARIES),
        )
        save_calibration(self.output, calibration, scales)
        return calibration


def _algorithm_name(settings: QuantizeSettings) -> str:
    algorithm: Any = ALGORITHMS[settings.precision]
    return algorithm if isinstance(algorithm, str) else str(algorithm["method"])

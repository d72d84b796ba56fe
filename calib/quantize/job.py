"""A calibration from beginning to end."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

import trimode
from trimode.calib.quantize.extract import extract_scales
from trimode.calib.quantize.modelopt_job import ALGORITHMS, block_size_of, load_modelopt, quantized_linears, run_modelopt, split_branches
from trimode.calib.quantize.settings import QuantizeSettings
from trimode.calib.quantize.statistics import InputStatistics, quantize_weight, snr_db
from trimode.calib.quantize.texts import Text, draw_texts
from trimode.calib.quantize.workload import Episode, decoders_for, record, replay
from trimode.calib.torch_session import load_trunk
from trimode.errors import DeviceError, UsageError
from trimode.graphs.calibration import RECORD, SCHEMA_VERSION, Calibration, DataRecord, LayerRecord, Scales, save_calibration
from trimode.graphs.checkpoint import Checkpoint, to_float32
from trimode.graphs.contract import ModelInfo
from trimode.graphs.source import SourceDigest
from trimode.graphs.trunk import TriModeTrunk

log = logging.getLogger(__name__)
LIBRARIES = ("nvidia-modelopt", "torch", "numpy")


class Progress(Protocol):
    """Told what happens."""

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        """A stage begins that will make ``total`` steps; the result is told how many more were made."""
        ...


def calibrate(
    checkpoint: Checkpoint,
    model: ModelInfo,
    texts: Sequence[Text],
    texts_sha256: str,
    output: Path,
    settings: QuantizeSettings,
    progress: Progress,
) -> Calibration:
    """Find the scales of a checkpoint's linear layers and write them to the folder ``output``; four bytes of memory a parameter.

    Args:
        checkpoint: whose weights are quantized.
        model: the facts that decoding needs.
        texts: token ids of prompts.
        texts_sha256: of the file that they came from.
        output: new, empty, or an earlier calibration, which is replaced whole.
        settings: see :class:`QuantizeSettings`.
        progress: told what happens.

    Raises:
        UsageError: a setting or a text cannot be used, ``output`` is something else, or a layer never saw anything but zeros.
        CheckpointError: the checkpoint cannot be read, or a layer's input is not finite.
        DeviceError: the device is not here.
        DependencyError: ModelOpt is not installed.
    """
    settings.check()
    check_output(output)
    _check_device(settings.device)
    drawn = draw_texts(texts, settings.num_samples, settings.seed, model)
    load_modelopt()  # it takes minutes to need it, and no time to miss it
    digest = SourceDigest(checkpoint)
    advance = progress.stage("read checkpoint", 1)
    trunk = load_trunk(checkpoint, model.num_positions, digest=digest).to(settings.device)
    advance(1)
    advance = progress.stage("decode", len(drawn) * len(decoders_for(settings.modes)))
    episodes = record(trunk, model, drawn, settings.modes, settings.max_new_tokens, advance)
    scales, statistics, block_size = _find_scales(trunk, episodes, settings, progress)
    calibration = Calibration(
        schema_version=SCHEMA_VERSION,
        trimode_version=trimode.__version__,
        precision=settings.precision,
        algorithm=_algorithm_name(settings),
        block_size=block_size,
        source_name=checkpoint.path.resolve().name,
        source_sha256=digest.base_hexdigest(),
        scales_sha256="",
        data=DataRecord(sha256=texts_sha256, num_samples=len(drawn), seed=settings.seed, num_tokens=dict(statistics.num_rows)),
        layers=_layer_records(checkpoint, scales, statistics, settings),
        libraries={"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}},
    )
    save_calibration(output, calibration, scales)
    return calibration


def check_output(output: Path) -> None:
    """Raise :class:`UsageError` where ``output`` exists and is neither empty nor a calibration."""
    if output.exists() and not (output.is_dir() and ((output / RECORD).is_file() or not any(output.iterdir()))):
        raise UsageError(f"{output}: expected a new or empty folder, or a calibration to replace, found something else", "name another folder")


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("expected a CUDA device, found none that torch can use", "leave out --device to calibrate on the CPU")


def _find_scales(
    trunk: TriModeTrunk, episodes: Sequence[Episode], settings: QuantizeSettings, progress: Progress
) -> tuple[Scales, InputStatistics, int | None]:
    split_branches(trunk)
    linears = quantized_linears(trunk, settings)
    block_size = block_size_of(linears, settings) if settings.precision == "int4" else None
    statistics = InputStatistics(linears)
    advance = progress.stage("look at inputs", len(episodes))
    with statistics.hooked():
        replay(trunk, episodes, advance, statistics.watch, needs_head=settings.quantizes_head)
    statistics.check_seen()

    def forward_loop(model: TriModeTrunk) -> None:
        replay(model, episodes, progress.stage("calibrate", len(episodes)), needs_head=settings.quantizes_head)

    run_modelopt(trunk, linears, settings, forward_loop)
    return extract_scales(linears, settings.precision), statistics, block_size


def _layer_records(checkpoint: Checkpoint, scales: Scales, statistics: InputStatistics, settings: QuantizeSettings) -> dict[str, LayerRecord]:
    """Statistics for people. Weights are read again: those of the trunk have been smoothed in place."""
    records = {}
    for name, input_amax in statistics.amax.items():
        entry = checkpoint.tensors[f"{name}.weight"]
        weight = to_float32(b"".join(entry.chunks()), entry.dtype).reshape(entry.shape)
        quantized = quantize_weight(weight, scales[f"{name}.weight_amax"], settings.precision, scales.get(f"{name}.pre_quant_scale"))
        records[name] = LayerRecord(input_amax=input_amax, weight_snr_db=round(snr_db(weight, quantized), 3))
    worst = min(records, key=lambda name: records[name].weight_snr_db)
    log.info("%d layers; the weight that loses most is %s, %.1f dB", len(records), worst, records[worst].weight_snr_db)
    return records


def _algorithm_name(settings: QuantizeSettings) -> str:
    algorithm: Any = ALGORITHMS[settings.precision]
    return algorithm if isinstance(algorithm, str) else str(algorithm["method"])

"""The commands that measure quantization: their sizes against real packs, their folders, what they
print and what they refuse.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import config_of, write_checkpoint
from typer.testing import CliRunner

from trimode.calib.evaluate.quantization.candidate import (
    COMPUTE_TYPE,
    ROUNDED,
    quantized_copy,
    read_candidate,
    weight_bytes,
)
from trimode.calib.evaluate.quantization.questions import QualitySettings
from trimode.calib.evaluate.quantization.sensitivity import DropLimit
from trimode.calib.reference.torch_session import load_trunk
from trimode.cli.calibrate.sensitivity import run_sensitivity
from trimode.cli.main import app
from trimode.cli.parse import parse_modes
from trimode.cli.report import run_report
from trimode.compiler.options import BuildOptions
from trimode.compiler.pack.layout import plan_pack
from trimode.compiler.pack.writer import write_pack
from trimode.compiler.plan import make_plan
from trimode.errors import CheckpointError, TrimodeError, UsageError
from trimode.formats.calibration import (
    Calibration,
    QuantizedPrecision,
    load_calibration,
    save_calibration,
)
from trimode.formats.evaluation import Report
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.identity import SourceDigest
from trimode.graphs.numerics.integers import dequantize
from trimode.graphs.numerics.nvfp4 import decode
from trimode.graphs.numerics.quantization import load_quantization
from trimode.runtime.bundle.weights import WeightPack
from trimode.runtime.text.prompts import USUAL_STYLE

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "block_size": 8,
}
BAD = "encoder.layers.0.mlp.gate_proj"
NUM_POSITIONS = 40
BLOCK = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("r") / "it", config_of(**CONFIG), rank=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(2)
    lines = [json.dumps({"token_ids": rng.integers(12, 100, 4 + 5 * i).tolist()}) for i in range(4)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def calibrated(
    checkpoint: Path,
    folder: Path,
    precision: QuantizedPrecision,
    *,
    ruined: str | None = None,
    source: str | None = None,
) -> Path:
    """Every layer but the head, by hand: weights at their largest magnitudes, inputs at a guess;
    all weights of one may become zero.
    """
    opened, rng, scales = open_checkpoint(checkpoint), np.random.default_rng(3), {}
    digest = SourceDigest(opened)
    for name in opened.tensors:
        weight = np.frombuffer(b"".join(digest.read(name)), np.float32).reshape(
            opened.tensors[name].shape
        )
        layer = name.removesuffix(".weight")
        if weight.ndim < 2 or "embed" in name or "lora" in name or "head" in name:
            continue
        if precision == "int4":
            amax = np.abs(weight).reshape(weight.shape[0], -1, BLOCK).max(2)
        else:
            amax = np.asarray(np.abs(weight).max() if precision == "fp8" else np.abs(weight).max(1))
            scales[f"{layer}.input_amax"] = np.array(12, np.float32)
        if precision != "fp8":
            scales[f"{layer}.pre_quant_scale"] = np.exp(
                rng.uniform(-0.1, 0.1, weight.shape[1])
            ).astype(np.float32)
        scales[f"{layer}.weight_amax"] = np.asarray(
            amax * (1e4 if layer == ruined else 1), np.float32
        )
    record = Calibration(
        schema_version=1,
        trimode_version="0",
        precision=precision,
        algorithm="by hand",
        block_size=BLOCK if precision == "int4" else None,
        source_name="it",
        source_sha256=source or digest.base_hexdigest(),
        scales_sha256="",
        data=None,
        layers={},
        libraries={},
    )
    save_calibration(folder, record, scales)
    return folder


def settings_of(modes: str, **changes: Any) -> QualitySettings:
    return replace(QualitySettings(parse_modes(modes), max_new_tokens=8), **changes)


def write_report(
    checkpoint: Path,
    output: Path,
    data: Path,
    *calibrations: str,
    modes: str = "ar,diffusion,linear-spec",
    as_json: bool = True,
    **changes: Any,
) -> bool:
    return run_report(
        checkpoint,
        output,
        data,
        calibrations,
        settings_of(modes, **changes),
        style=USUAL_STYLE,
        draws=False,
        as_json=as_json,
    )


def search(
    checkpoint: Path, output: Path, calibration: Path, data: Path, max_drop: float = 50.0
) -> None:
    run_sensitivity(
        checkpoint,
        output,
        data,
        calibration,
        DropLimit(max_drop, ranking_samples=2),
        settings_of("ar,linear-spec"),
        style=USUAL_STYLE,
        as_json=True,
    )


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", *ROUNDED])
def test_bytes_and_weights_are_those_of_a_pack(checkpoint: Path, tmp_path: Path, name: str) -> None:
    opened = open_checkpoint(checkpoint)
    spec = name if name in ROUNDED else str(calibrated(checkpoint, tmp_path / "cal", name))  # type: ignore[arg-type]
    candidate = read_candidate(spec, opened)
    quantization = load_quantization(
        "rtn" if name in ROUNDED else Path(spec), candidate.precision, opened
    )
    layout = plan_pack(opened, NUM_POSITIONS, COMPUTE_TYPE, quantization)
    write_pack(layout, tmp_path / "pack", lambda _: None)
    pack = WeightPack(tmp_path / "pack")

    trunk = load_trunk(opened, NUM_POSITIONS)
    layers = candidate.linear_scales(trunk)
    packed = sum(
        entry.num_bytes for tensor, entry in pack.entries.items() if not tensor.startswith("rope.")
    )
    assert weight_bytes(opened, COMPUTE_TYPE, candidate.precision, layers) == packed
    assert weight_bytes(opened, "float32") == sum(
        4 * np.prod(entry.shape) for entry in opened.tensors.values()
    )

    quantized = quantized_copy(trunk, candidate.precision, layers)
    for layer in layers:
        raw = (
            np.asarray(pack.raw(f"{layer}.weight"))
            .view(np.uint8)
            .reshape(opened.tensors[f"{layer}.weight"].shape[0], -1)
        )
        scale = pack.entries[f"{layer}.weight_scale"]
        if candidate.precision == "nvfp4":
            stored = decode(
                raw,
                np.asarray(pack.raw(f"{layer}.weight_scale")).reshape(scale.shape),
                pack.widened(f"{layer}.weight_scale_2"),
            )
        else:
            wide = (pack.raw(f"{layer}.weight_scale").view(np.uint16).astype(np.uint32) << 16).view(
                np.float32
            )
            stored = dequantize(raw, wide.reshape(scale.shape), candidate.precision)
        np.testing.assert_array_equal(quantized.get_parameter(f"{layer}.weight").numpy(), stored)


def test_a_report_from_the_command(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = calibrated(checkpoint, tmp_path / "cal", "fp8")
    assert write_report(checkpoint, tmp_path / "out", data, str(calibration), "rtn-int4")
    said = capsys.readouterr()
    report = Report.model_validate_json(said.out)  # nothing else is on stdout
    assert report == Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert [(p.name, p.precision, p.algorithm) for p in report.precisions] == [
        ("float32", None, None),
        (str(calibration), "fp8", "by hand"),
        ("rtn-int4", "int4", "rtn"),
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]

    write_report(
        checkpoint, tmp_path / "out", data, "rtn-int8", modes="ar,linear-spec", as_json=False
    )
    table = capsys.readouterr().out
    assert "linear-spec, no drafter" in table
    assert "rtn-int8" in table
    assert "diffusion" not in table


def test_a_calibration_with_layers_left_out_builds(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = calibrated(checkpoint, tmp_path / "cal", "int4", ruined=BAD)
    search(checkpoint, tmp_path / "cal2", calibration, data, max_drop=75)
    printed = json.loads(capsys.readouterr().out)
    assert printed["kept"][0] == BAD
    record, scales = load_calibration(tmp_path / "cal2")
    assert record.algorithm == printed["algorithm"] == "by hand+sensitivity"
    assert record.sensitivity is not None
    assert list(record.sensitivity.kept) == printed["kept"]
    assert f"{BAD}.weight_amax" not in scales

    opened = open_checkpoint(checkpoint)
    plan = make_plan(opened, BuildOptions(calibration=tmp_path / "cal2"))
    digest = SourceDigest(opened)
    layout = plan_pack(opened, NUM_POSITIONS, plan.dtype, plan.quantization, read=digest.read)
    write_pack(layout, tmp_path / "pack", lambda _: None)
    assert plan.quantization is not None
    plan.quantization.check_source(digest.base_hexdigest())
    codes = {
        name.removesuffix(".weight")
        for name, entry in WeightPack(tmp_path / "pack").entries.items()
        if entry.dtype == "int4"
    }
    assert codes == {name.rpartition(".")[0] for name in load_calibration(calibration)[1]} - set(
        printed["kept"]
    )


@pytest.mark.parametrize(
    ("calibrations", "changes", "kind", "message"),
    [
        (
            ("rtn-fp8",),
            {},
            UsageError,
            "expected a folder, rtn-int8, rtn-int4 or rtn-nvfp4, found rtn-fp8",
        ),
        (("rtn",), {}, UsageError, "found rtn"),
        (("missing",), {}, CheckpointError, "expected a calibration with calibration.json"),
        (("rtn-int8", "rtn-int8"), {}, UsageError, "found rtn-int8 twice"),
        (
            ("rtn-int8",),
            {"modes": "ar,verify"},
            UsageError,
            "expected --modes among ar,diffusion,linear-spec, found verify",
        ),
        (("rtn-int8",), {"num_samples": 9}, UsageError, "expected at least 9 prompts, found 4"),
        (("rtn-int8",), {"max_new_tokens": 0}, UsageError, "--max-new-tokens of at least 1"),
    ],
)
def test_reports_that_are_refused(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    calibrations: tuple[str, ...],
    changes: Any,
    kind: type[TrimodeError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        write_report(checkpoint, tmp_path / "out", data, *calibrations, **changes)
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_but_its_own_kind(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("all of it")
    with pytest.raises(UsageError, match="or a report to replace"):
        write_report(checkpoint, other, data, "rtn-int8")
    with pytest.raises(UsageError, match="or a calibration to replace"):
        search(checkpoint, other, tmp_path, data)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_another_checkpoint_and_no_data(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    foreign = calibrated(checkpoint, tmp_path / "cal", "int8", source="f" * 64)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for call in (
        lambda path: write_report(checkpoint, tmp_path / "out", path, str(foreign)),
        lambda path: search(checkpoint, tmp_path / "out", foreign, path),
    ):
        with pytest.raises(CheckpointError, match="expected a calibration of this checkpoint"):
            call(data)
        with pytest.raises(UsageError, match="expected at least one prompt, found none"):
            call(empty)
    assert not (tmp_path / "out").exists()


def test_answers_take_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"token_ids": [12, 13], "answer": "yes"}\n')
    with pytest.raises(UsageError, match=r"expected tokenizer\.json, found none"):
        write_report(checkpoint, tmp_path / "out", data, "rtn-int8")


@pytest.mark.parametrize(
    "words", [["report"], ["report", "quantization"], ["calibrate", "sensitivity"]]
)
def test_help_is_there(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert (
        ("quantization" in result.output)
        if words == ["report"]
        else ("--calibration" in result.output)
    )

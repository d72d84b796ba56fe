"""A learned sampler from the command that trains it to the tokens that it fills, as a user meets
it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import config_of, write_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from trimode.calib.demo.tasks import examples
from trimode.calib.evaluate.speed_of_light.measure import LightSettings, measure_light
from trimode.calib.sampler.scorer import TorchScorer
from trimode.cli.main import app
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.errors import BundleError, CheckpointError, UsageError
from trimode.formats.sampler import RECORD, WEIGHTS, load_sampler_record
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.identity import SourceDigest
from trimode.graphs.sampler.trace import load_sampler
from trimode.runtime import TriModeModel
from trimode.runtime.bundle.open import read_manifest
from trimode.runtime.decode.algorithms import Counters, decode_diffusion
from trimode.runtime.decode.options import DecodeOptions

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "block_size": 8,
}
TRAINING = [
    "--steps",
    "30",
    "--block-length",
    "3,8",
    "--max-new-tokens",
    "14",
    "--held-out",
    "3",
    "--d-model",
    "16",
    "--layers",
    "1",
    "--heads",
    "2",
    "--feed-forward",
    "12",
    "--batch-size",
    "64",
]


def trimode(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("c") / "it", config_of(**SMALL), rank=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = np.random.default_rng(8), tmp_path_factory.mktemp("d") / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"token_ids": rng.integers(12, 99, n).tolist()}) + "\n"
            for n in rng.integers(3, 10, 12)
        )
    )
    return path


@pytest.fixture(scope="module")
def sampler(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("s") / "mine"
    done = trimode("calibrate", "sampler", checkpoint, "--data", data, "-o", output, *TRAINING)
    assert done.exit_code == 0, done.output
    for line in ("held-out states", "held-out texts", "probability", "score"):
        assert line in done.stdout
    assert (
        f"wrote {output}: fills slots from a score of {load_sampler_record(output).threshold:g}"
        in done.stderr
    )
    assert "better" in done.stderr
    return output


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, sampler: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("b") / "bundle"
    build_bundle(checkpoint, output, BuildOptions(sampler=sampler))
    return output


def test_right_answers_in_the_data_are_what_is_measured_by(tmp_path: Path) -> None:
    asked = list(itertools.islice(examples(5, "train"), 3))
    lines = [{"prompt": one.prompt, "answer": list(one.answers)} for one in asked]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = [
        *TRAINING,
        "--steps",
        "1",
        "--block-length",
        "32",
        "--held-out",
        "1",
        "--max-new-tokens",
        "96",
    ]
    done = trimode(
        "calibrate",
        "sampler",
        DEMO,
        "--data",
        tmp_path / "data.jsonl",
        "-o",
        tmp_path / "mine",
        *training,
    )
    assert done.exit_code == 0, done.output
    assert "answered right; " in done.stderr
    rows = [
        row for row in load_sampler_record(tmp_path / "mine").held_out if row.sampler == "threshold"
    ]
    assert all(row.exact_match in (0, 1) for row in rows)
    assert max(row.exact_match or 0 for row in rows) == 1


VERIFYING = ["--max-new-tokens", 2, "--long", 70]


def test_a_bundle_is_verified_with_its_sampler(
    bundle: Path, checkpoint: Path, sampler: Path
) -> None:
    done = trimode("verify", bundle, "--against", checkpoint, *VERIFYING, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["sampler"] is None
    assert any("learned sampler was not compared" in note for note in found["notes"])
    done = trimode(
        "verify", bundle, "--against", checkpoint, *VERIFYING, "--sampler", sampler, "--json"
    )
    found = json.loads(done.stdout)
    assert (done.exit_code, found["passed"], found["notes"]) == (0, True, [])
    assert found["sampler"]["num_scores"] > 24 * 3
    assert 0 < found["sampler"]["max_error"] < 1e-5
    shown = trimode("verify", bundle, "--against", checkpoint, *VERIFYING, "--sampler", sampler)
    assert f"learned sampler against {sampler.name}" in shown.stdout


@pytest.mark.parametrize(
    "tensor", ["head.weight", "layers.0.up.weight", "token_table", "feature_mean"]
)
def test_a_wrong_sampler_is_found(
    bundle: Path, checkpoint: Path, sampler: Path, tmp_path: Path, tensor: str
) -> None:
    """The bundle says that it holds another network than its graph is: each kind of tensor shows,
    off by half.
    """
    other, wrong = tmp_path / "other", tmp_path / "bundle"
    shutil.copytree(sampler, other)
    shutil.copytree(bundle, wrong)
    tensors = load_file(other / WEIGHTS)
    name = next(name for name in tensors if name.endswith(tensor))
    tensors[name] = (tensors[name].float() * 1.5 + 0.1).to(tensors[name].dtype)
    save_file(tensors, other / WEIGHTS)
    digest = hashlib.sha256((other / WEIGHTS).read_bytes()).hexdigest()
    record = json.loads((other / RECORD).read_text())
    (other / RECORD).write_text(json.dumps({**record, "sampler_sha256": digest}))
    refused = trimode("verify", bundle, "--against", checkpoint, "--sampler", other)
    assert isinstance(refused.exception, UsageError)
    assert "the sampler that the bundle was built with" in refused.exception.message
    manifest = json.loads((wrong / "manifest.json").read_text())
    manifest["sampler"]["sha256"] = digest
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    done = trimode("verify", wrong, "--against", checkpoint, *VERIFYING, "--sampler", other)
    assert done.exit_code == 1
    assert "FAILED" in done.stdout


def texts(
    model: TriModeModel, scorer: Any, threshold: float, length: int
) -> list[tuple[list[int], int]]:
    """By the decoder itself, whatever gives the scores."""
    out = []
    for prompt in ([20, 30], [40], [50, 51, 52, 53]):
        sequence, counters = model.new_sequence([prompt]), Counters()
        options = DecodeOptions(17, length, threshold, sampler="learned", scorer=scorer)
        out.append(
            (
                [token for kept in decode_diffusion(sequence, options, counters) for token in kept],
                counters.nfe,
            )
        )
    return out


@pytest.mark.parametrize("length", [1, 3, 8, 32])
def test_a_bundle_fills_what_the_trained_network_says(
    bundle: Path, sampler: Path, length: int
) -> None:
    record = load_sampler_record(sampler)
    network = TorchScorer(load_sampler(sampler, record))
    with TriModeModel.from_pretrained(bundle, num_threads=1) as model:
        for threshold in (0.0, 0.4, record.threshold):
            expected = texts(model, network, threshold, length)
            assert texts(model, model.scorer, threshold, length) == expected
        result = model.stream(
            [[20, 30]], "diffusion", sampler="learned", block_length=length, max_new_tokens=17
        ).finish()
        assert (result.token_ids, result.nfe) == expected[0]  # of the record's own threshold
        assert (
            model.generate([[20, 30]], 17, length, sampler="learned")[0][0, 2:].tolist()
            == result.token_ids
        )
        at_once = model.stream(
            [[20, 30]],
            "diffusion",
            sampler="learned",
            threshold=0.0,
            block_length=length,
            max_new_tokens=length,
        ).finish()
        assert at_once.forwards.denoise <= 1 + (100 in at_once.token_ids)


def test_draws_go_with_it(bundle: Path) -> None:
    with TriModeModel.from_pretrained(bundle, num_threads=1) as model:
        one, two = (
            model.stream(
                [[20]], "diffusion", sampler="learned", temperature=1.0, seed=4, max_new_tokens=20
            ).finish()
            for _ in range(2)
        )
    assert one.token_ids == two.token_ids
    assert len(one.token_ids) == 20 or one.finish_reason == "stop"


def test_what_a_bundle_says_of_it(
    bundle: Path, sampler: Path, checkpoint: Path, tmp_path: Path
) -> None:
    record, manifest = load_sampler_record(sampler), read_manifest(bundle)
    assert manifest.sampler is not None
    assert (manifest.sampler.file, manifest.sampler.name, manifest.sampler.sha256) == (
        "sampler.onnx",
        "mine",
        record.sampler_sha256,
    )
    assert (manifest.sampler.threshold, manifest.sampler.block_lengths) == (
        record.threshold,
        (3, 8),
    )
    onnx.checker.check_model(str(bundle / "sampler.onnx"), full_check=True)
    shown = trimode("inspect", bundle)
    size = (bundle / "sampler.onnx").stat().st_size / 1e6
    assert (
        f"sampler    mine, {record.num_parameters / 1e6:.2f} M parameters, {size:.1f} MB, trained "
        f"on blocks of 3, 8" in shown.stdout
    )
    assert (
        json.loads(trimode("inspect", bundle, "--json").stdout)["sampler"]["threshold"]
        == record.threshold
    )
    build_bundle(checkpoint, tmp_path / "plain")
    assert "sampler" not in json.loads((tmp_path / "plain/manifest.json").read_text())
    assert "sampler  " not in trimode("inspect", tmp_path / "plain").stdout
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    (damaged / "sampler.onnx").write_bytes(b"?" * (bundle / "sampler.onnx").stat().st_size)
    with pytest.raises(BundleError, match="sha256"):
        TriModeModel.from_pretrained(damaged)


def test_a_bundle_that_is_there_gets_it(
    bundle: Path, checkpoint: Path, sampler: Path, tmp_path: Path
) -> None:
    place = tmp_path / "later"
    build_bundle(checkpoint, place)
    done = trimode("build", checkpoint, "-o", place, "--sampler", sampler)
    assert done.exit_code == 0, done.output
    assert f"added a sampler to {place}" in done.stderr
    assert (place / "sampler.onnx").read_bytes() == (bundle / "sampler.onnx").read_bytes()
    assert read_manifest(place).model_copy(update={"files": {}}) == read_manifest(
        bundle
    ).model_copy(update={"files": {}})
    assert read_manifest(place).files == read_manifest(bundle).files
    again = trimode("build", checkpoint, "-o", place, "--sampler", sampler, "--json")
    assert "up to date" in again.stderr
    assert json.loads(again.stdout)["sampler"] == "mine"
    # which it serves, too
    build_bundle(checkpoint, place, BuildOptions(precision="int8", calibration="rtn"))
    with TriModeModel.from_pretrained(place, precision="int8", num_threads=1) as model:
        assert (
            model.stream([[20]], "diffusion", sampler="learned", max_new_tokens=9)
            .finish()
            .token_ids
        )


def test_a_sampler_belongs_to_its_checkpoint_whatever_the_adapter(
    checkpoint: Path, sampler: Path, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "it", config_of(**SMALL), rank=2, seed=1)
    with pytest.raises(CheckpointError, match="expected a sampler of this checkpoint"):
        build_bundle(other, tmp_path / "b", BuildOptions(sampler=sampler))
    assert not (tmp_path / "b").exists()
    build_bundle(other, tmp_path / "c")
    before = (tmp_path / "c/manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="expected a sampler of this checkpoint"):
        build_bundle(other, tmp_path / "c", BuildOptions(sampler=sampler))
    assert (tmp_path / "c/manifest.json").read_bytes() == before
    wide = write_checkpoint(tmp_path / "wide", config_of(**SMALL, vocab_size=120))
    with pytest.raises(CheckpointError, match="vocab_size 120, found 109"):
        build_bundle(wide, tmp_path / "d", BuildOptions(sampler=sampler))
    bare = shutil.copytree(
        checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("linear_spec_lora")
    )
    digest = SourceDigest(open_checkpoint(bare))
    list(digest.read_all())
    assert digest.hexdigest() == load_sampler_record(sampler).source_sha256


def test_a_bundle_has_one_sampler(
    checkpoint: Path, sampler: Path, bundle: Path, tmp_path: Path
) -> None:
    second = shutil.copytree(sampler, tmp_path / "second")
    tensors = {name: 2 * tensor for name, tensor in load_file(sampler / WEIGHTS).items()}
    save_file(tensors, second / WEIGHTS)
    record = json.loads((second / RECORD).read_text())
    digest = hashlib.sha256((second / WEIGHTS).read_bytes()).hexdigest()
    (second / RECORD).write_text(json.dumps({**record, "sampler_sha256": digest}))
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="found one with mine"):
        build_bundle(checkpoint, bundle, BuildOptions(sampler=second))
    assert (bundle / "manifest.json").read_bytes() == before


BAD: dict[str, tuple[list[str], str]] = {
    "no data": (
        ["calibrate", "sampler", "CHECKPOINT", "--data", "nowhere.jsonl", "-o", "OUT"],
        "expected a readable UTF-8 file",
    ),
    "block length": (
        [
            "calibrate",
            "sampler",
            "CHECKPOINT",
            "--data",
            "DATA",
            "-o",
            "OUT",
            "--block-length",
            "8,x",
        ],
        "expected whole numbers",
    ),
    "length 99": (
        [
            "calibrate",
            "sampler",
            "CHECKPOINT",
            "--data",
            "DATA",
            "-o",
            "OUT",
            "--block-length",
            "99",
        ],
        "--block-length from 2 to 64",
    ),
    "heads": (
        ["calibrate", "sampler", "CHECKPOINT", "--data", "DATA", "-o", "OUT", "--heads", "5"],
        "twice the heads (10), found 192",
    ),
    "target": (
        ["calibrate", "sampler", "CHECKPOINT", "--data", "DATA", "-o", "OUT", "--target", "best"],
        "a --target among serial, leftmost, ar",
    ),
    "nothing to resume": (
        ["calibrate", "sampler", "CHECKPOINT", "--data", "DATA", "-o", "OUT", "--resume"],
        "found none",
    ),
    "output of something else": (
        ["calibrate", "sampler", "CHECKPOINT", "--data", "DATA", "-o", "CHECKPOINT"],
        "something else",
    ),
    "no sampler": (
        ["build", "CHECKPOINT", "-o", "OUT", "--sampler", "CHECKPOINT"],
        "expected a sampler with sampler.json",
    ),
    "not in the bundle": (
        ["run", "PLAIN", "--token-ids", "20", "--mode", "diffusion", "--sampler", "learned"],
        "trimode calibrate sampler",
    ),
    "another mode": (
        ["run", "BUNDLE", "--token-ids", "20", "--sampler", "learned"],
        "in mode diffusion, found mode linear-spec",
    ),
    "unknown": (
        ["run", "BUNDLE", "--token-ids", "20", "--mode", "diffusion", "--sampler", "best"],
        "a sampler among threshold",
    ),
    "steps": (
        ["run", "BUNDLE", "--token-ids", "20", "--mode", "diffusion", "--steps", "3"],
        "steps together with the sampler schedule",
    ),
    "threshold": (
        [
            "run",
            "BUNDLE",
            "--token-ids",
            "20",
            "--mode",
            "diffusion",
            "--sampler",
            "leftmost",
            "--threshold",
            "0.5",
        ],
        "no threshold with",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    checkpoint: Path,
    data: Path,
    bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    case: str,
) -> None:
    args, message = BAD[case]
    plain = tmp_path_factory.getbasetemp() / "plain_bundle"
    if not plain.exists():
        build_bundle(checkpoint, plain)
    places = {
        "CHECKPOINT": checkpoint,
        "DATA": data,
        "OUT": tmp_path / "out",
        "BUNDLE": bundle,
        "PLAIN": plain,
    }
    done = trimode(*(places.get(a, a) for a in args))
    error = done.exception
    assert isinstance(error, (UsageError, CheckpointError)), done.output
    assert message in str(error)
    assert error.hint
    assert not any(tmp_path.iterdir())
    assert done.stdout == ""


def test_the_command_line_takes_every_sampler(bundle: Path) -> None:
    for name, options in (
        ("threshold", []),
        ("schedule", ["--steps", "2"]),
        ("margin", ["--threshold", "0.3"]),
        ("leftmost", []),
        ("learned", []),
    ):
        args = [
            "--mode",
            "diffusion",
            "--sampler",
            name,
            *options,
            "--max-new-tokens",
            "16",
            "--block-length",
            "8",
            "--threads",
            "1",
            "--json",
        ]
        done = trimode("run", bundle, "--token-ids", "20,30", *args)
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout)
        assert len(record["token_ids"]) == 16 or record["finish_reason"] == "stop"
        if name == "schedule":
            assert record["nfe"] <= 2 * (2 + 1)


def test_the_speed_of_light_has_a_row_for_it(bundle: Path) -> None:
    with TriModeModel.from_pretrained(bundle, num_threads=1) as model:
        ways = {
            way.name: way
            for way in measure_light(
                model,
                [[20, 30], [40]],
                LightSettings(4, (0.9,), 8, max_forwards=50),
                lambda _: None,
            )
        }
        record = model.bundle.manifest.sampler
        assert record is not None
        results = [
            model.stream(
                [ids], "diffusion", sampler="learned", block_length=4, max_new_tokens=8
            ).finish()
            for ids in ([20, 30], [40])
        ]
    way = ways[f"diffusion, learned sampler from {record.threshold:g}"]
    assert (way.target, way.nfe, way.num_tokens) == (
        "serial denoising",
        sum(r.nfe for r in results),
        sum(len(r.token_ids) for r in results),
    )

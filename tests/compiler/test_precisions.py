"""Several precisions in one bundle: each computes as it does alone, and nothing lies there
twice.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import config_of, write_checkpoint
from commands import trimode

from trimode.cli.inspect import describe, sharing
from trimode.compiler import pipeline
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import BuildResult, build_bundle
from trimode.errors import BuildError, BundleError, CheckpointError, UsageError
from trimode.formats.calibration import Calibration, QuantizedPrecision, save_calibration
from trimode.formats.contract import GRAPH_NAMES
from trimode.formats.safetensors import PackEntry
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.identity import SourceDigest
from trimode.runtime import TriModeModel
from trimode.runtime.bundle.open import open_bundle
from trimode.runtime.bundle.weights import PrecisionWeights, WeightPack
from trimode.runtime.sessions.ort.session import OrtSession

CONFIG = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = np.arange(12)[None] * 7 % 109
DENSE_LAYER = "encoder.layers.0.mlp.down_proj"
"""Left in high precision by the calibrations here."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("c") / "it", config_of(**CONFIG), rank=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def calibration_for(
    checkpoint: Path, folder: Path, precision: QuantizedPrecision, **changes: Any
) -> Path:
    """A scale for each row and input of every layer but one, and no head."""
    opened, rng, scales = open_checkpoint(checkpoint), np.random.default_rng(len(precision)), {}
    for name, entry in opened.tensors.items():
        layer = name.removesuffix(".weight")
        if (
            len(entry.shape) != 2
            or "lora" in name
            or "embed" in name
            or layer in (DENSE_LAYER, "diffusion_head")
        ):
            continue
        weight = np.frombuffer(b"".join(entry.chunks()), np.float32).reshape(entry.shape)
        scales[f"{layer}.weight_amax"] = np.abs(weight).max(1)
        scales[f"{layer}.input_amax"] = np.array(rng.uniform(2, 5), np.float32)
    digest = SourceDigest(opened)
    list(digest.read_all())
    record = Calibration(
        schema_version=1,
        trimode_version="0",
        precision=precision,
        algorithm="by hand",
        block_size=None,
        source_name="it",
        source_sha256=digest.base_hexdigest(),
        scales_sha256="",
        data=None,
        layers={},
        libraries={},
    )
    save_calibration(folder, record.model_copy(update=changes), scales)
    return folder


def options_for(precision: str, checkpoint: Path, folder: Path, **changes: Any) -> BuildOptions:
    calibration: Any = {"int4": "rtn"}.get(precision)
    if precision in ("fp8", "int8"):
        calibration = calibration_for(checkpoint, folder / f"cal-{precision}", precision)  # type: ignore[arg-type]
    return BuildOptions(**{"precision": precision, "calibration": calibration, **changes})


def outputs(
    bundle: Path, precision: str | None = None, target: str | None = None
) -> list[np.ndarray]:
    """Each graph over a cache that has something in it, bit for bit."""
    opened = open_bundle(bundle, precision)
    session = OrtSession(opened, opened.chosen.targets[target] if target else None, 1)
    cache = session.new_cache()
    session.run("ar", cache, IDS, 0)
    return [
        np.array(x)
        for graph_name in GRAPH_NAMES
        for x in session.run(graph_name, cache, IDS[:, ::-1] + 1, 5, 1.0)
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("order", [("int8", "fp32", "fp8"), ("fp32", "int4", "int8")])
def test_each_precision_computes_as_alone(
    checkpoint: Path, tmp_path: Path, cache: Path, order: tuple[str, ...]
) -> None:
    """The same bits from a bundle of several precisions as from one of each, in whatever order they
    were built.

    The orders matter: a weight that is quantized in the first pack lies in full in a later one, and
    a layer that one calibration leaves out has scales in the pack of another.
    """
    together = tmp_path / "together"
    for precision in order:
        options = options_for(precision, checkpoint, tmp_path, cache=cache)
        before = files_of(together) if together.exists() else {}
        result = build_bundle(checkpoint, together, options)
        assert (result.precision, result.built) == (precision, ("cpu",))
        after = files_of(together)
        # added to, never touched
        assert {
            name: data for name, data in before.items() if name != "manifest.json"
        }.items() <= after.items()
        build_bundle(checkpoint, tmp_path / precision, options)
    assert list(result.manifest.precisions) == list(order)
    assert set(files_of(together)) == {*result.manifest.files, "manifest.json"}
    for precision in order:
        for target in (None, "cpu"):
            for found, expected in zip(
                outputs(together, precision, target),
                outputs(tmp_path / precision, None, target),
                strict=True,
            ):
                np.testing.assert_array_equal(found, expected)
        for graph_name in GRAPH_NAMES:
            onnx.checker.check_model(
                str(together / result.manifest.precisions[precision].graphs[graph_name])
            )  # type: ignore[index]
    assert outputs(together)[1].tobytes() == outputs(together, order[0])[1].tobytes()


def test_an_added_precision_has_the_graphs_of_the_bundle(
    checkpoint: Path, tmp_path: Path, cache: Path
) -> None:
    """Quadratic self-speculation in all precisions or in none."""
    first = build_bundle(
        checkpoint, tmp_path / "b", BuildOptions(precision="fp32", quadratic=True, cache=cache)
    ).manifest
    assert list(first.contracts) == [*GRAPH_NAMES, "quadratic"]
    for changes in ({}, {"quadratic": True}):
        shutil.copytree(tmp_path / "b", tmp_path / str(len(changes)))
        added = build_bundle(
            checkpoint,
            tmp_path / str(len(changes)),
            options_for("int4", checkpoint, tmp_path, cache=cache, **changes),
        )
        assert added.record.graphs["quadratic"] == "quadratic-int4.onnx"
        assert (
            list(added.record.targets["cpu"].graphs)
            == list(added.record.graphs)
            == list(first.contracts)
        )
    for precision in ("fp32", "int4"):
        model = TriModeModel.from_pretrained(tmp_path / "0", precision=precision, num_threads=1)
        assert (
            model.self_spec_generate(IDS, 12, 4)[0].tolist()
            == model.ar_generate(IDS, 12)[0].tolist()
        )
    build_bundle(checkpoint, tmp_path / "without", BuildOptions(precision="fp32", cache=cache))
    with pytest.raises(UsageError, match="found one without") as refusal:
        build_bundle(
            checkpoint,
            tmp_path / "without",
            options_for("int4", checkpoint, tmp_path, cache=cache, quadratic=True),
        )
    assert "`force`" in refusal.value.hint


def test_nothing_is_held_twice(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    for precision in ("int8", "fp32", "fp8"):
        manifest = build_bundle(
            checkpoint, tmp_path / "b", options_for(precision, checkpoint, tmp_path, cache=cache)
        ).manifest
    packs = {
        p: WeightPack(tmp_path / "b" / p).entries
        for p in ("weights.safetensors", "weights-fp32.safetensors", "weights-fp8.safetensors")
    }
    first, dense, fp8 = packs.values()
    linear = {n for n, e in first.items() if e.dtype == "int8"}
    assert DENSE_LAYER + ".weight" not in linear
    assert len(linear) == 6
    assert set(dense) == linear
    assert set(fp8) == {f"{n}{end}" for n in linear for end in ("", "_scale")} | {
        n.removesuffix("weight") + "input_scale" for n in linear
    }
    assert manifest.precisions["fp8"].packs == ("weights-fp8.safetensors", "weights.safetensors")
    sizes = {p: sum(entry.num_bytes for entry in entries.values()) for p, entries in packs.items()}
    dense_bytes = sum(
        entry.num_bytes
        for name, entry in first.items()
        if name in open_checkpoint(checkpoint).tensors and entry.dtype == "float32"
    )
    tables = sum(entry.num_bytes for name, entry in first.items() if name.startswith("rope."))
    assert manifest.precisions["int8"].weight_bytes == sizes["weights.safetensors"]
    assert (
        manifest.precisions["fp32"].weight_bytes
        == sizes["weights-fp32.safetensors"] + dense_bytes + tables
    )
    facts = sharing(manifest)
    assert facts["graphs"] == 9
    assert facts["pack_bytes"] == sum((tmp_path / "b" / p).stat().st_size for p in packs)
    lines = describe(manifest)
    assert any(
        line.startswith("int8 ") and "by hand" in line and "runs where none is asked for" in line
        for line in lines
    )
    assert any(
        line.startswith("fp32 ") and "all in float32" in line and "runs where" not in line
        for line in lines
    )
    assert any(
        "in weights-fp8.safetensors (" in line and "weights.safetensors (" in line for line in lines
    )
    assert any("3 packs of " in line for line in lines)


def test_a_layer_in_full_comes_from_whichever_pack_has_it(
    checkpoint: Path, tmp_path: Path, cache: Path
) -> None:
    """int4 quantizes the layer that int8 leaves out: its dense weight is in the second pack, the
    others' in none.
    """
    for precision in ("int4", "int8", "fp8", "fp32"):
        options = options_for(precision, checkpoint, tmp_path, cache=cache)
        manifest = build_bundle(checkpoint, tmp_path / "b", options).manifest
        build_bundle(checkpoint, tmp_path / precision, options)
    name = f"{DENSE_LAYER}.weight"
    assert WeightPack(tmp_path / "b" / "weights-int8.safetensors").entries[name].dtype == "float32"
    assert name not in WeightPack(tmp_path / "b" / "weights-fp8.safetensors").entries
    assert name not in WeightPack(tmp_path / "b" / "weights-fp32.safetensors").entries
    assert set(manifest.precisions["fp8"].packs) == {
        "weights-fp8.safetensors",
        "weights.safetensors",
        "weights-int8.safetensors",
    }
    for precision in manifest.precisions:
        for found, expected in zip(
            outputs(tmp_path / "b", precision), outputs(tmp_path / precision), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


def test_targets_are_added_to_the_precision_that_is_named(
    checkpoint: Path, tmp_path: Path, cache: Path
) -> None:
    options: dict[str, Any] = {"block_lengths": (8,), "cache": cache}
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(("sm86",), precision="bf16", **options))
    added = build_bundle(
        checkpoint,
        tmp_path / "b",
        BuildOptions(("sm86", "cpu"), precision="int4", calibration="rtn", **options),
    )
    assert list(added.record.targets) == ["sm86", "cpu"]
    assert added.record.targets["sm86"].graphs["ar"].file == "engines/sm86-int4/joint.engine"
    # no precision: the first
    plain = build_bundle(checkpoint, tmp_path / "b", BuildOptions(("cpu",), **options))
    assert (plain.precision, list(plain.record.targets)) == ("bf16", ["sm86", "cpu"])
    assert (
        build_bundle(
            checkpoint, tmp_path / "b", BuildOptions(("sm86",), precision="int4", **options)
        ).built
        == ()
    )
    # replaces one target
    other = build_bundle(
        checkpoint,
        tmp_path / "b",
        BuildOptions(("sm86",), precision="int4", weights="baked", **options),
    )
    assert (other.built, list(other.record.targets)) == (("sm86",), ["cpu", "sm86"])
    assert set(files_of(tmp_path / "b")) == {*other.manifest.files, "manifest.json"}
    open_bundle(tmp_path / "b", "int4")
    # Engines do not depend on what else is in the bundle, but that those which copy the weights
    # know from where.
    for weights, num_cached in (("shared", 1), ("baked", 0)):
        alone = BuildOptions(
            ("sm86",), precision="int4", calibration="rtn", weights=weights, **options
        )  # type: ignore[arg-type]
        assert build_bundle(checkpoint, tmp_path / weights, alone).num_cached == num_cached
    baked = [
        (tmp_path / folder / "ar.engine").stat().st_size
        for folder in ("b/engines/sm86-int4", "baked/engines/sm86")
    ]
    assert baked[0] == pytest.approx(baked[1], rel=0.01)


def test_what_cannot_be_added(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(precision="fp32", cache=cache))
    before = files_of(tmp_path / "b")
    build_bundle(
        checkpoint, tmp_path / "int8", options_for("int8", checkpoint, tmp_path, cache=cache)
    )
    foreign = calibration_for(checkpoint, tmp_path / "foreign", "fp8", source_sha256="0" * 64)
    cases: list[tuple[str, BuildOptions, type[Exception], str]] = [
        (
            "b",
            BuildOptions(precision="bf16"),
            UsageError,
            "expected a precision that computes in float32, as all of the bundle do, found bf16",
        ),
        (
            "b",
            BuildOptions(("sm89",), precision="int4", calibration="rtn"),
            UsageError,
            "sm89: expected a bundle that computes in a type it can run",
        ),
        (
            "b",
            BuildOptions(precision="int4"),
            UsageError,
            "int4: expected `calibration`, found none",
        ),
        (
            "b",
            BuildOptions(calibration=foreign),
            CheckpointError,
            "expected a calibration of this checkpoint",
        ),
        (
            "b",
            BuildOptions(precision="int4", calibration="rtn", max_length=100),
            UsageError,
            "max_length 100, found 1024",
        ),
        (
            "int8",
            BuildOptions(precision="int8", calibration="rtn"),
            UsageError,
            "expected a bundle with the scales of rtn",
        ),
    ]
    for folder, options, kind, message in cases:
        with pytest.raises(kind, match=message) as refusal:
            build_bundle(checkpoint, tmp_path / folder, options)
        assert refusal.value.hint  # type: ignore[attr-defined]
    assert files_of(tmp_path / "b") == before


def test_interrupted_while_adding(
    checkpoint: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(precision="fp32", cache=cache))
    before = files_of(tmp_path / "b")
    options = options_for("int4", checkpoint, tmp_path, cache=cache)
    for stage in ("trace_graphs", "describe_additions"):

        def interrupt(_state: Any) -> None:
            raise KeyboardInterrupt

        stages = tuple(interrupt if s.__name__ == stage else s for s in pipeline.ADDED_PRECISION)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "ADDED_PRECISION", stages)
            with pytest.raises(KeyboardInterrupt):
                build_bundle(checkpoint, tmp_path / "b", options)
        assert files_of(tmp_path / "b") == before


def test_killed_between_the_files_and_the_manifest(
    checkpoint: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is the old one, and the same command finishes the work."""
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(precision="fp32", cache=cache))
    expected = outputs(tmp_path / "b")
    options = options_for("int4", checkpoint, tmp_path, cache=cache)

    def killed(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("trimode.compiler.store.staging._replace_manifest", killed)
        with pytest.raises(SystemExit):
            build_bundle(checkpoint, tmp_path / "b", options)
    assert (tmp_path / "b" / "weights-int4.safetensors").is_file()
    (tmp_path / "b" / "weights-int4.safetensors").write_bytes(b"half")
    assert list(open_bundle(tmp_path / "b").manifest.precisions) == ["fp32"]
    assert outputs(tmp_path / "b")[1].tobytes() == expected[1].tobytes()
    result = build_bundle(checkpoint, tmp_path / "b", options)
    open_bundle(tmp_path / "b", "int4")
    assert set(files_of(tmp_path / "b")) == {*result.manifest.files, "manifest.json"}


def test_another_build_meanwhile(
    checkpoint: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A precision that another build adds between reading and locking is not lost."""
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(precision="fp32", cache=cache))
    compare = pipeline.check_same

    def slow(*arguments: Any) -> None:
        monkeypatch.setattr(pipeline, "check_same", compare)
        build_bundle(
            checkpoint, tmp_path / "b", options_for("int4", checkpoint, tmp_path, cache=cache)
        )
        compare(*arguments)

    monkeypatch.setattr(pipeline, "check_same", slow)
    options = options_for("int8", checkpoint, tmp_path, cache=cache)
    with pytest.raises(BuildError, match="another build has changed it"):
        build_bundle(checkpoint, tmp_path / "b", options)
    assert list(build_bundle(checkpoint, tmp_path / "b", options).manifest.precisions) == [
        "fp32",
        "int4",
        "int8",
    ]


@pytest.fixture(scope="module")
def two(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> tuple[Path, BuildResult]:
    folder = tmp_path_factory.mktemp("two") / "b"
    build_bundle(checkpoint, folder, BuildOptions(precision="int4", calibration="rtn", cache=cache))
    return folder, build_bundle(checkpoint, folder, BuildOptions(precision="fp32", cache=cache))


def test_running_a_precision(two: tuple[Path, BuildResult]) -> None:
    folder, _ = two
    first, named, dense = (
        TriModeModel.from_pretrained(folder, precision=p, num_threads=1)
        for p in (None, "int4", "fp32")
    )
    assert [model.bundle.precision for model in (first, named, dense)] == ["int4", "int4", "fp32"]
    assert (
        first.ar_generate([[20, 30]], 8)[0].tolist() == named.ar_generate([[20, 30]], 8)[0].tolist()
    )
    logits = [m.session.run("verify", m.session.new_cache(), IDS, 0)[2] for m in (named, dense)]
    assert np.abs(np.asarray(logits[0]) - np.asarray(logits[1])).max() > 1e-3
    with pytest.raises(
        UsageError, match=r"expected a precision of the bundle \(int4, fp32\), found 'fp8'"
    ):
        TriModeModel.from_pretrained(folder, precision="fp8")


def test_a_target_of_another_precision(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(("cuda",), precision="bf16", cache=cache))
    build_bundle(
        checkpoint,
        tmp_path / "b",
        BuildOptions(("cpu",), precision="int4", calibration="rtn", cache=cache),
    )
    with pytest.raises(
        UsageError, match=r"in bf16 \(cuda, portable\) or auto, found 'cpu'"
    ) as refusal:
        TriModeModel.from_pretrained(tmp_path / "b", target="cpu")
    assert "it is there in int4" in refusal.value.hint
    with TriModeModel.from_pretrained(
        tmp_path / "b", precision="int4", target="cpu", num_threads=1
    ) as model:
        assert model.target == "cpu"


def test_only_what_a_precision_reads_is_hashed(
    two: tuple[Path, BuildResult], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(two[0], tmp_path / "b"))
    pack = copy / "weights-fp32.safetensors"
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    open_bundle(copy)
    with pytest.raises(BundleError, match="weights-fp32"):
        open_bundle(copy, "fp32")
    pack.write_bytes(data[:-1])
    with pytest.raises(BundleError, match="bytes"):
        open_bundle(copy)


def test_command_line(two: tuple[Path, BuildResult]) -> None:

    command = (
        "run",
        two[0],
        "--token-ids",
        "20,21,22",
        "--max-new-tokens",
        24,
        "--mode",
        "ar",
        "--json",
    )
    answers = {
        p: json.loads(trimode(*command, *(("--precision", p) if p else ())).stdout)["token_ids"]
        for p in (None, "int4", "fp32")
    }
    assert answers[None] == answers["int4"]
    refused = trimode(*command, "--precision", "int8")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "(int4, fp32), found 'int8'" in refused.stderr
    shown = json.loads(trimode("inspect", two[0], "--json").stdout)
    assert list(shown["precisions"]) == ["int4", "fp32"]
    assert shown["precisions"]["fp32"]["calibration"] is None


def test_the_weights_of_a_precision() -> None:
    class Pack:
        def __init__(self, path: str, **entries: str) -> None:
            self.path = path
            self.entries = {
                name.replace("__", "."): PackEntry(dtype, (2,), 0)
                for name, dtype in entries.items()
            }  # type: ignore[arg-type]

    packs = {
        "own": Pack("own", a__weight="int8", a__weight_scale="float32"),
        "first": Pack(
            "first",
            a__weight="float32",
            b__weight="int4",
            b__weight_scale="float32",
            a__input_scale="float32",
            norm__weight="float32",
        ),
        "second": Pack(
            "second", b__weight="float32", norm__weight="float32", a__pre_quant_scale="float32"
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimode.runtime.bundle.weights.WeightPack", packs.__getitem__)
        weights = PrecisionWeights(["own", "first", "second"])  # type: ignore[list-item]
    found = {
        name: (weights.pack_of(name).path, entry.dtype) for name, entry in weights.entries.items()
    }
    assert found == {
        "a.weight": ("own", "int8"),
        "a.weight_scale": ("own", "float32"),
        "norm.weight": ("first", "float32"),
        "b.weight": ("second", "float32"),
    }

"""Engines, compiled for real by TensorRT-RTX, without a GPU; its refusals; and what happens when
compiling is cut short.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import config_of, write_checkpoint
from once import TracedOnce

import trimode.compiler.passes
from trimode.cli.inspect import describe, sharing
from trimode.compiler import pipeline, plan
from trimode.compiler.options import BuildOptions
from trimode.compiler.passes import recipes
from trimode.compiler.passes.choose_before_widening import ChooseBeforeWidening
from trimode.compiler.pipeline import build_bundle
from trimode.compiler.stages import engines
from trimode.compiler.store import fingerprint
from trimode.compiler.store.cache import ContentCache
from trimode.compiler.targets import find_target
from trimode.compiler.tensorrt import pool
from trimode.compiler.tensorrt.builder import PhaseTree
from trimode.errors import BuildError, DependencyError, UsageError
from trimode.formats.contract import GRAPH_NAMES
from trimode.graphs.checkpoint import describe_model, open_checkpoint
from trimode.runtime.bundle.open import open_bundle

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"
ARCHITECTURES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("c") / "small", config_of(num_hidden_layers=1), rank=2
    )


@pytest.fixture
def kept(run_cache: ContentCache) -> Path:
    """Where the run keeps engines, for tests of something else than compiling them."""
    return run_cache.folder


@pytest.fixture
def graphs_at_hand(checkpoint: Path, tmp_path: Path, traced_once: TracedOnce) -> None:
    """The cache of a test's own commands has the graphs already: they begin to compile at once."""
    opened = open_checkpoint(checkpoint)
    traced_once.fill(ContentCache(tmp_path / "cache"), opened, describe_model(opened), GRAPH_NAMES)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_the_demo_compiles_for_every_architecture(tmp_path: Path) -> None:
    result = build_bundle(DEMO, tmp_path / "bundle", BuildOptions(targets=(*ARCHITECTURES, "cpu")))
    bundle = open_bundle(tmp_path / "bundle")  # every file has the digest the manifest says
    manifest = bundle.manifest
    assert manifest == result.manifest
    assert manifest.first_precision == "fp16"  # sm75 cannot do bf16
    version = importlib.metadata.version("tensorrt-rtx")
    for name in ARCHITECTURES:
        record = bundle.chosen.targets[name]
        assert record.library == f"tensorrt_rtx {version}"
        assert record.compute_capability == f"{name[2:-1]}.{name[-1]}"
        for graph_name in GRAPH_NAMES:
            engine = record.graphs[graph_name]
            assert manifest.files[engine.file].num_bytes > 1_000_000
            assert [p.rows for p in engine.profiles] == (
                [(1, 1, 1), (1, 512, 512)]
                if graph_name == "ar"
                else [(n, n, n) for n in (8, 16, 32)]
            )
    blobs = [
        (tmp_path / "bundle" / bundle.chosen.targets[name].graphs["ar"].file).read_bytes()
        for name in ARCHITECTURES
    ]
    assert len(set(blobs)) == len(blobs)  # one for each architecture
    facts = sharing(manifest)
    assert facts["graphs"] == 21
    assert facts["bytes_saved"] == 21 * bundle.chosen.weight_bytes - facts["pack_bytes"]
    assert 0 <= facts["pack_bytes"] - bundle.chosen.weight_bytes < 20_000  # the header
    assert any(
        f"one pack of {facts['pack_bytes'] / 1e6:.1f} MB serves 21 compiled graphs" in line
        for line in describe(manifest)
    )


def test_shared_engines_hold_no_weights_and_baked_ones_do(tmp_path: Path) -> None:
    """A value that occurs in the weights alone is looked for in the engines' bytes."""
    wide = write_checkpoint(
        tmp_path / "wide", config_of(num_hidden_layers=1, hidden_size=128, intermediate_size=512)
    )
    for placement in ("shared", "baked"):
        options = BuildOptions(targets=("sm89",), weights=placement, block_lengths=(8,))  # type: ignore[arg-type]
        result = build_bundle(wide, tmp_path / placement, options)
        assert result.record.targets["sm89"].placement == placement
    name = "encoder.layers.0.mlp.gate_proj.weight"
    from trimode.runtime.bundle.weights import WeightPack

    rows = WeightPack(tmp_path / "shared" / "weights.safetensors").raw(name).reshape(512, 256)
    engine = {
        p: (tmp_path / p / "engines" / "sm89" / "verify.engine").read_bytes()
        for p in ("shared", "baked")
    }
    assert rows[3].tobytes()[:64] not in engine["shared"]
    # at least the three matrices of the MLP
    assert len(engine["baked"]) - len(engine["shared"]) > 0.8 * 2 * 3 * 512 * 128


def test_adding_a_target_adds_only_its_engines(
    checkpoint: Path, tmp_path: Path, kept: Path
) -> None:
    build_bundle(
        checkpoint,
        tmp_path / "bundle",
        BuildOptions(targets=("cpu", "sm86"), block_lengths=(8,), cache=kept),
    )
    before = files_of(tmp_path / "bundle")
    result = build_bundle(
        checkpoint,
        tmp_path / "bundle",
        BuildOptions(targets=("sm89", "sm86"), block_lengths=(8,), cache=kept),
    )
    assert result.built == ("sm89",)
    after = files_of(tmp_path / "bundle")
    assert {
        name: data for name, data in after.items() if name in before and name != "manifest.json"
    } == {name: data for name, data in before.items() if name != "manifest.json"}
    assert sorted(set(after) - set(before)) == [
        f"engines/sm89/{graph_name}.engine" for graph_name in GRAPH_NAMES
    ]
    assert list(open_bundle(tmp_path / "bundle").chosen.targets) == ["cpu", "sm86", "sm89"]


def test_a_second_identical_build_does_nothing(
    checkpoint: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(targets=("sm89",), block_lengths=(8,), cache=kept)
    build_bundle(checkpoint, tmp_path / "bundle", options)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "bundle").rglob("*")}
    monkeypatch.setattr("trimode.compiler.stages.trace.traced_graph", None)  # nothing may be traced
    assert build_bundle(checkpoint, tmp_path / "bundle", options).built == ()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "bundle").rglob("*")} == before


def test_other_settings_replace_the_target(checkpoint: Path, tmp_path: Path, kept: Path) -> None:
    build_bundle(
        checkpoint,
        tmp_path / "bundle",
        BuildOptions(targets=("sm89", "sm86"), block_lengths=(8,), cache=kept),
    )
    result = build_bundle(
        checkpoint,
        tmp_path / "bundle",
        BuildOptions(targets=("sm89",), block_lengths=(4, 8), max_batch=3),
    )
    assert result.built == ("sm89",)
    targets = open_bundle(tmp_path / "bundle").chosen.targets
    assert [p.rows[0] for p in targets["sm89"].graphs["verify"].profiles] == [4, 8]
    assert targets["sm89"].graphs["ar"].profiles[0].batch == (1, 1, 3)
    assert [p.rows[0] for p in targets["sm86"].graphs["verify"].profiles] == [8]


@pytest.mark.parametrize("has_revision", [True, False])
def test_engines_of_an_older_revision_are_built_again(
    checkpoint: Path,
    tmp_path: Path,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    has_revision: bool,
) -> None:
    bundle, options = (
        tmp_path / "bundle",
        BuildOptions(targets=("sm89",), block_lengths=(8,), cache=kept),
    )
    with monkeypatch.context() as older_code:  # its attention repeats keys and values
        older_code.setattr(recipes, "QueriesToOutputs", ChooseBeforeWidening)
        older_code.setattr(plan, "lowering_revision", lambda: "0" * 64)
        build_bundle(checkpoint, bundle, replace(options, targets=("sm89", "sm86", "cpu")))
    if not has_revision:
        text = (bundle / "manifest.json").read_text()
        older = re.sub(r',\s*"revision": "0{64}"', "", text)
        assert "0" * 64 not in older
        (bundle / "manifest.json").write_text(older)
    before = files_of(bundle)
    assert build_bundle(checkpoint, bundle, options).built == ("sm89",)
    after = files_of(bundle)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        "manifest.json",
        *(f"engines/sm89/{graph_name}.engine" for graph_name in GRAPH_NAMES),
    }
    targets = open_bundle(bundle).chosen.targets
    assert targets["sm89"].revision == fingerprint.lowering_revision()
    assert targets["sm86"].revision == ("0" * 64 if has_revision else None)
    assert build_bundle(checkpoint, bundle, options).built == ()
    build_bundle(checkpoint, tmp_path / "fresh", options)
    for graph_name in GRAPH_NAMES:
        name = f"engines/sm89/{graph_name}.engine"
        assert after[name] == (tmp_path / "fresh" / name).read_bytes()


@pytest.mark.parametrize("module", ["passes/recipes.py", "passes/new.py"])
def test_the_revision_sees_every_change_of_the_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    before = fingerprint.lowering_revision()
    code = shutil.copytree(
        next(iter(trimode.compiler.passes.__path__)),
        tmp_path / "passes",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    monkeypatch.setattr(trimode.compiler.passes, "__path__", [str(code)])
    digest = fingerprint.lowering_revision.__wrapped__
    assert digest() == before
    with (tmp_path / module).open("a") as stream:
        stream.write("# changed\n")
    assert digest() != before


def test_another_builder_takes_no_engine_of_the_cache(
    checkpoint: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(targets=("sm89",), block_lengths=(8,), cache=kept)
    build_bundle(checkpoint, tmp_path / "one", options)
    assert build_bundle(checkpoint, tmp_path / "two", options).num_cached == 3
    monkeypatch.setattr(engines, "builder_revision", lambda: "other")
    assert build_bundle(checkpoint, tmp_path / "three", options).num_cached == 0


def test_graphs_of_a_cpu_of_an_older_revision_are_made_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    build_bundle(checkpoint, bundle, BuildOptions())
    before = (bundle / "manifest.json").read_text()
    assert before.count(fingerprint.lowering_revision()) == 1
    (bundle / "manifest.json").write_text(before.replace(fingerprint.lowering_revision(), "0" * 64))
    assert build_bundle(checkpoint, bundle, BuildOptions()).built == ("cpu",)
    assert open_bundle(bundle).chosen.targets["cpu"].revision == fingerprint.lowering_revision()
    assert build_bundle(checkpoint, bundle, BuildOptions()).built == ()


def test_a_bundle_takes_no_other_weights_precision_or_lengths(
    checkpoint: Path, tmp_path: Path, kept: Path
) -> None:
    build_bundle(
        checkpoint,
        tmp_path / "bundle",
        BuildOptions(targets=("sm89",), block_lengths=(8,), cache=kept),
    )
    other = write_checkpoint(tmp_path / "other", config_of(num_hidden_layers=1), rank=2, seed=1)
    for source, options, message in (
        (other, BuildOptions(targets=("sm86",)), "other weights"),
        (
            checkpoint,
            BuildOptions(targets=("sm86",), precision="fp16"),
            "computes in bfloat16, as all of the bundle do, found fp16",
        ),
        (checkpoint, BuildOptions(targets=("sm86",), max_length=100), "max_length 100, found 1024"),
        (checkpoint, BuildOptions(targets=("t4",)), r"t4 \(7.5\)"),
    ):
        with pytest.raises(UsageError, match=message):
            build_bundle(source, tmp_path / "bundle", options)
    # another folder and another time, the same bytes
    copy = write_checkpoint(tmp_path / "copy", config_of(num_hidden_layers=1), rank=2)
    assert (
        build_bundle(
            copy,
            tmp_path / "bundle",
            BuildOptions(targets=("sm89",), block_lengths=(8,), cache=kept),
        ).built
        == ()
    )


def test_the_cache_serves_other_bundles_and_other_weights(checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(targets=("sm89", "sm120"), block_lengths=(8,), cache=tmp_path / "cache")
    assert build_bundle(checkpoint, tmp_path / "one", options).num_cached == 0
    assert build_bundle(checkpoint, tmp_path / "two", options).num_cached == 6
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    tuned = write_checkpoint(tmp_path / "tuned", config_of(num_hidden_layers=1), rank=2, seed=1)
    # engines do not depend on the weights
    assert build_bundle(tuned, tmp_path / "three", options).num_cached == 6
    assert (
        build_bundle(checkpoint, tmp_path / "four", replace(options, workspace_mib=64)).num_cached
        == 0
    )
    baked = replace(options, weights="baked", targets=("sm89",))
    assert build_bundle(checkpoint, tmp_path / "five", baked).num_cached == 0
    assert build_bundle(tuned, tmp_path / "six", baked).num_cached == 0  # baked ones do


def test_refusals_of_the_builder_are_explained(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BuildError, match=r"sm86/.*: expected enough workspace .*, found 1 MiB"):
        build_bundle(
            DEMO,
            tmp_path / "bundle",
            BuildOptions(targets=("sm86",), block_lengths=(8,), workspace_mib=1),
        )
    # What the check of precisions would refuse beforehand, the compiler itself refuses too.
    monkeypatch.setattr("trimode.compiler.targets._check_precision", lambda *_: None)
    with pytest.raises(
        BuildError, match=r"t4 \(7.5\): expected types the GPU can compute in, found b16 \(bf16\)"
    ) as refusal:
        build_bundle(
            checkpoint, tmp_path / "bundle", BuildOptions(targets=("t4",), precision="bf16")
        )
    assert refusal.value.hint == "pass `precision` fp16"
    assert list(tmp_path.iterdir()) == []


def test_fp8_below_compute_capability_8_9_is_explained() -> None:
    """The message is the builder's own, from a graph with fp8 weights compiled for SM86."""
    message = (
        "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] "
        "Cannot compile for target(s) sm86, because the model "
        "contains HW-specific datatypes: fp8_e4m3. In compileGraph at "
        "/_src/optimizer/myelin/codeGenerator.cpp:2012)"
    )
    task = pool.EngineTask(find_target("a10"), "fp8", "", None)  # type: ignore[arg-type]
    assert "a10 (8.6): expected types the GPU can compute in, found fp8_e4m3 (fp8)" in str(
        pool.explain_refusal(task, [message])
    )


@pytest.mark.parametrize("target", ["h100", "gb200", "sm103"])
def test_full_tensorrt_needs_its_gpu(checkpoint: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises((DependencyError, BuildError), match=r"tensorrt|that architecture"):
        build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(targets=(target,)))
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_crashes_is_reported(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BuildError, match="compiling process ended with 1"):
        build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(targets=("sm89",)))
    assert list(tmp_path.iterdir()) == []


def run_build(checkpoint: Path, tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "trimode.cli.main",
        "build",
        str(checkpoint),
        "-o",
        str(tmp_path / "bundle"),
        "--block-lengths",
        "8",
        *more,
    ]
    # A runner may have started the tests with interrupts ignored, which children inherit.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    environment = {**os.environ, "TRIMODE_CACHE": str(tmp_path / "cache")}
    return subprocess.Popen(
        command, stdout=-1, stderr=-1, text=True, env=environment, preexec_fn=heed
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.usefixtures("graphs_at_hand")
def test_an_interrupted_build_leaves_bundle_and_cache_whole(
    checkpoint: Path, tmp_path: Path, kept: Path, how: signal.Signals
) -> None:
    build_bundle(
        checkpoint,
        tmp_path / "bundle",
        BuildOptions(targets=("sm86",), block_lengths=(8,), cache=kept),
    )
    before = files_of(tmp_path / "bundle")
    process = run_build(
        checkpoint, tmp_path, "--target", "sm89", "--target", "sm120", "--jobs", "1"
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("compile"):
            break
    deadline = time.monotonic() + 60
    while (
        not list((tmp_path / "cache").glob("??/*.partial"))
        and len(list((tmp_path / "cache").glob("??/*.sha256"))) < 4
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    open_bundle(tmp_path / "bundle")
    if how == signal.SIGINT:
        assert files_of(tmp_path / "bundle") == before
        assert not list((tmp_path / "cache").glob("??/*.partial"))
    again = run_build(checkpoint, tmp_path, "--target", "sm89", "--target", "sm120")
    assert again.communicate()[1].splitlines()[-1].startswith("built ")
    bundle = open_bundle(tmp_path / "bundle")
    assert list(bundle.chosen.targets) == ["sm86", "sm89", "sm120"]
    assert set(files_of(tmp_path / "bundle")) == {*bundle.manifest.files, "manifest.json"}


@pytest.mark.usefixtures("graphs_at_hand")
def test_two_builds_of_one_bundle(checkpoint: Path, tmp_path: Path) -> None:
    build_bundle(
        checkpoint, tmp_path / "bundle", BuildOptions(block_lengths=(8,), precision="bf16")
    )
    running = [
        run_build(checkpoint, tmp_path, "--target", "sm89"),
        run_build(checkpoint, tmp_path, "--target", "sm120"),
    ]
    messages = [process.communicate()[1] for process in running]
    assert sorted(process.returncode for process in running) in ([0, 0], [0, 1])
    for process, message in zip(running, messages, strict=True):
        assert process.returncode == 0 or "another build" in message
    bundle = open_bundle(tmp_path / "bundle")
    assert len(bundle.chosen.targets) == 1 + sum(process.returncode == 0 for process in running)
    assert set(files_of(tmp_path / "bundle")) == {*bundle.manifest.files, "manifest.json"}


def test_a_target_added_meanwhile_is_not_lost(
    checkpoint: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another build adds its target after this one has read the manifest and before it takes the
    lock.
    """
    build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(precision="bf16"))
    compare = pipeline.check_same

    def slow(*arguments: Any) -> None:
        monkeypatch.setattr(pipeline, "check_same", compare)
        build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(targets=("cuda",)))
        compare(*arguments)

    monkeypatch.setattr(pipeline, "check_same", slow)
    with pytest.raises(BuildError, match="another build has changed it"):
        build_bundle(
            checkpoint,
            tmp_path / "bundle",
            BuildOptions(targets=("sm89",), block_lengths=(8,), cache=kept),
        )
    assert list(open_bundle(tmp_path / "bundle").chosen.targets) == ["cpu", "cuda"]
    build_bundle(
        checkpoint,
        tmp_path / "bundle",
        BuildOptions(targets=("sm89",), block_lengths=(8,), cache=kept),
    )
    assert list(open_bundle(tmp_path / "bundle").chosen.targets) == ["cpu", "cuda", "sm89"]


@pytest.mark.usefixtures("graphs_at_hand")
def test_two_bundles_at_a_time_share_the_cache(checkpoint: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "trimode.cli.main",
        "build",
        str(checkpoint),
        "--target",
        "sm89",
        "--block-lengths",
        "8",
        "--json",
    ]
    environment = {**os.environ, "TRIMODE_CACHE": str(tmp_path / "cache")}
    running = [
        subprocess.Popen(
            [*command, "-o", str(tmp_path / name)], stdout=-1, stderr=-1, text=True, env=environment
        )
        for name in ("one", "two")
    ]
    done = [json.loads(process.communicate()[0]) for process in running]
    # each engine was compiled by one of them
    assert sum(result["cached_engines"] for result in done) == 3
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.usefixtures("graphs_at_hand")
def test_a_full_disk_leaves_the_bundle_whole(checkpoint: Path, tmp_path: Path, kept: Path) -> None:
    """A limit on file size makes writing an engine fail in the middle, as a full disk does."""
    import resource

    build_bundle(
        checkpoint,
        tmp_path / "bundle",
        BuildOptions(targets=("sm86",), block_lengths=(8,), cache=kept),
    )
    before = files_of(tmp_path / "bundle")
    command = [
        sys.executable,
        "-m",
        "trimode.cli.main",
        "build",
        str(checkpoint),
        "-o",
        str(tmp_path / "bundle"),
        "--target",
        "sm89",
    ]
    done = subprocess.run(
        command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRIMODE_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 1
    assert "disk full" in done.stderr
    assert "Traceback" not in done.stderr
    assert files_of(tmp_path / "bundle") == before
    assert not list((tmp_path / "cache").glob("??/*.partial"))


def test_nested_phases_become_one_fraction() -> None:
    tree, seen = PhaseTree(), []
    tree.start("build", None, 2)
    tree.start("prepare", "build", 4)
    for step in range(4):
        tree.step("prepare", step)
        seen.append(tree.fraction)
    tree.finish("prepare")
    tree.step("build", 0)
    tree.start("time", "build", 1)
    tree.start("inner", "time", 2)
    tree.step("inner", 0)
    seen.append(tree.fraction)
    assert seen == [0.125, 0.25, 0.375, 0.5, 0.75]
    tree.step("nobody knows it", 3)
    tree.step("build", 1)
    assert tree.fraction == 1.0


def test_quadratic_engines_have_room_behind_the_longest_text(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The fourth graph compiles for two architectures; what it writes behind a text fits the cache
    of all four.
    """
    options = BuildOptions(
        targets=("sm89", "sm120"), quadratic=True, block_lengths=(1, 16, 64), max_length=208
    )
    built = build_bundle(checkpoint, tmp_path / "bundle", options)
    manifest = built.manifest
    for record in built.record.targets.values():
        assert record.capacity == 208 + 16 * 17
        # 64 is beyond the position tables
        assert [p.rows[0] for p in record.graphs["quadratic"].profiles] == [1, 16]
        assert [p.rows[0] for p in record.graphs["verify"].profiles] == [1, 16, 64]
        assert manifest.files[record.graphs["quadratic"].file].num_bytes > 100_000
    # A target that is added follows the bundle, asked or not.
    result = build_bundle(
        checkpoint, tmp_path / "bundle", replace(options, targets=("cpu",), quadratic=False)
    )
    assert set(result.record.targets["cpu"].graphs) == {*GRAPH_NAMES, "quadratic"}

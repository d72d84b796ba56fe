"""Engines of several capacities: planned, compiled for real, added, and reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import config_of, write_checkpoint
from typer.testing import CliRunner

from trimode.cli.inspect import describe, sharing
from trimode.cli.main import app
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.compiler.plan import make_plan
from trimode.compiler.plans.report import read_plans
from trimode.errors import BundleError, UsageError
from trimode.formats.contract import GRAPH_NAMES
from trimode.formats.manifest import Manifest
from trimode.graphs.checkpoint import open_checkpoint
from trimode.runtime.bundle.open import open_bundle

OPTIONS = BuildOptions(
    targets=("rtx-4090",),
    precision="bf16",
    max_length=448,
    block_lengths=(8,),
    capacities=(64, 192),
)
SLOTS = (128, 256, 512)
SUFFIXES = ("-64", "-192", "")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capacities") / "small"
    return write_checkpoint(folder, config_of(num_hidden_layers=1), rank=2)


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, and with the cache that it was built over."""
    folder = tmp_path_factory.mktemp("built")
    build_bundle(checkpoint, folder / "bundle", replace(OPTIONS, cache=folder / "cache"))
    return folder


def engines_in(bundle: Path) -> set[str]:
    return {path.name for path in (bundle / "engines" / "rtx-4090").iterdir()}


def test_one_set_of_engines_for_each_capacity(built: Path) -> None:
    bundle = open_bundle(built / "bundle")  # every file has the digest the manifest says
    record, model = bundle.chosen.targets["rtx-4090"], bundle.manifest.model
    assert [one.capacity for one in record.by_capacity()] == list(SLOTS)
    assert [one.max_length for one in record.smaller] == [64, 192]
    assert engines_in(built / "bundle") == {f"{r}{s}.engine" for r in GRAPH_NAMES for s in SUFFIXES}
    assert {engine.file for engine in record.engines} < set(bundle.manifest.files)
    slot = 2 * model.num_key_value_heads * model.head_dim * 2
    for plan in read_plans(built / "bundle", bundle.manifest.precisions):
        assert isinstance(plan.plan, tuple)
        assert {one.keys_values for one in plan.plan} == {slot * (plan.capacity or 0)}, plan.name


def test_more_capacities_hold_no_more_weights(built: Path) -> None:
    manifest = open_bundle(built / "bundle").manifest
    for graph_name in GRAPH_NAMES:
        sizes = [
            manifest.files[f"engines/rtx-4090/{graph_name}{suffix}.engine"].num_bytes
            for suffix in SUFFIXES
        ]
        assert max(sizes) - min(sizes) < 0.1 * max(sizes)
    assert sharing(manifest)["graphs"] == 3 * len(GRAPH_NAMES)
    lines = "\n".join(describe(manifest))
    for slots, length in zip(SLOTS, (64, 192, 448), strict=True):
        cache = f"{slots * 2 * 2 * 16 * 2 / 1e6:.1f} MB a sequence"
        assert f"K/V cache of {slots} slots ({cache}), texts of up to {length} tokens" in lines


def test_prompt_chunks_fit_their_capacity(built: Path) -> None:
    record = open_bundle(built / "bundle").chosen.targets["rtx-4090"]
    chunks = [one.graphs["ar"].profiles[1].rows[2] for one in record.by_capacity()]
    assert chunks == [128, 256, 448]
    for one in record.by_capacity():
        assert one.graphs["verify"].profiles == record.graphs["verify"].profiles


def test_capacities_come_and_go_with_the_options(
    built: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same is up to date; other capacities take from the cache what there is."""
    bundle, options = tmp_path / "bundle", replace(OPTIONS, cache=built / "cache")
    result = build_bundle(checkpoint, bundle, replace(options, capacities=None))
    assert (result.num_cached, engines_in(bundle)) == (
        3,
        {f"{graph_name}.engine" for graph_name in GRAPH_NAMES},
    )
    assert "smaller" not in (bundle / "manifest.json").read_text()
    result = build_bundle(checkpoint, bundle, replace(options, capacities=(192, 448)))
    assert (result.built, result.num_cached) == (("rtx-4090",), 6)
    assert engines_in(bundle) == {
        f"{graph_name}{s}.engine" for graph_name in GRAPH_NAMES for s in ("", "-192")
    }
    monkeypatch.setattr("trimode.compiler.stages.trace.traced_graph", None)  # nothing may be traced
    for again in ((192, 448), (192,)):
        assert build_bundle(checkpoint, bundle, replace(options, capacities=again)).built == ()


def test_a_bundle_of_before_is_read(built: Path, tmp_path: Path) -> None:
    manifest = json.loads((built / "bundle" / "manifest.json").read_text())
    target = manifest["precisions"]["bf16"]["targets"]["rtx-4090"]
    assert [one["capacity"] for one in target.pop("smaller")] == [128, 256]
    record = Manifest.model_validate(manifest).precisions["bf16"].targets["rtx-4090"]
    assert [one.capacity for one in record.by_capacity()] == [512]


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "descending": (
        lambda smaller: smaller.reverse(),
        "expected lengths of text that ascend, found 192, 64, 448",
    ),
    "beyond the largest": (
        lambda smaller: smaller[1].update(capacity=512),
        "expected capacities of text that ascend, found 128, 512, 512",
    ),
    "too few slots": (
        lambda smaller: smaller[0].update(capacity=63),
        "expected a capacity for texts of 64 tokens, found 63 slots",
    ),
    "no graphs": (lambda smaller: smaller[0].update(graphs={}), "expected graphs of ar, draft"),
    "no such file": (
        lambda smaller: smaller[0]["graphs"]["ar"].update(file="engines/rtx-4090/ar-65.engine"),
        "expected graphs among the files of the manifest, found engines/rtx-4090/ar-65",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_whose_capacities_contradict_it(built: Path, tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    bundle = shutil.copytree(built / "bundle", tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest["precisions"]["bf16"]["targets"]["rtx-4090"]["smaller"])
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_plans_name_the_capacity(built: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(built / "bundle"), "--plans"])
    assert result.exit_code == 0
    for slots in SLOTS:
        assert f"bf16 rtx-4090 verify, {slots} slots" in result.stdout
    result = CliRunner().invoke(app, ["inspect", str(built / "bundle"), "--plans", "--json"])
    assert sorted({one["capacity"] for one in json.loads(result.stdout)}) == list(SLOTS)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_engines_that_hold_weights_have_one_capacity(checkpoint: Path, precision: str) -> None:
    """Those of full TensorRT hold none, nor those of the CPU."""
    opened = open_checkpoint(checkpoint)
    options = replace(OPTIONS, precision=precision, calibration="rtn")
    with pytest.raises(UsageError, match=f"one capacity in {precision}, whose engines hold"):
        make_plan(opened, options)
    assert make_plan(opened, replace(options, targets=("cpu",))).records["cpu"].smaller == ()
    assert make_plan(opened, replace(options, capacities=None)).records["rtx-4090"].smaller == ()


def test_every_block_fits_behind_every_text(checkpoint: Path) -> None:
    """Blocks of quadratic self-speculation too, and sequences begin where tensors may."""
    options = replace(OPTIONS, quadratic=True, max_batch=3, block_lengths=(8, 17), capacities=(77,))
    record = make_plan(open_checkpoint(checkpoint), options).records["rtx-4090"]
    small, large = record.by_capacity()
    assert (small.capacity, large.capacity) == (384, 768)
    assert 77 + 17 * 18 <= 384 < 77 + 17 * 18 + 64
    assert small.graphs["quadratic"].profiles == large.graphs["quadratic"].profiles


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unsorted": ({"capacities": (192, 64)}, "ascending order, each once and at least 1, found 192"),
    "twice": ({"capacities": (64, 64)}, "each once and at least 1, found 64,64"),
    "none": ({"capacities": ()}, "found none"),
    "zero": ({"capacities": (0, 64)}, "found 0,64"),
    "beyond the longest text": ({"capacities": (64, 449)}, "longest text, 448 tokens, found 449"),
    "below a block": ({"capacities": (7, 64)}, "longest block, 8 tokens, found 7"),
    "below the usual blocks": (
        {"capacities": (24,), "block_lengths": None},
        "longest block, 32 tokens, found 24",
    ),
    "baked": ({"weights": "baked"}, "expected `weights` shared with `capacities`, found baked"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_capacities(case: str, checkpoint: Path, tmp_path: Path) -> None:
    changes, message = BAD[case]
    with pytest.raises(UsageError, match=message) as raised:
        build_bundle(checkpoint, tmp_path / "bundle", replace(OPTIONS, **changes))
    assert raised.value.hint
    assert not list(tmp_path.iterdir())


def test_bad_capacities_on_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["build", str(checkpoint), "-o", str(tmp_path / "b"), "--target", "rtx-4090"]
    for value in ("64;192", "192,64", "x"):
        result = CliRunner().invoke(app, [*arguments, "--capacities", value])
        assert isinstance(result.exception, UsageError)
    assert not list(tmp_path.iterdir())

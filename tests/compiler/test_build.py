"""Building: what the bundle holds, and that it is all or nothing."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import config_of, write_checkpoint
from conftest import Built
from safetensors.numpy import load_file

from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.compiler.store.staging import staged_folder
from trimode.errors import BuildError, CheckpointError, UsageError
from trimode.formats.safetensors import to_float32
from trimode.graphs.checkpoint import open_checkpoint
from trimode.runtime import TriModeModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("c") / "small", config_of(num_hidden_layers=1), rank=2
    )


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("shape", ["three_kv_heads", "one_kv_head", "plain"])
def test_the_pack_holds_every_weight_once_and_exactly(
    built: Callable[[str], Built], shape: str
) -> None:
    it = built(shape)
    packed = load_file(it.bundle / "weights.safetensors")
    opened = open_checkpoint(it.checkpoint)
    for name, entry in opened.tensors.items():
        np.testing.assert_array_equal(
            packed.pop(name).ravel(), to_float32(b"".join(entry.chunks()), entry.dtype)
        )
    assert all(name.startswith("rope.") for name in packed)
    data_start = 8 + int.from_bytes((it.bundle / "weights.safetensors").read_bytes()[:8], "little")
    assert data_start % 4096 == 0


def test_the_manifest_lists_every_file(built: Callable[[str], Built]) -> None:
    it = built("three_kv_heads")
    manifest = json.loads((it.bundle / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(
        p.name for p in it.bundle.iterdir() if p.name != "manifest.json"
    )
    assert manifest["source"]["name"] == "checkpoint"
    assert {"torch", "onnx", "numpy"} <= set(manifest["libraries"])


def test_source_digest_follows_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    first = build_bundle(checkpoint, tmp_path / "a").manifest.source.sha256
    assert build_bundle(checkpoint, tmp_path / "b").manifest.source.sha256 == first
    other = write_checkpoint(tmp_path / "other", config_of(num_hidden_layers=1), rank=2, seed=1)
    assert build_bundle(other, tmp_path / "c").manifest.source.sha256 != first
    # same input, same bytes
    for name in ("ar.onnx", "draft.onnx", "verify.onnx", "weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_existing_bundles_are_replaced_only_by_force(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    build_bundle(checkpoint, output)
    other = write_checkpoint(tmp_path / "other", config_of(num_hidden_layers=1), rank=2, seed=1)
    with pytest.raises(UsageError, match="other weights"):
        build_bundle(other, output)
    (output / "stale").touch()
    build_bundle(checkpoint, output, BuildOptions(force=True))
    assert not (output / "stale").exists()
    assert leftovers(tmp_path) == ["bundle", "other"]


def test_what_is_no_bundle_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("all of it")
    for output in (tmp_path / "home", tmp_path / "home" / "thesis.txt"):
        with pytest.raises(UsageError, match="found something else"):
            build_bundle(checkpoint, output, BuildOptions(force=True))
    assert (tmp_path / "home" / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(targets=("abacus",)),
        BuildOptions(targets=()),
        BuildOptions(precision="fp8"),
        BuildOptions(max_length=1),
        BuildOptions(max_length=2000),
        BuildOptions(block_lengths=()),
        BuildOptions(block_lengths=(0,)),
        BuildOptions(block_lengths=(65,)),
        BuildOptions(max_batch=0),
        BuildOptions(workspace_mib=0),
        BuildOptions(num_jobs=0),
        BuildOptions(targets=("auto",)),
        BuildOptions(weights="elsewhere"),  # type: ignore[arg-type]
    ],
)
def test_options_out_of_range(checkpoint: Path, tmp_path: Path, options: BuildOptions) -> None:
    with pytest.raises(UsageError):
        build_bundle(checkpoint, tmp_path / "bundle", options)
    assert leftovers(tmp_path) == []


def test_bad_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        build_bundle(tmp_path / "missing", tmp_path / "deep" / "bundle")
    assert leftovers(tmp_path) == []


def test_max_length_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(max_length=40))
    model = TriModeModel.from_pretrained(tmp_path / "bundle", num_threads=1)
    assert model.ar_generate([[20] * 39], eos_token_id=0)[0].shape == (1, 40)
    with pytest.raises(UsageError, match="shorter than 40 tokens, found 40"):
        model.ar_generate([[20] * 40])


def test_interruption_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    class Interrupt:
        def stage(self, name: str, total: int) -> Callable[[int], None]:
            if name == "write graphs":
                raise KeyboardInterrupt
            return lambda _: None

    with pytest.raises(KeyboardInterrupt):
        build_bundle(checkpoint, tmp_path / "bundle", progress=Interrupt())
    assert leftovers(tmp_path) == []


def test_one_build_at_a_time(tmp_path: Path) -> None:
    with (
        staged_folder(tmp_path / "bundle", force=False),
        pytest.raises(BuildError, match="another build"),
        staged_folder(tmp_path / "bundle", force=False),
    ):
        pass
    with staged_folder(tmp_path / "bundle2", force=False) as folder:
        (folder / "manifest.json").touch()
    assert leftovers(tmp_path / "bundle2") == ["manifest.json"]


def test_a_killed_build_is_cleared_by_the_next(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom trimode.compiler.store.staging import staged_folder\n"
        "with staged_folder(pathlib.Path(sys.argv[1]), force=False) as f:\n"
        "    (f / 'part').touch(); print('in', flush=True); sys.stdin.read()\n"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "bundle")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert victim.stdout is not None
    assert victim.stdin is not None
    victim.stdout.readline()
    with pytest.raises(BuildError, match="another build"):
        build_bundle(checkpoint, tmp_path / "bundle")
    victim.kill()
    victim.wait()
    victim.stdout.close()
    victim.stdin.close()
    assert any(name.startswith(".bundle.partial") for name in leftovers(tmp_path))
    build_bundle(checkpoint, tmp_path / "bundle")
    assert leftovers(tmp_path) == ["bundle"]


def test_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A limit on file size makes the write fail in the middle, as a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "trimode.cli.main",
            "build",
            str(checkpoint),
            "-o",
            str(tmp_path / "bundle"),
        ],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "disk full" in done.stderr
    assert "Traceback" not in done.stderr
    assert leftovers(tmp_path) == []


def test_too_little_space_is_known_beforehand(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(BuildError, match="free disk"):
        build_bundle(checkpoint, tmp_path / "bundle")
    assert leftovers(tmp_path) == []


def test_a_bundle_set_aside_by_a_killed_build_comes_back(tmp_path: Path) -> None:
    """Killed between its two renames, a build has moved the old bundle away and the new one not yet
    there.
    """
    aside = tmp_path / ".bundle.partial-old"
    aside.mkdir()
    (aside / "manifest.json").write_text("the old one")
    with (
        pytest.raises(UsageError, match="found a bundle"),
        staged_folder(tmp_path / "bundle", force=False),
    ):
        pass
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "the old one"
    assert leftovers(tmp_path) == ["bundle"]


def test_an_output_is_refused_before_the_work(checkpoint: Path, tmp_path: Path) -> None:
    """Neither is the checkpoint replaced, nor a name written that the libraries of ONNX cannot
    open.
    """
    copy = shutil.copytree(checkpoint, tmp_path / "bundle" / "ck")
    (tmp_path / "bundle" / "manifest.json").touch()
    started: list[str] = []

    class Watched:
        def stage(self, name: str, total: int) -> Callable[[int], None]:
            started.append(name)
            return lambda _: None

    for output in (copy, copy / "bundle", tmp_path / "bundle", tmp_path / "bad\udcff"):
        with pytest.raises(UsageError):
            build_bundle(copy, output, BuildOptions(force=True), Watched())
    assert started == []
    assert sorted(path.name for path in copy.iterdir()) == sorted(
        path.name for path in checkpoint.iterdir()
    )


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with staged_folder(tmp_path / "bundle", force=False) as folder:
        (folder / "manifest.json").touch()
    assert leftovers(tmp_path) == ["bundle"]
    assert "no locks" in caplog.text

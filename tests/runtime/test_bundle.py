from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Built

from trimode.errors import BundleError
from trimode.formats.files import sha256_of
from trimode.runtime.bundle.open import open_bundle

FILES = ("ar.onnx", "draft.onnx", "verify.onnx", "weights.safetensors", "config.json")


@pytest.fixture
def copy(built: Callable[[str], Built], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built("three_kv_heads").bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_found(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=name):
        open_bundle(copy)
    open_bundle(copy, verify=False)


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_missing_files_are_found(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(BundleError, match="bytes"):
        open_bundle(copy, verify=False)
    (copy / name).unlink()
    with pytest.raises(BundleError, match="found none"):
        open_bundle(copy)


def edit(copy: Path, **changes: object) -> None:
    file = copy / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_newer_schema(copy: Path) -> None:
    edit(copy, schema_version=99, something_new=1)
    with pytest.raises(BundleError, match="schema version 5, found 99") as raised:
        open_bundle(copy)
    assert "update" in raised.value.hint


def test_older_schema(copy: Path) -> None:
    edit(copy, schema_version=3)
    with pytest.raises(BundleError, match="schema version 5, found 3") as raised:
        open_bundle(copy)
    assert "build the bundle again" in raised.value.hint


def test_manifest_must_be_as_declared(copy: Path) -> None:
    edit(copy, surprise=1)
    with pytest.raises(BundleError, match="surprise"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_manifest_cannot_leave_the_folder(copy: Path, name: str) -> None:
    precisions = json.loads((copy / "manifest.json").read_text())["precisions"]
    precisions["fp32"]["packs"] = [name]
    edit(copy, precisions=precisions)
    with pytest.raises(BundleError, match="packs"):
        open_bundle(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_unreadable_manifest(copy: Path, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(copy)


def test_not_a_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", Path(__file__)):
        with pytest.raises(BundleError, match="expected a bundle"):
            open_bundle(path)


def test_the_runtime_imports_nothing_heavy() -> None:
    heavy = ("torch", "onnx", "onnx_ir", "transformers")
    code = (
        f"import sys, trimode.runtime.sessions.ort.session, trimode.runtime; print([m for m in "
        f"{heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("data", [b"", b"some bytes"])
def test_digests_without_mappings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    (tmp_path / "it").write_bytes(data)
    assert sha256_of(tmp_path / "it") == hashlib.sha256(data).hexdigest()
    monkeypatch.setattr("mmap.mmap", refuse)
    assert sha256_of(tmp_path / "it") == hashlib.sha256(data).hexdigest()

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Built

from trimode.errors import BundleError, TrimodeError
from trimode.formats.files import sha256_of
from trimode.runtime.bundle.open import open_bundle
from trimode.runtime.model import TriModeModel

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


def change(copy: Path, edit: Callable[[Any], object]) -> None:
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


def first(manifest: Any) -> Any:
    return manifest["precisions"]["fp32"]


def cpu(manifest: Any) -> Any:
    return first(manifest)["targets"]["cpu"]


CONTRADICTIONS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a pack that is no file": (
        lambda m: first(m).update(packs=["weights-2.safetensors"]),
        r"precision fp32: expected packs among the files .* found weights-2\.safetensors",
    ),
    "a graph that is no file": (
        lambda m: first(m)["graphs"].update(ar="arr.onnx"),
        r"precision fp32: expected graphs among the files .* found arr\.onnx",
    ),
    "a file that is not listed": (
        lambda m: m["files"].pop("weights.safetensors"),
        "expected packs among the files",
    ),
    "a target's graph that is no file": (
        lambda m: cpu(m)["graphs"]["draft"].update(file="engines/cpu/draft.onnx"),
        "target cpu: expected graphs among the files",
    ),
    "a graph for another": (
        lambda m: cpu(m)["graphs"]["draft"].update(file="ar.onnx"),
        "target cpu: expected graphs that only this target has, found others",
    ),
    "a graph that is missing": (
        lambda m: first(m)["graphs"].pop("draft"),
        "precision fp32: expected graphs of ar, draft, verify, found ar, verify",
    ),
    "a target's graph that is missing": (
        lambda m: cpu(m).update(graphs={}),
        "target cpu: expected graphs of ar, draft, verify, found none",
    ),
    "a contract that is missing": (
        lambda m: m["contracts"].pop("verify"),
        "expected graphs of ar, draft, found ar, draft, verify",
    ),
    "the contract of another graph": (
        lambda m: m["contracts"].update(ar=m["contracts"]["verify"]),
        "expected the contract of ar, found that of verify",
    ),
    "logits over another vocabulary": (
        lambda m: m["model"].update(vocab_size=m["model"]["vocab_size"] + 1),
        "contract ar: expected the outputs of this schema and model",
    ),
    "no layers": (
        lambda m: m["model"].update(num_hidden_layers=0),
        r"expected model\.num_hidden_layers of at least 1, found 0",
    ),
    "heads that do not divide": (
        lambda m: m["model"].update(num_attention_heads=7),
        r"expected model\.num_attention_heads to be a multiple of 3",
    ),
    "a mask beyond the vocabulary": (
        lambda m: m["model"].update(mask_token_id=10**6),
        "expected special tokens of the model from 0",
    ),
    "blocks beyond the longest": (
        lambda m: m["model"].update(block_size=10**6),
        r"expected model\.block_size up to",
    ),
    "more weights than the packs hold": (
        lambda m: first(m).update(weight_bytes=10**12),
        "expected packs of at least 1000000000000 bytes",
    ),
    "scales of a precision that has none": (
        lambda m: first(m).update(
            calibration={"name": "c", "algorithm": "max", "block_size": 16, "scales_sha256": None}
        ),
        "expected no calibration, found a calibration",
    ),
    "a quantized precision without scales": (
        lambda m: m.update(precisions={"int8": first(m)}),
        "precision int8: expected a calibration, found no calibration",
    ),
    "engines on a CPU": (
        lambda m: cpu(m).update(backend="tensorrt_rtx", capacity=64),
        "expected engines of tensorrt_rtx on cuda",
    ),
    "engines without a capacity": (
        lambda m: cpu(m).update(backend="tensorrt", device="cuda", compute_capability="8.9"),
        "expected engines with a capacity of at least 1, found None",
    ),
    "a profile that goes down": (
        lambda m: cpu(m)["graphs"]["ar"].update(profiles=[{"batch": [1, 1, 1], "rows": [4, 2, 1]}]),
        "target cpu: ar: expected rows as least, usual and most, found 4, 2, 1",
    ),
    "a sampler that is no file": (
        lambda m: m.update(
            sampler={
                "file": "sampler.onnx",
                "name": "s",
                "sha256": "0" * 64,
                "num_parameters": 1,
                "block_lengths": [8],
                "threshold": 0.5,
            }
        ),
        r"expected sampler among the files .* found sampler\.onnx",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself(copy: Path, name: str) -> None:
    edit_it, message = CONTRADICTIONS[name]
    change(copy, edit_it)
    for read in (open_bundle, TriModeModel.from_pretrained):
        with pytest.raises(BundleError, match=message) as raised:
            read(copy)
        assert raised.value.hint
        assert "\n" not in raised.value.message


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a manifest, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from leaves(value[key])


@pytest.mark.parametrize("seed", range(30))
def test_any_changed_entry_opens_and_runs_or_is_one_error(copy: Path, seed: int) -> None:
    """One value becomes another of the same kind, or goes: nothing else than an error of ours."""
    rng = random.Random(seed)

    def damage(manifest: Any) -> None:
        place, key = rng.choice(list(leaves(manifest)))
        value = place[key]
        if isinstance(value, dict | list):
            place[key] = type(value)()
        elif isinstance(value, str):
            place[key] = rng.choice(["draft.onnx", "verify", "float16", "x"])
        elif isinstance(value, int):
            place[key] = rng.choice([0, -1, 3, value + 1, value * 2])
        else:
            del place[key]

    change(copy, damage)
    error = what_running_raises(copy)
    if error is not None:
        assert error.hint
        assert "\n" not in error.message


def what_running_raises(bundle: Path) -> TrimodeError | None:
    try:
        model = TriModeModel.from_pretrained(bundle, num_threads=1)
        list(model.stream([[1, 2, 3]], "linear_spec", max_new_tokens=2))
    except TrimodeError as error:
        return error
    return None

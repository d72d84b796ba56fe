"""One file of prepacked int4 weights under all graphs: right, made once, made again when damaged,
and done without where there is no place.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import config_of, write_checkpoint

from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.formats.contract import GRAPH_NAMES
from trimode.runtime.bundle.open import Bundle, open_bundle
from trimode.runtime.model import TriModeModel
from trimode.runtime.sessions.ort import prepacked as ort_prepacked
from trimode.runtime.sessions.ort import session as ort_session
from trimode.runtime.sessions.ort.library import session_options
from trimode.runtime.sessions.ort.session import OrtSession

IDS = np.arange(9)[None] * 5 % 101
Outputs = list[np.ndarray]


@pytest.fixture(scope="module", params=["cpu", "cpu sm86"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two layers; where a GPU is among the targets, all that is not int4 is bfloat16 in the
    pack.
    """
    folder = tmp_path_factory.mktemp("int4")
    changes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    checkpoint = write_checkpoint(folder / "checkpoint", config_of(**changes), rank=2)
    options = BuildOptions(
        tuple(request.param.split()),
        precision="int4",
        calibration="rtn",
        block_lengths=(8,),
        quadratic=True,
    )
    build_bundle(checkpoint, folder / "bundle", options)
    return open_bundle(folder / "bundle")


@pytest.fixture
def no_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_session, "PRIVATE_WEIGHTS_BYTES", 0)


def run(session: OrtSession) -> Outputs:
    cache = session.new_cache()
    session.run("ar", cache, IDS, 0)
    return [
        np.array(x)
        for graph_name in session.contracts
        for rows in (1, 4, 9)
        for x in session.run(graph_name, cache, IDS[:, :rows] + 1, 5, 1.0)
    ]


def assert_same(found: Outputs, expected: Outputs) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def entry_in(cache: Path) -> Path:
    (entry,) = (path for path in (cache / "prepacked").iterdir() if path.is_dir())
    return entry


def spoil(entry: Path, how: str) -> None:
    weights, contents = entry / "weights.bin", entry / "contents.json"
    if how == "a bit":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 4
        weights.write_bytes(data)
    elif how == "cut":
        os.truncate(weights, weights.stat().st_size - 1)
    elif how == "a graph":
        (entry / "draft.onnx").unlink()
    else:
        contents.write_text(how)


def test_bit_for_bit_the_same_and_held_once(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    alone = run(OrtSession(bundle, None, 1, runtime_cache=tmp_path))
    assert list(tmp_path.iterdir()) == []  # a small pack is not worth it
    monkeypatch.setattr(ort_session, "PRIVATE_WEIGHTS_BYTES", 0)
    assert_same(run(OrtSession(bundle, None, 1, runtime_cache=tmp_path)), alone)
    entry = entry_in(tmp_path)
    assert sorted(path.name for path in entry.iterdir()) == [
        "ar.onnx",
        "contents.json",
        "draft.onnx",
        "quadratic.onnx",
        "verify.onnx",
        "weights.bin",
    ]
    made = (entry / "weights.bin").stat()
    assert_same(run(OrtSession(bundle, None, 1, runtime_cache=tmp_path)), alone)
    assert (entry / "weights.bin").stat().st_ino == made.st_ino
    places: dict[str, set[str]] = {}
    for graph_name in bundle.manifest.contracts:
        for tensor in onnx.load(
            entry / f"{graph_name}.onnx", load_external_data=False
        ).graph.initializer:
            entries = {item.key: item.value for item in tensor.external_data}
            for key, value in entries.items():
                if key.startswith("prepacked"):
                    assert entries["location"] == "weights.bin"
                    places.setdefault(tensor.name, set()).add(value)
    assert len([name for name in places if "_proj.weight" in name]) >= 14
    assert all(len(found) == 1 for found in places.values())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("how", ["a bit", "cut", "a graph", "{", "[]", '{"weights.bin": 3}'])
def test_damage_is_repaired(bundle: Bundle, tmp_path: Path, no_private: None, how: str) -> None:
    expected = run(OrtSession(bundle, None, 1, runtime_cache=tmp_path))
    entry = entry_in(tmp_path)
    before = (entry / "weights.bin").read_bytes()
    spoil(entry, how)
    assert_same(run(OrtSession(bundle, None, 1, runtime_cache=tmp_path)), expected)
    assert (entry / "weights.bin").read_bytes() == before
    assert (entry / "draft.onnx").is_file()


def test_digests_are_the_price_of_verifying(
    bundle: Bundle, tmp_path: Path, no_private: None
) -> None:
    """A bundle that is opened by sizes alone opens its entry so."""
    run(OrtSession(bundle, None, 1, runtime_cache=tmp_path))
    entry, quick = entry_in(tmp_path), open_bundle(bundle.path, verify=False)
    spoil(entry, "a bit")
    spoiled = (entry / "weights.bin").read_bytes()
    OrtSession(quick, None, 1, runtime_cache=tmp_path)
    assert (entry / "weights.bin").read_bytes() == spoiled
    spoil(entry, "cut")
    OrtSession(quick, None, 1, runtime_cache=tmp_path)
    assert (entry / "weights.bin").stat().st_size == len(spoiled)
    assert (entry / "weights.bin").read_bytes() != spoiled


def test_two_at_once_make_it_once(
    bundle: Bundle, tmp_path: Path, no_private: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks of two open files exclude each other, in two processes as in two threads."""
    made = []
    optimize = ort_prepacked._optimize

    def counted(graph: Path, output: Path, options: Any) -> Path:
        made.append(graph.name)
        return optimize(graph, output, options)

    monkeypatch.setattr(ort_prepacked, "_optimize", counted)
    (tmp_path / "prepacked").mkdir()
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(lambda _: run(OrtSession(bundle, None, 1, runtime_cache=tmp_path)), range(2))
        )
    assert_same(*found)
    assert sorted(made) == ["ar.onnx", "draft.onnx", "quadratic.onnx", "verify.onnx"]


def test_nothing_is_left_of_a_failure(
    bundle: Bundle, tmp_path: Path, no_private: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was killed, one that finds no place, and one whose optimized graph is not to be
    had.
    """
    expected = run(OrtSession(bundle, None, 1, runtime_cache=tmp_path))
    entry = entry_in(tmp_path)
    entry.rename(tmp_path / "prepacked" / f"{entry.name}.partial-killed")
    assert_same(run(OrtSession(bundle, None, 1, runtime_cache=tmp_path)), expected)
    assert sorted(path.name for path in (tmp_path / "prepacked").iterdir()) == [
        entry.name,
        f"{entry.name}.lock",
    ]
    assert not caplog.records
    (tmp_path / "file").write_text("in the way")
    assert_same(run(OrtSession(bundle, None, 1, runtime_cache=tmp_path / "file")), expected)
    assert "cannot share their int4 weights" in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ort_prepacked, "sha256_of", lambda _: (_ for _ in ()).throw(OSError("no space"))
        )
        assert_same(run(OrtSession(bundle, None, 1, runtime_cache=tmp_path / "full")), expected)
    assert "no space" in caplog.text
    assert [path.suffix for path in (tmp_path / "full" / "prepacked").iterdir()] == [".lock"]


def test_an_entry_belongs_to_one_machine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = {graph_name: f"{graph_name}.onnx" for graph_name in GRAPH_NAMES}
    keys = {ort_prepacked._key(bundle, graphs)}
    keys.add(ort_prepacked._key(bundle, {**graphs, "ar": "draft.onnx"}))
    monkeypatch.setattr(ort_prepacked, "_processor", lambda: ["another"])
    keys.add(ort_prepacked._key(bundle, graphs))
    monkeypatch.setattr(ort_prepacked.ort, "__version__", "1.99")
    keys.add(ort_prepacked._key(bundle, graphs))
    assert len(keys) == 4


def test_what_nobody_opens_is_deleted(bundle: Bundle, tmp_path: Path) -> None:
    graphs = {graph_name: f"{graph_name}.onnx" for graph_name in GRAPH_NAMES}
    old, used = tmp_path / "prepacked" / ("0" * 64), tmp_path / "prepacked" / ("1" * 64)
    for entry in (old, used):
        entry.mkdir(parents=True)
    os.utime(old, (0, 0))
    ort_prepacked.prepacked_graphs(bundle, graphs, lambda: session_options(0, 1), tmp_path)
    assert (old.exists(), used.exists()) == (False, True)


def test_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path))
    assert ort_prepacked.default_folder() == tmp_path
    monkeypatch.delenv("TRIMODE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert ort_prepacked.default_folder() == Path("/somewhere/trimode")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert ort_prepacked.default_folder() == Path("/home/somebody/.cache/trimode")


def test_batches(bundle: Bundle, no_private: None, tmp_path: Path) -> None:
    """Rows of a batch equal their single runs over int4 weights, too, whose kernel for one token is
    another one.
    """
    model = TriModeModel(bundle, OrtSession(bundle, None, 1, runtime_cache=tmp_path))
    prompts = [np.random.default_rng(n).integers(12, 99, n).tolist() for n in (1, 300, 7, 40, 2)]
    for mode in ("ar", "diffusion", "linear_spec", "quadratic_spec"):
        options: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8, "eos_token_ids": ()}
        found = model.generate_batch(prompts, mode, max_rows=3, **options)  # type: ignore[arg-type]
        alone = [model.stream([prompt], mode, **options).finish() for prompt in prompts]  # type: ignore[arg-type]
        assert [(one.token_ids, one.nfe, one.acceptance_length) for one in found] == [
            (a.token_ids, a.nfe, a.acceptance_length) for a in alone
        ]


def test_float32_weights_are_arranged_and_held_once_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the target's graphs; where there is no place for them these map the pack, as before."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config_of(), rank=2)
    build_bundle(checkpoint, tmp_path / "bundle", BuildOptions())
    bundle = open_bundle(tmp_path / "bundle")
    target = bundle.chosen.targets["cpu"]
    expected = run(OrtSession(bundle, target, 1, runtime_cache=tmp_path / "none"))
    assert not (tmp_path / "none").exists()  # a small pack is not worth it
    monkeypatch.setattr(ort_session, "PRIVATE_WEIGHTS_BYTES", 0)
    for _ in range(2):
        assert_same(run(OrtSession(bundle, target, 1, runtime_cache=tmp_path / "cache")), expected)
    assert (entry_in(tmp_path / "cache") / "weights.bin").stat().st_size > 0
    assert not caplog.records
    (tmp_path / "file").write_text("in the way")
    mapped = run(OrtSession(bundle, target, 1, runtime_cache=tmp_path / "file"))
    assert "cannot share their arranged weights, all map the pack" in caplog.text
    for one, other in zip(mapped, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)

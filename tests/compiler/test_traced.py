"""Traced graphs and exported samplers in the cache: the same as made anew, and never those of other
code, libraries, sizes or weights.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from checkpoints import config_of, write_checkpoint
from once import TracedOnce
from safetensors.torch import save_file

import trimode.graphs
from trimode.compiler.passes.base import lower, to_bytes
from trimode.compiler.passes.weights_to_inputs import WeightsToInputs
from trimode.compiler.plan import SamplerSource
from trimode.compiler.stages import extras
from trimode.compiler.stages.extras import write_sampler
from trimode.compiler.store import fingerprint, traced
from trimode.compiler.store.cache import ContentCache
from trimode.errors import CheckpointError
from trimode.formats.contract import GraphName
from trimode.formats.sampler import WEIGHTS, ShapeRecord, load_sampler_record
from trimode.graphs.checkpoint import Checkpoint, describe_model, open_checkpoint
from trimode.graphs.decoder.trace import trace_graph
from trimode.graphs.sampler.network import BlockSampler, SamplerShape

DEMO_SAMPLER = Path(__file__).parents[2] / "artifacts" / "nld-tiny-sampler"
SMALL: dict[str, Any] = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(
        write_checkpoint(tmp_path_factory.mktemp("c") / "it", config_of(**SMALL), rank=2)
    )


@pytest.fixture
def fresh_fingerprint() -> Any:
    fingerprint.tracing_fingerprint.cache_clear()
    yield fingerprint.tracing_fingerprint
    fingerprint.tracing_fingerprint.cache_clear()


def tree(folder: Path) -> Path:
    (folder / "sub/deeper").mkdir(parents=True)
    for name in ("a.py", "sub/b.py", "sub/deeper/c.py"):
        (folder / name).write_text(f"# {name}\n")
    return folder


CHANGES: dict[str, Callable[[Path], object]] = {
    "an edit": lambda it: (it / "a.py").write_text("# other\n"),
    "an edit in a subfolder": lambda it: (it / "sub/b.py").write_text("# other\n"),
    "an edit two folders down": lambda it: (it / "sub/deeper/c.py").write_text("# other\n"),
    "a new file": lambda it: (it / "sub/deeper/d.py").write_text(""),
    "data beside the code": lambda it: (it / "sub/table.json").write_text("{}"),
    "a file that went": lambda it: (it / "sub/b.py").unlink(),
    "a file that moved": lambda it: (it / "sub/b.py").rename(it / "b.py"),
    "lines that moved to another file": lambda it: (
        (it / "a.py").write_text(""),
        (it / "sub/b.py").write_text("# a.py\n# sub/b.py\n"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_sees_every_change_of_the_code(tmp_path: Path, change: str) -> None:
    code = tree(tmp_path / "code")
    before = fingerprint.digest_of([code], {"torch": "1"})
    assert fingerprint.digest_of([tree(tmp_path / "same")], {"torch": "1"}) == before
    CHANGES[change](code)
    assert fingerprint.digest_of([code], {"torch": "1"}) != before


def test_the_digest_sees_versions_and_not_what_python_compiles(tmp_path: Path) -> None:
    code = tree(tmp_path / "code")
    before = fingerprint.digest_of([code], {"torch": "1", "onnx": "2"})
    assert fingerprint.digest_of([code], {"torch": "1.1", "onnx": "2"}) != before
    assert fingerprint.digest_of([code], {"torch": "1", "onnx": "2", "numpy": "3"}) != before
    (code / "sub/__pycache__").mkdir()
    (code / "sub/__pycache__/b.cpython-311.pyc").write_bytes(b"x")
    assert fingerprint.digest_of([code], {"onnx": "2", "torch": "1"}) == before


def test_all_that_tracing_imports_counts() -> None:
    """Modules that tracing brings into a fresh process are among the files of the digest."""
    code = (
        "import sys, trimode.graphs.decoder.trace, trimode.graphs.sampler.trace\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('trimode.')), "
        "sep='\\n')"
    )
    files = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    roots = [root for name in fingerprint.MODULES for root in fingerprint.roots_of(name)]
    assert len(files) > 10
    assert [
        file for file in files if not any(Path(file).is_relative_to(root) for root in roots)
    ] == []
    for module in (traced, extras, sys.modules[WeightsToInputs.__module__]):
        assert any(Path(module.__file__ or "").is_relative_to(root) for root in roots)


@pytest.mark.parametrize("name", ["decoder/trace.py", "inside/new.py"])
def test_a_graph_of_other_code_is_traced_again(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_fingerprint: Any,
    traced_once: TracedOnce,
    name: str,
) -> None:
    model, calls = describe_model(checkpoint), list[GraphName]()
    graph = traced_once.graph("ar", checkpoint, model)
    monkeypatch.setattr(traced, "_trace", lambda graph_name, *_: calls.append(graph_name) or graph)
    code = shutil.copytree(
        next(iter(trimode.graphs.__path__)),
        tmp_path / "graphs",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (code / "inside").mkdir()
    (code / "inside/new.py").write_text("")
    monkeypatch.setattr(trimode.graphs, "__path__", [str(code)])
    fresh_fingerprint.cache_clear()
    kept = ContentCache(tmp_path / "cache")
    for _ in range(2):
        traced.traced_graph("ar", checkpoint, model, kept)
    assert calls == ["ar"]
    (code / name).write_text((code / name).read_text() + "# changed\n")
    fresh_fingerprint.cache_clear()  # as in the next process
    traced.traced_graph("ar", checkpoint, model, kept)
    assert calls == ["ar", "ar"]


def test_what_a_graph_depends_on_is_in_its_key(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = describe_model(checkpoint)
    others = {
        "layers": ({**SMALL, "num_hidden_layers": 2}, 2),
        "rope": ({**SMALL, "rope_parameters": None, "rope_theta": 9999.0}, 2),
        "rank": (SMALL, 3),
    }
    keys = {
        "it": traced.key_of_trace("draft", checkpoint, model),
        "role": traced.key_of_trace("ar", checkpoint, model),
    }
    for name, (changes, rank) in others.items():
        other = open_checkpoint(write_checkpoint(tmp_path / name, config_of(**changes), rank=rank))
        keys[name] = traced.key_of_trace("draft", other, describe_model(other))
    keys["positions"] = traced.key_of_trace(
        "draft", checkpoint, model.model_copy(update={"max_length": model.max_length - 1})
    )
    assert len(set(keys.values())) == len(keys)
    same = open_checkpoint(
        write_checkpoint(
            tmp_path / "same", config_of(**SMALL), rank=2, seed=5, dtype=torch.bfloat16
        )
    )
    # weights do not count
    assert traced.key_of_trace("draft", same, describe_model(same)) == keys["it"]


@pytest.mark.parametrize("graph_name", ["ar", "draft"])
def test_models_that_differ_in_tokens_and_block_size_share_graphs(
    checkpoint: Checkpoint, tmp_path: Path, traced_once: TracedOnce, graph_name: GraphName
) -> None:
    """The graph of the one is what tracing with all facts of the other gives."""
    changes = {"bos_token_id": 7, "eos_token_id": [2, 3], "block_size": 8}
    rank = 0 if graph_name == "ar" else 2
    folder = write_checkpoint(tmp_path / "other", config_of(**SMALL, **changes), rank=rank)
    other = open_checkpoint(folder)
    facts = describe_model(other)
    key, same = (
        traced.key_of_trace(graph_name, one, describe_model(one)) for one in (checkpoint, other)
    )
    assert key == same
    with_all = trace_graph(graph_name, other.config, facts, other.drafter)
    shared = traced_once.graph(graph_name, checkpoint, describe_model(checkpoint))
    assert to_bytes(lower(with_all, WeightsToInputs())) == to_bytes(
        lower(shared, WeightsToInputs())
    )


def test_a_graph_from_the_cache_is_the_graph(
    checkpoint: Checkpoint, traced_once: TracedOnce
) -> None:
    model = describe_model(checkpoint)
    anew, kept = (
        traced_once.anew("draft", checkpoint, model),
        traced_once.graph("draft", checkpoint, model),
    )
    assert to_bytes(lower(anew, WeightsToInputs())) == to_bytes(lower(kept, WeightsToInputs()))
    for one, other in (
        (anew.graph.inputs, kept.graph.inputs),
        (anew.graph.outputs, kept.graph.outputs),
    ):
        assert [(v.name, v.dtype, str(v.shape)) for v in one] == [
            (v.name, v.dtype, str(v.shape)) for v in other
        ]
    weights = {
        n: (v.dtype, str(v.shape), v.const_value is None)
        for n, v in anew.graph.initializers.items()
    }
    assert weights == {
        n: (v.dtype, str(v.shape), v.const_value is None)
        for n, v in kept.graph.initializers.items()
    }


SHAPE = {"d_model": 8, "num_layers": 1, "num_heads": 2, "feed_forward": 12}


def a_sampler(folder: Path, seed: int, **changes: Any) -> SamplerSource:
    """A random small network for the demo checkpoint's vocabulary."""
    torch.manual_seed(seed)
    folder.mkdir()
    record = load_sampler_record(DEMO_SAMPLER)
    shape = {**SHAPE, **changes}
    save_file(BlockSampler(SamplerShape(**shape), record.vocab_size).state_dict(), folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    return SamplerSource(
        folder, record.model_copy(update={"shape": ShapeRecord(**shape), "sampler_sha256": digest})
    )


def test_a_sampler_is_exported_once_and_anew_for_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_fingerprint: Any
) -> None:
    kept, export, exported = ContentCache(tmp_path / "cache"), extras._export, list[Path]()

    def counted(source: SamplerSource, path: Path) -> None:
        exported.append(source.folder)
        if len(exported) == 1:
            export(source, path)
        else:
            path.write_bytes(b"another")

    monkeypatch.setattr(extras, "_export", counted)
    it = a_sampler(tmp_path / "it", 0)
    write_sampler(it, tmp_path / "one.onnx", kept)
    # its weights are not read again
    write_sampler(replace(it, folder=tmp_path / "gone"), tmp_path / "two.onnx", kept)
    assert exported == [it.folder]
    onnx.checker.check_model(str(tmp_path / "one.onnx"), full_check=True)
    assert (tmp_path / "two.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()
    # heads leave the weights as they are
    others = [a_sampler(tmp_path / "seed", 1), a_sampler(tmp_path / "heads", 0, num_heads=4)]
    others.append(replace(it, record=it.record.model_copy(update={"vocab_size": 119})))
    for other in others:
        write_sampler(other, tmp_path / "other.onnx", kept)
        assert exported[-1] == other.folder
    assert len(exported) == 4
    monkeypatch.setattr(fingerprint, "LIBRARIES", fingerprint.LIBRARIES[1:])
    fresh_fingerprint.cache_clear()
    write_sampler(it, tmp_path / "other.onnx", kept)
    assert len(exported) == 5


def test_a_sampler_that_fails_to_export_leaves_no_entry(tmp_path: Path) -> None:
    it, kept = a_sampler(tmp_path / "it", 0), ContentCache(tmp_path / "cache")
    wrong = replace(
        it, record=it.record.model_copy(update={"shape": ShapeRecord(**{**SHAPE, "num_layers": 2})})
    )
    with pytest.raises(CheckpointError, match="expected the tensors that"):
        write_sampler(wrong, tmp_path / "out.onnx", kept)
    assert kept.usage() == (0, 0)
    assert not (tmp_path / "out.onnx").exists()

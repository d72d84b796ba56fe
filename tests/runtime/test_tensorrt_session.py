"""The TensorRT session: its plans, its calls against the installed libraries, and the whole of it
over a GPU acted out in host memory.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import host_gpu
import numpy as np
import onnx
import pytest
from conftest import Built
from host_gpu import MAGIC, HostCuda, HostDriver, host_tensorrt
from hypothesis import given
from hypothesis import strategies as st
from once import TracedOnce
from prefix_checks import check_forwards_behind_a_prefix, check_random_copies, check_refusals
from safetensors.torch import load_file, save_file

from trimode import Engine
from trimode.compiler.passes.base import lower, to_bytes
from trimode.compiler.passes.join_graphs import JoinGraphs
from trimode.compiler.passes.recipes import lower_for
from trimode.compiler.tensorrt.profiles import plan_capacity
from trimode.errors import BundleError, DependencyError, DeviceError, UsageError
from trimode.formats.contract import GRAPH_NAMES, GraphName, TensorSpec, cache_specs, graph_contract
from trimode.formats.manifest import CapacityRecord, EngineRecord, ProfileRecord, TargetRecord
from trimode.graphs.checkpoint import open_checkpoint
from trimode.runtime.bundle.open import Bundle, read_manifest
from trimode.runtime.bundle.weights import WeightPack
from trimode.runtime.engine.batch import BatchRequest
from trimode.runtime.model import TriModeModel
from trimode.runtime.sessions import gpu as device
from trimode.runtime.sessions.gpu import Gpu, NoGpu
from trimode.runtime.sessions.ort.session import OrtSession
from trimode.runtime.sessions.tensorrt import memory as tensorrt_memory
from trimode.runtime.sessions.tensorrt.plan import (
    EngineTensor,
    MemoryPlan,
    check_memory,
    choose_profile,
    describe_rows,
    lay_out,
    lay_out_cache,
    lay_out_io,
    max_rows,
    plan_bindings,
    query_bytes,
    tensor_bytes,
)
from trimode.runtime.sessions.tensorrt.session import TensorRTSession
from trimode.runtime.sessions.tensorrt.target import check_gpu, check_library, prepare

VERSION = "1.7.1.116"
BLOCK_LENGTHS = (1, 2, 8, 32)
SHAPE = "three_kv_heads"
ALL_GRAPH_NAMES: tuple[GraphName, ...] = (*GRAPH_NAMES, "quadratic")


def profiles(
    *ranges: tuple[int, int, int], batch: tuple[int, int, int] = (1, 1, 4)
) -> EngineRecord:
    return EngineRecord(
        file="x", profiles=tuple(ProfileRecord(batch=batch, rows=rows) for rows in ranges)
    )


BLOCKS = profiles(*((n, n, n) for n in BLOCK_LENGTHS))
PROFILES = {
    "ar": profiles((1, 1, 2), (1, 100, 100)),
    "draft": BLOCKS,
    "verify": BLOCKS,
    "quadratic": profiles(*((n, n, n) for n in BLOCK_LENGTHS[:-1])),
}


def record_of(
    backend: Any = "tensorrt_rtx", dtype: Any = "float32", placement: Any = "shared", **changes: Any
) -> TargetRecord:
    graphs = {
        graph_name: EngineRecord(
            file=f"{graph_name}.{backend}.{dtype}.{placement}",
            profiles=PROFILES[graph_name].profiles,
        )
        for graph_name in ALL_GRAPH_NAMES
    }
    values = {
        "backend": backend,
        "device": "cuda",
        "compute_capability": "8.9",
        "compute_dtype": dtype,
        "placement": placement,
        "capacity": 1088,
        "workspace_mib": None,
        "library": f"{backend} {VERSION}",
        "graphs": graphs,
        **changes,
    }
    return TargetRecord(**values)


def joint_record(dtype: Any = "float32") -> TargetRecord:
    """One engine for three graphs, with the profiles of ``ar`` first."""
    record = record_of(dtype=dtype)
    joint = {
        graph_name: EngineRecord(
            file=f"joint.{dtype}",
            profiles=PROFILES[graph_name].profiles,
            first_profile=0 if graph_name == "ar" else len(PROFILES["ar"].profiles),
        )
        for graph_name in GRAPH_NAMES
    }
    return record.model_copy(update={"graphs": {**record.graphs, **joint}})


def with_capacities(record: TargetRecord) -> TargetRecord:
    """The same with engines for texts of up to 40 and up to 200 tokens."""
    smaller = tuple(
        CapacityRecord(
            max_length=length,
            capacity=capacity,
            graphs={
                graph_name: EngineRecord(file=f"{engine.file}-{capacity}", profiles=engine.profiles)
                for graph_name, engine in record.graphs.items()
            },
        )
        for length, capacity in ((40, 128), (200, 320))
    )
    return record.model_copy(update={"smaller": smaller})


@dataclass(frozen=True)
class Host:
    """A bundle with engines for the acted-out GPU, and what to compare them with."""

    cuda: HostCuda
    libraries: dict[str, Any]
    bundles: dict[str, Bundle]
    references: dict[str, TriModeModel]

    def session(self, record: TargetRecord, **options: Any) -> TensorRTSession:
        return TensorRTSession(self.bundles[record.compute_dtype], record, **options)

    def model(self, record: TargetRecord, **options: Any) -> TriModeModel:
        return TriModeModel(self.bundles[record.compute_dtype], self.session(record, **options))

    def look(self, cache: Any) -> list[Any]:
        """Keys and values of a cache as they lie on the GPU."""
        self.cuda.cudaStreamSynchronize(0)
        places, like = cache.memory, cache.slots.empty(cache.capacity)
        found = []
        for offset in places.cache.layout.offsets.values():
            size = like[0].nbytes * cache.num_rows
            memory = (ctypes.c_uint8 * size).from_address(places.keys_values.address + offset)
            found.append(np.frombuffer(memory, like.dtype).reshape(-1, *like.shape[1:]))
        return found

    def contexts(self, record: TargetRecord) -> list[Any]:
        return [
            context
            for engine in self.libraries[record.backend].engines
            for context in engine.contexts
        ]


@pytest.fixture(scope="session")
def graphs(quadratic: Callable[[str], Built], traced_once: TracedOnce) -> dict[GraphName, Any]:
    """As traced."""
    opened = open_checkpoint(quadratic(SHAPE).checkpoint)
    return {
        graph_name: traced_once.graph(graph_name, opened, quadratic(SHAPE).model.model)
        for graph_name in ALL_GRAPH_NAMES
    }


@pytest.fixture(scope="session")
def bundles(
    quadratic: Callable[[str], Built],
    graphs: dict[GraphName, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Bundle]:
    """The engines of every kind of target, in one bundle for each type of the weights."""
    folder = tmp_path_factory.mktemp("engines")
    for dtype in ("float32", "float16"):
        shutil.copytree(quadratic(SHAPE).bundle, folder / dtype)
    narrow = {
        n: t if n.startswith("rope.") else t.half()
        for n, t in load_file(folder / "float16" / "weights.safetensors").items()
    }
    save_file(narrow, folder / "float16" / "weights.safetensors")
    for graph_name, graph in graphs.items():
        several = (
            record_of(),
            record_of(dtype="float16"),
            record_of("tensorrt"),
        )
        for record in (one for each in several for one in with_capacities(each).by_capacity()):
            (folder / record.compute_dtype / record.graphs[graph_name].file).write_bytes(
                MAGIC + to_bytes(lower_for(record, graph))
            )
        baked = record_of(placement="baked").graphs[graph_name].file
        (folder / "float32" / baked).write_bytes(
            MAGIC + with_weights(folder / "float32" / f"{graph_name}.onnx")
        )
    for record in (joint_record(), joint_record("float16")):
        graph = lower_for(record, lower(graphs["draft"], JoinGraphs()))
        path = folder / record.compute_dtype / record.graphs["ar"].file
        path.write_bytes(MAGIC + to_bytes(graph))
    return {
        dtype: Bundle(folder / dtype, read_manifest(folder / dtype), "fp32")
        for dtype in ("float32", "float16")
    }


def with_weights(path: Path) -> bytes:
    graph = onnx.load(path)
    for value in (*graph.graph.input, *graph.graph.output):
        if value.name.startswith(("past_key_values", "present")):
            value.type.tensor_type.shape.dim[2].dim_value = 1088
    del graph.graph.value_info[:]
    return graph.SerializeToString()


@pytest.fixture(scope="session")
def references(bundles: dict[str, Bundle], graphs: dict[GraphName, Any]) -> dict[str, TriModeModel]:
    """The same graphs in ONNX Runtime."""
    bundle = bundles["float16"]
    files = {
        graph_name: EngineRecord(file=f"{graph_name}.reference") for graph_name in ALL_GRAPH_NAMES
    }
    half = record_of(
        "onnxruntime",
        "float16",
        device="cpu",
        compute_capability=None,
        capacity=None,
        library="any",
        graphs=files,
    )
    for graph_name, graph in graphs.items():
        (bundle.path / files[graph_name].file).write_bytes(to_bytes(lower_for(half, graph)))
    return {
        "float32": TriModeModel(bundles["float32"], OrtSession(bundles["float32"], None, 1)),
        "float16": TriModeModel(bundle, OrtSession(bundle, half, 1)),
    }


@pytest.fixture
def host(
    bundles: dict[str, Bundle], references: dict[str, TriModeModel], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Host]:
    cuda = HostCuda()
    libraries = {name: host_tensorrt(cuda, name, VERSION) for name in ("tensorrt_rtx", "tensorrt")}
    for name, module in {
        "cuda.bindings.runtime": cuda,
        "cuda.bindings.driver": HostDriver(),
        **libraries,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    device.cudart.cache_clear()
    yield Host(cuda, libraries, bundles, references)
    for library in libraries.values():
        library.engines.clear()
    gc.collect()
    assert not cuda.live, "everything is given back"
    device.cudart.cache_clear()


RECORDS = {
    "rtx": record_of(),
    "rtx half": record_of(dtype="float16"),
    "full": record_of("tensorrt"),
    "baked": record_of(placement="baked"),
    "joint": joint_record(),
    "joint half": joint_record("float16"),
}
SEVERAL = {kind: with_capacities(RECORDS[kind]) for kind in ("rtx", "rtx half", "full")}


def prompt_of(length: int) -> list[list[int]]:
    return [np.random.default_rng(length).integers(12, 100, length).tolist()]


@pytest.mark.parametrize("kind", RECORDS)
def test_tokens_are_those_of_onnx_runtime(host: Host, kind: str) -> None:
    ours, reference = host.model(RECORDS[kind]), host.references[RECORDS[kind].compute_dtype]
    for length in (1, 7, 350):
        prompt = prompt_of(length)
        assert np.array_equal(
            ours.ar_generate(prompt, max_new_tokens=20)[0],
            reference.ar_generate(prompt, max_new_tokens=20)[0],
        )
        for block_length in BLOCK_LENGTHS:
            for threshold in (0.0, 0.9):
                options: dict[str, Any] = {
                    "max_new_tokens": 20,
                    "block_length": block_length,
                    "threshold": threshold,
                }
                for name in ("generate", "linear_spec_generate"):
                    (got, nfe), (expected, expected_nfe) = (
                        getattr(ours, name)(prompt, **options),
                        getattr(reference, name)(prompt, **options),
                    )
                    assert (got.tolist(), nfe) == (expected.tolist(), expected_nfe)
    ours.close()


@pytest.mark.parametrize("kind", RECORDS)
def test_quadratic_tokens_are_those_of_onnx_runtime(host: Host, kind: str) -> None:
    ours, reference = host.model(RECORDS[kind]), host.references[RECORDS[kind].compute_dtype]
    for length in (1, 350):
        for block_length in BLOCK_LENGTHS[:-1]:
            got, expected = (
                model.self_spec_generate(prompt_of(length), 20, block_length)
                for model in (ours, reference)
            )
            assert (got[0].tolist(), got[1]) == (expected[0].tolist(), expected[1])
    with pytest.raises(UsageError, match=r"built for \(1, 2, 8\), found 32"):
        ours.self_spec_generate(prompt_of(3), 20, 32)
    # a text of 1024 leaves too few slots behind it
    with pytest.raises(UsageError, match="at most 1088 tokens"):
        ours.self_spec_generate(prompt_of(1020), 3, 8)
    ours.close()


def test_prompt_chunks_fit_the_largest_profile(host: Host) -> None:
    model = host.model(RECORDS["rtx"])
    assert model.session.max_prefill_rows == 100
    stream = model.stream(prompt_of(350), "ar", max_new_tokens=1)
    list(stream)
    assert stream.result.prefill_forwards == 4


def test_logits_stay_until_asked_for(host: Host) -> None:
    outputs = {}
    for name, model in (
        ("ours", host.model(RECORDS["rtx"])),
        ("reference", host.references["float32"]),
    ):
        cache = model.session.new_cache()
        model.session.run("ar", cache, np.array(prompt_of(40)), 0)
        outputs[name] = model.session.run("verify", cache, np.array(prompt_of(8)), 40)
    greedy, accepted, logits = outputs["ours"]
    assert logits.shape == (1, 8, host.references["float32"].model.vocab_size)
    assert type(logits) is not np.ndarray
    np.testing.assert_array_equal(np.asarray(logits), outputs["reference"][2])
    np.testing.assert_array_equal(logits[0, -1], outputs["reference"][2][0, -1])
    np.testing.assert_array_equal(greedy, np.asarray(logits).argmax(-1))
    np.testing.assert_array_equal(accepted, outputs["reference"][1])
    with pytest.raises(ValueError, match="copy"):
        np.array(logits, copy=False)


def test_one_engine_for_three_graphs(host: Host) -> None:
    """It is loaded once, has one context, and each forward runs under a profile of its graph."""
    record = RECORDS["joint"]
    model = host.model(record)
    assert len(host.libraries["tensorrt_rtx"].engines) == 2  # with that of quadratic_spec
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": 108}
    model.ar_generate(prompt_of(350), **options)
    model.linear_spec_generate(prompt_of(7), block_length=8, **options)
    context, _ = host.contexts(record)
    assert {number for number, rows in context.forwards if rows == 1} == {0}
    assert {rows for number, rows in context.forwards if number == 1} >= {100, 50, 7}
    assert {rows for number, rows in context.forwards if number == 2 + BLOCK_LENGTHS.index(8)} == {
        8
    }


@pytest.mark.parametrize("kind", ["joint", "joint half"])
def test_a_joint_engine_says_what_each_graph_says(host: Host, kind: str) -> None:
    """Every output of every graph, for a batch of ragged rows longer than the window."""
    found = {}
    dtype = RECORDS[kind].compute_dtype
    for name, model in (("ours", host.model(RECORDS[kind])), ("theirs", host.references[dtype])):
        session: Any = model.session
        cache = session.new_batch_cache(2)
        lengths, outputs = np.array([100, 3]), []
        cache.reserve(200)
        ids = np.random.default_rng(0).integers(12, 100, (2, 100))
        outputs.append(session.run_rows("ar", cache, range(2), ids, np.zeros(2, np.int64), lengths))
        block = np.random.default_rng(1).integers(12, 100, (2, 8))
        for graph_name in ("draft", "verify"):
            rows = np.full(2, 8)
            outputs.append(
                session.run_rows(
                    graph_name, cache, range(2), block, lengths, rows, drafter_scale=1.0
                )
            )
        found[name] = [[np.asarray(one) for one in some] for some in outputs]
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            if one.dtype == np.int64 and dtype == "float32":
                np.testing.assert_array_equal(one, other)
            elif one.dtype != np.int64:
                np.testing.assert_allclose(one, other, atol=tolerance)


def test_full_tensorrt_replays_recorded_blocks(host: Host) -> None:
    model = host.model(RECORDS["full"])
    first = model.linear_spec_generate(
        prompt_of(7), max_new_tokens=60, block_length=8, eos_token_id=108
    )[0]
    replayed = host.cuda.num_replayed
    assert replayed > 4
    contexts = len(host.contexts(RECORDS["full"]))
    # The next sequence takes over the memory of the first, and what was recorded over it.
    assert np.array_equal(
        model.linear_spec_generate(
            prompt_of(7), max_new_tokens=60, block_length=8, eos_token_id=108
        )[0],
        first,
    )
    assert len(host.contexts(RECORDS["full"])) == contexts
    assert host.cuda.num_replayed > 2 * replayed


def test_what_cannot_be_recorded_runs_step_by_step(host: Host) -> None:
    host.cuda.refuses_recording = True
    ours = host.model(RECORDS["full"]).generate(prompt_of(7), max_new_tokens=20, block_length=8)[0]
    assert host.cuda.num_replayed == 0
    assert np.array_equal(
        ours,
        host.references["float32"].generate(prompt_of(7), max_new_tokens=20, block_length=8)[0],
    )


def test_profiles_are_switched_only_when_they_change(host: Host) -> None:
    model = host.model(RECORDS["rtx"])
    model.ar_generate(prompt_of(30), max_new_tokens=20, eos_token_id=108)
    model.ar_generate(prompt_of(30), max_new_tokens=20, eos_token_id=108)
    switches = sorted(context.num_profile_switches for context in host.contexts(RECORDS["rtx"]))
    assert switches == [0, 0, 0, 4]  # the quadratic graph was not asked


def test_sequences_in_turns_and_in_threads(host: Host) -> None:
    model, reference = host.model(RECORDS["full"]), host.references["float32"]
    prompts = [[[20 + i, 30, 40]] for i in range(6)]
    alone = [
        reference.linear_spec_generate(p, max_new_tokens=40, block_length=8)[0].tolist()
        for p in prompts
    ]
    streams = [model.stream(p, "linear_spec", max_new_tokens=40, block_length=8) for p in prompts]
    tokens = [list(p[0]) for p in prompts]
    for _ in range(41):
        for stream, so_far in zip(streams, tokens, strict=True):
            so_far += next(stream, ([], None))[0]
    assert [[t] for t in tokens] == alone
    del streams, stream
    gc.collect()
    with ThreadPoolExecutor(3) as pool:
        assert (
            list(
                pool.map(
                    lambda p: model.linear_spec_generate(p, max_new_tokens=40, block_length=8)[
                        0
                    ].tolist(),
                    prompts,
                )
            )
            == alone
        )


def test_memory_of_finished_sequences_is_used_again(host: Host) -> None:
    model = host.model(RECORDS["rtx"])
    model.ar_generate(prompt_of(5), max_new_tokens=3)
    gc.collect()
    held = len(host.cuda.live)
    for _ in range(3):
        model.ar_generate(prompt_of(5), max_new_tokens=3)
        gc.collect()
    assert len(host.cuda.live) == held
    both = [model.new_sequence(prompt_of(5)), model.new_sequence(prompt_of(6))]
    assert len(host.cuda.live) == held + 1
    del both


@pytest.mark.parametrize("kind", RECORDS)
def test_rows_of_a_batch_equal_single_runs(host: Host, kind: str) -> None:
    """Ragged rows in all modes, which leave and are replaced; forwards over all of them, some, and
    some with idle ones between.
    """
    ours, reference = host.model(RECORDS[kind]), host.references[RECORDS[kind].compute_dtype]
    modes: list[Any] = ["ar", "diffusion", "linear_spec", "quadratic_spec"] * 2
    lengths = [1, 350, 7, 40, 2, 100, 90, 8]
    options: dict[str, Any] = {"block_length": 8, "eos_token_ids": ()}
    batch = ours.new_batch(4)
    found: dict[int, Any] = {}
    requests = [
        BatchRequest(prompt_of(n)[0], m, {**options, "max_new_tokens": 12 + n % 30})
        for n, m in zip(lengths, modes, strict=True)
    ]
    for number, row, _ in batch.answer_all(requests):
        found[number] = row
    for number, (length, mode) in enumerate(zip(lengths, modes, strict=True)):
        alone = reference.stream(
            prompt_of(length), mode, **options, max_new_tokens=12 + length % 30
        ).finish()
        result = found[number].result
        assert (result.token_ids, result.nfe, result.acceptance_length) == (
            alone.token_ids,
            alone.nfe,
            alone.acceptance_length,
        )
    del batch, row, found
    ours.close()


@pytest.mark.parametrize("kind", ["rtx", "full"])
def test_sampled_rows_read_their_own_logits(host: Host, kind: str) -> None:
    """Behind a longer row than theirs, after other rows' forwards, and after they have moved."""
    ours, reference = host.model(RECORDS[kind]), host.references["float32"]
    for mode in ("ar", "diffusion", "linear_spec"):
        options: dict[str, Any] = {
            "block_length": 8,
            "eos_token_ids": (),
            "temperature": 1.0,
            "max_new_tokens": 25,
            "logprobs": 2,
        }
        batch = ours.new_batch(4)
        rows = {
            seed: batch.add(prompt_of(3 * seed + 4)[0], mode, seed=seed, **options)
            for seed in range(4)
        }  # type: ignore[arg-type]
        for _ in range(5):
            batch.step()
        batch.finish(rows.pop(1))
        list(batch)
        for seed, row in rows.items():
            alone = reference.stream(prompt_of(3 * seed + 4), mode, seed=seed, **options).finish()  # type: ignore[arg-type]
            assert row.result.token_ids == alone.token_ids
            for one, other in zip(row.result.logprobs or (), alone.logprobs or (), strict=True):
                assert [token for token, _ in one.top] == [token for token, _ in other.top]
                assert one.logprob == (
                    None if other.logprob is None else pytest.approx(other.logprob, abs=1e-4)
                )
    del batch, rows, row
    ours.close()


@pytest.mark.parametrize("kind", ["rtx", "rtx half", "full"])
def test_copied_prefixes(host: Host, kind: str) -> None:
    """Within a cache, between two, and through host memory, while nothing waits for the GPU."""
    session = host.session(RECORDS[kind])
    caches = [session.new_batch_cache(rows) for rows in (3, 1, 2)]
    check_random_copies(caches, host.look, 4, 12)
    assert session.capacity_for(7) == caches[0].capacity == 1088
    del caches
    check_forwards_behind_a_prefix(session, ("ar", "draft", "verify", "quadratic"))
    session.close()


@pytest.mark.parametrize("kind", SEVERAL)
def test_copied_prefixes_between_capacities(host: Host, kind: str) -> None:
    session = host.session(SEVERAL[kind])
    caches = [session.new_batch_cache(rows) for rows in (3, 1, 2)]
    for cache, length in zip(caches, (1, 129, 321), strict=True):
        assert cache.capacity == 0
        cache.reserve(length)
        assert cache.capacity == session.capacity_for(length)
    assert [cache.capacity for cache in caches] == [128, 320, 1088]
    check_random_copies(caches, host.look, 5, 12)
    del caches, cache
    check_forwards_behind_a_prefix(session, ("ar", "draft", "verify", "quadratic"))
    session.close()


@pytest.mark.parametrize("kind", SEVERAL)
def test_texts_move_to_larger_capacities(host: Host, kind: str) -> None:
    """Through all of them, in every mode, from prompts on both sides of a boundary."""
    ours, reference = host.model(SEVERAL[kind]), host.references[SEVERAL[kind].compute_dtype]
    modes: list[Any] = ["ar", "diffusion", "linear_spec", "quadratic_spec"]
    for mode, length in zip(modes * 2, (3, 40, 41, 120, 128, 129, 200, 201), strict=True):
        options: dict[str, Any] = {"block_length": 8, "eos_token_ids": (), "max_new_tokens": 260}
        found, expected = (
            model.stream(prompt_of(length), mode, **options).finish() for model in (ours, reference)
        )
        assert (found.token_ids, found.nfe) == (expected.token_ids, expected.nfe)
    ours.close()


@pytest.mark.parametrize("kind", SEVERAL)
def test_batches_move_to_larger_capacities(host: Host, kind: str) -> None:
    """All rows of it, when one of them has grown; rows leave and others join on the way."""
    ours, reference = host.model(SEVERAL[kind]), host.references[SEVERAL[kind].compute_dtype]
    modes: list[Any] = ["ar", "linear_spec", "diffusion", "quadratic_spec"]
    lengths = [5, 30, 20, 100, 190, 2, 300, 7]
    options: dict[str, Any] = {"block_length": 8, "eos_token_ids": (), "max_new_tokens": 100}
    batch = ours.new_batch(3)
    requests = [
        BatchRequest(prompt_of(n)[0], mode, options)
        for n, mode in zip(lengths, modes * 2, strict=True)
    ]
    found = {number: row for number, row, _ in batch.answer_all(requests)}
    for number, (length, mode) in enumerate(zip(lengths, modes * 2, strict=True)):
        alone = reference.stream(prompt_of(length), mode, **options).finish()
        assert (found[number].result.token_ids, found[number].result.nfe) == (
            alone.token_ids,
            alone.nfe,
        )
    del batch, found
    ours.close()


@pytest.mark.parametrize("kind", [*SEVERAL, "one capacity"])
def test_an_engine_reuses_prefixes_and_moves_rows(host: Host, kind: str) -> None:
    """Prompts with common beginnings: the first at work, ended, and in another capacity."""
    record = RECORDS["rtx"] if kind == "one capacity" else SEVERAL[kind]
    ours, reference = host.model(record), host.references[record.compute_dtype]
    modes: list[Any] = ["ar", "linear_spec", "diffusion", "quadratic_spec"]
    options: dict[str, Any] = {"block_length": 8, "eos_token_ids": (), "max_new_tokens": 60}
    stem = prompt_of(300)[0]
    prompts = [[*stem[:n], 20 + n % 50] for n in (3, 40, 119, 130, 290, 40, 300, 119)]
    with Engine(ours, max_rows=4) as engine:
        handles = [
            engine.submit(prompt, mode=mode, **options)
            for prompt, mode in zip(prompts, modes * 2, strict=True)
        ]
        for handle, prompt, mode in zip(handles, prompts, modes * 2, strict=True):
            alone = reference.stream([prompt], mode, **options).finish()
            assert (handle.result().token_ids, handle.result().nfe) == (alone.token_ids, alone.nfe)
        assert engine.stats().hits >= 5
    ours.close()


def test_a_capacity_takes_memory_when_a_text_needs_it(host: Host) -> None:
    """Its contexts too; a prompt goes to its capacity at once, and an answer moves by one copy of
    all tensors.
    """
    record, num_graphs = SEVERAL["rtx"], len(ALL_GRAPH_NAMES)
    session = host.session(record)
    assert len(host.contexts(record)) == num_graphs
    model = TriModeModel(host.bundles["float32"], session)
    tensors = 2 * model.model.num_hidden_layers

    def answer(length: int, count: int) -> tuple[int, int]:
        before, bytes_before = host.cuda.num_line_copies, host.cuda.num_bytes
        sequence = model.new_sequence(prompt_of(length))
        options: dict[str, Any] = {"max_new_tokens": count, "eos_token_ids": ()}
        model.continue_sequence(sequence, "ar", **options).finish()
        return host.cuda.num_line_copies - before, host.cuda.num_bytes - bytes_before

    slots = [128, 320, 1088]
    sizes = [session.new_cache().bytes_per_token * capacity for capacity in slots]
    copies, taken = answer(40, 5)
    assert (copies, len(host.contexts(record))) == (0, num_graphs)
    assert sizes[0] <= taken < sizes[1]
    copies, taken = answer(41, 5)  # would fit the slots, but not with every block
    assert (copies, len(host.contexts(record))) == (0, 2 * num_graphs)
    assert sizes[1] <= taken < sizes[2]
    copies, taken = answer(30, 120)
    assert (copies, taken) == (tensors, 0), "the memory of the two before"
    copies, taken = answer(350, 3)
    assert (copies, len(host.contexts(record))) == (0, 3 * num_graphs)
    assert taken >= sizes[2]
    with pytest.raises(UsageError, match=r"at most 1088 tokens.*found 1089"):
        session.new_cache().reserve(1089)
    assert session.capacity_for(1088) == 1088
    with pytest.raises(UsageError, match=r"at most 1088 tokens.*found 1089"):
        session.capacity_for(1089)
    model.close()


def test_logits_outlive_a_move(host: Host) -> None:
    """Nobody else gets the memory that they lie in before they are gone."""
    session = host.session(SEVERAL["rtx"])
    cache = session.new_cache()
    _, logits = session.run("ar", cache, np.array(prompt_of(30)), 0)
    expected = np.array(logits)
    cache.reserve(300)
    other = session.new_cache()
    session.run("ar", other, np.array(prompt_of(29)), 0)
    np.testing.assert_array_equal(np.asarray(logits), expected)
    live = len(host.cuda.live)
    del logits
    third = session.new_cache()
    third.reserve(1)
    assert len(host.cuda.live) == live, "the memory is free now"
    del cache, other, third
    session.close()


def test_unused_memory_makes_room(host: Host) -> None:
    session = host.session(SEVERAL["rtx"])
    for rows in (1, 2, 4):
        session.new_batch_cache(rows).reserve(1)
    large = session.new_cache()
    held = host.cuda.num_bytes
    host.cuda.properties.totalGlobalMem = held + 1000 * large.bytes_per_token
    large.reserve(1088)
    assert host.cuda.num_bytes < held + 1000 * large.bytes_per_token
    with pytest.raises(DeviceError, match="for the cache of 4 sequences"):
        session.new_batch_cache(4).reserve(1088)
    assert large.capacity == 1088
    session.run("ar", large, np.array(prompt_of(30)), 0)
    del large
    session.close()


def test_a_gpu_is_large_enough_for_the_smallest_capacity(host: Host) -> None:
    one, several = (
        prepare(host.bundles["float32"], record).memory
        for record in (RECORDS["rtx"], SEVERAL["rtx"])
    )
    assert one.cache * 128 == several.cache * 1088
    assert several.engines > 2 * one.engines
    assert (several.weights, several.io) == (one.weights, one.io)


def test_copies_are_queued_in_lines(host: Host) -> None:
    session = host.session(RECORDS["rtx"])
    cache, model = session.new_batch_cache(3), host.references["float32"].model
    for length in (0, 5):
        cache.copy_prefix(0, 2, length)
        cache.copy_prefix(1, 1, length)
    assert host.cuda.num_line_copies == 2 * model.num_hidden_layers
    assert len(host.cuda.queue) >= host.cuda.num_line_copies, "nobody has waited"
    width = cache.bytes_per_token // (2 * model.num_hidden_layers)
    assert width == model.num_key_value_heads * model.head_dim * 4
    del cache
    session.close()


def test_copies_that_are_refused(host: Host) -> None:
    session, another = host.session(RECORDS["rtx"]), host.session(RECORDS["rtx"])
    cache, other = session.new_batch_cache(2), another.new_batch_cache(2)
    check_refusals(cache, other)
    session.close()
    calls: list[Callable[[], object]] = [
        lambda: cache.copy_prefix(0, 1, 3),
        lambda: cache.export_prefix(0, 0, 3),
        lambda: cache.import_prefix(0, 0, other.export_prefix(0, 0, 3)),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="expected an open model"):
            call()
    another.close()


def test_full_tensorrt_replays_whole_batches(host: Host) -> None:
    model = host.model(RECORDS["full"])
    prompts = [prompt_of(n)[0] for n in (5, 6, 7)]
    options: dict[str, Any] = {"max_new_tokens": 30, "block_length": 8, "eos_token_ids": ()}
    first = model.generate_batch(prompts, "linear_spec", **options)
    gc.collect()
    replayed, contexts = host.cuda.num_replayed, len(host.contexts(RECORDS["full"]))
    assert replayed > 4
    second = model.generate_batch(prompts, "linear_spec", **options)
    assert [one.token_ids for one in second] == [one.token_ids for one in first]
    assert len(host.contexts(RECORDS["full"])) == contexts
    assert host.cuda.num_replayed > 2 * replayed


def test_a_batch_larger_than_was_built_for(host: Host) -> None:
    with pytest.raises(UsageError, match=r"at most 4 rows.*found 5") as raised:
        host.model(RECORDS["rtx"]).new_batch(5)
    assert "a larger `max_batch`" in raised.value.hint


def test_sequences_begin_where_tensors_may(host: Host) -> None:
    model = host.references["float32"].model.model_copy(
        update={"num_key_value_heads": 1, "head_dim": 24}
    )
    for capacity in (1088, 1089):
        assert lay_out_cache(model, "float16", capacity, 1).batch == 1
    layout = lay_out_cache(model, "float16", 1088, 3)
    assert layout.sequence_bytes == 24 * 1088 * 2
    assert layout.layout.offsets[".0.value"] == 3 * layout.sequence_bytes
    with pytest.raises(UsageError, match="capacity 1089"):
        lay_out_cache(model, "float16", 1089, 2)
    odd = model.model_copy(update={"max_length": 1001})
    assert (plan_capacity(GRAPH_NAMES, odd, (8,)), plan_capacity(GRAPH_NAMES, odd, (8,), 4)) == (
        1065,
        1088,
    )


def test_weights_travel_in_pieces(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    # several pieces a tensor, the last one short
    monkeypatch.setattr(tensorrt_memory, "CHUNK_BYTES", 1000)
    model = host.model(RECORDS["rtx"])
    assert host.cuda.largest_copy == 1000
    assert np.array_equal(
        model.ar_generate(prompt_of(7))[0], host.references["float32"].ar_generate(prompt_of(7))[0]
    )


def test_baked_engines_take_no_weights(host: Host) -> None:
    shared, baked = host.session(RECORDS["rtx"]), host.session(RECORDS["baked"])
    assert shared._weights.num_bytes > 10000
    assert baked._weights.num_bytes == 0


def test_compiled_kernels_are_kept(host: Host, tmp_path: Path) -> None:
    for i in range(2):
        model = host.model(RECORDS["rtx"], runtime_cache=tmp_path / "kernels")
        model.ar_generate(prompt_of(3), max_new_tokens=2)
        model.close()
        assert [(p.name, p.read_bytes()) for p in sorted((tmp_path / "kernels").iterdir())] == [
            (f"{graph_name}.kernels", b"kernels:+" + b"+" * i)
            for graph_name in sorted(ALL_GRAPH_NAMES)
        ]
    (tmp_path / "kernels" / "ar.kernels").write_bytes(b"of another machine")
    host.model(RECORDS["rtx"], runtime_cache=tmp_path / "kernels").close()
    assert (tmp_path / "kernels" / "ar.kernels").read_bytes() == b"kernels:+"


def test_compiled_kernels_are_kept_for_each_capacity(host: Host, tmp_path: Path) -> None:
    host.model(SEVERAL["rtx"], runtime_cache=tmp_path).close()
    names = {
        f"{graph_name}{suffix}.kernels"
        for graph_name in ALL_GRAPH_NAMES
        for suffix in ("", "-40", "-200")
    }
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_library_that_compiles_no_kernels_keeps_none(host: Host, tmp_path: Path) -> None:
    host.model(RECORDS["full"], runtime_cache=tmp_path / "kernels").close()
    assert not (tmp_path / "kernels").exists()


def test_block_lengths_that_were_not_built(host: Host) -> None:
    model = host.model(RECORDS["rtx"])
    for call in (model.generate, model.linear_spec_generate):
        with pytest.raises(UsageError, match=r"built for \(1, 2, 8, 32\), found 16"):
            call(prompt_of(5), block_length=16)
    with pytest.raises(UsageError, match="found 16"):
        model.stream(prompt_of(5), "diffusion", block_length=16)
    model.stream(prompt_of(5), "ar", block_length=16)
    cache = model.session.new_cache()
    with pytest.raises(UsageError, match=r"1, 2, 8, 32.*found 3"):
        model.session.run("verify", cache, np.ones((1, 3), np.int64), 0)
    with pytest.raises(UsageError, match=r"1 to 2, 1 to 100.*found 101"):
        model.session.run("ar", cache, np.ones((1, 101), np.int64), 0)


def test_a_text_longer_than_the_cache(host: Host) -> None:
    cache = host.session(RECORDS["rtx"]).new_cache()
    cache.reserve(1088)
    with pytest.raises(UsageError, match=r"at most 1088 tokens.*found 1089"):
        cache.reserve(1089)


def test_errors_before_and_on_the_gpu(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RECORDS["rtx"]
    with pytest.raises(DeviceError, match=r"compute capability 12\.0, found HOST 4090 of 8\.9"):
        host.session(record_of(compute_capability="12.0"))
    with pytest.raises(
        BundleError,
        match=(
            r"expected tensorrt_rtx 1\.6, which compiled the engines, found tensorrt_rtx "
            r"1\.7\.1\.116"
        ),
    ):
        host.session(record_of(library="tensorrt_rtx 1.6"))
    short = host.bundles["float32"].path / "short"
    graphs = {
        **record.graphs,
        "draft": EngineRecord(file="short", profiles=record.graphs["draft"].profiles),
    }
    for content, message in (
        (b"", "begins with b''"),
        (b"ONNX" * 9, "begins with b'ONNX'"),
        (MAGIC, "refuses the engine: Serialization assertion failed\nhint"),
    ):
        short.write_bytes(content)
        with pytest.raises(BundleError, match=message):
            host.session(record_of(graphs=graphs))
    short.unlink()
    with pytest.raises(BundleError, match="found none"):
        host.session(record_of(graphs=graphs))
    host.cuda.properties.totalGlobalMem = 1 << 20
    with pytest.raises(DeviceError, match=r"GPU memory \(weights .* on HOST 4090"):
        host.session(record)
    needed = prepare(host.bundles["float32"], record).memory
    host.cuda.properties.totalGlobalMem = needed.total
    session = host.session(record)
    kept = [session.new_cache()]
    with pytest.raises(
        DeviceError,
        match=r"cudaMalloc of \d+ bytes for the cache of a sequence.*cudaErrorMemoryAllocation",
    ) as raised:
        kept.extend(iter(session.new_cache, None))
    assert "free memory" in raised.value.hint
    monkeypatch.setattr(host_gpu.IExecutionContext, "execute_async_v3", lambda *_: False)
    host.cuda.properties.totalGlobalMem = 1 << 40
    with pytest.raises(DeviceError, match="expected tensorrt_rtx to run ar, found: no message"):
        session.run("ar", kept[0], np.ones((1, 1), np.int64), 0)


# Plans


@given(st.dictionaries(st.text(max_size=5), st.integers(0, 5000), max_size=8))
def test_layouts_are_aligned_and_do_not_overlap(sizes: dict[str, int]) -> None:
    layout = lay_out(sizes)
    end = 0
    for name, size in sizes.items():
        assert layout.offsets[name] % 256 == 0
        assert layout.offsets[name] >= end
        end = layout.offsets[name] + size
    assert end <= layout.num_bytes < end + 256


def test_inputs_come_first_and_logits_last(built: Callable[[str], Built]) -> None:
    model = built(SHAPE).model.model
    for graph_name in ALL_GRAPH_NAMES:
        contract = graph_contract(graph_name, model)
        io = lay_out_io(contract, 32)
        for spec in contract.inputs:
            assert io.layout.offsets[spec.name] + tensor_bytes(spec, 32) <= io.inputs_end
        for spec in contract.outputs:
            begin = io.layout.offsets[spec.name]
            assert begin >= (io.copied_end if spec.name == "logits" else io.inputs_end)
            assert begin + tensor_bytes(spec, 32) <= (
                io.layout.num_bytes if spec.name == "logits" else io.copied_end
            )


def test_queries_share_room_behind_all_else(host: Host) -> None:
    for kind in ("rtx", "rtx half"):
        session = host.session(RECORDS[kind])
        for graph_name, graph in session._graphs[1088].items():
            model, rows = (
                host.references["float32"].model,
                max_rows(RECORDS[kind].graphs[graph_name]),
            )
            assert len(graph.bindings.scratch) == model.num_hidden_layers
            layout = session._prepared.capacities[0].lay_out(3)[1][graph_name].layout
            size = query_bytes(model, RECORDS[kind].compute_dtype, graph_name, rows, 3)
            slots = rows * (rows + 1) if graph_name == "quadratic" else rows
            assert size == 3 * slots * model.num_attention_heads * model.head_dim * (
                2 if "half" in kind else 4
            )
            assert layout.offsets["scratch"] + size <= layout.num_bytes
            assert all(offset <= layout.offsets["scratch"] for offset in layout.offsets.values())
        session.close()
    assert host.session(RECORDS["full"])._graphs[1088]["verify"].bindings.scratch == ()


def test_the_narrowest_profile_is_chosen() -> None:
    record = profiles((1, 512, 512), (1, 1, 1), (8, 8, 8), (4, 8, 64))
    assert [choose_profile(record, rows) for rows in (1, 2, 5, 8, 65, 512)] == [1, 0, 3, 2, 0, 0]
    assert describe_rows(record) == "1, 1 to 512, 4 to 64, 8"
    for bad in (profiles((8, 8, 8)), profiles(), profiles((1, 512, 512), batch=(2, 2, 4))):
        with pytest.raises(UsageError, match="found 9"):
            choose_profile(bad, 9)


def tensors_of(
    graph_name: GraphName, bundle: Bundle, weights: list[str]
) -> tuple[dict[str, EngineTensor], TensorSpec]:
    model, pack = bundle.manifest.model, WeightPack(bundle.path / "weights.safetensors")
    cache = cache_specs(model, "past_key_values", "float32", 64)[0]
    contract = graph_contract(graph_name, model)
    found = [
        EngineTensor(
            s.name,
            s in contract.inputs,
            s.dtype,
            tuple(-1 if isinstance(d, str) else d for d in s.shape),
        )
        for s in (*contract.inputs, *contract.outputs)
    ]
    for prefix in ("past_key_values", "present"):
        found += [
            EngineTensor(s.name, prefix != "present", "float32", (-1, *cache.shape[1:]))
            for s in cache_specs(model, prefix)
        ]  # type: ignore[arg-type]
    found += [
        EngineTensor(name, True, pack.entries[name].dtype, pack.entries[name].shape)
        for name in weights
    ]
    return {tensor.name: tensor for tensor in found}, cache


def test_bindings(built: Callable[[str], Built]) -> None:
    bundle = built(SHAPE).model.bundle
    model, pack = bundle.manifest.model, WeightPack(bundle.path / "weights.safetensors")
    weights = ["rope.cos", "diffusion_head.weight"]
    for graph_name in GRAPH_NAMES:
        tensors, cache = tensors_of(graph_name, bundle, weights)

        def plan(
            changed: dict[str, EngineTensor],
            graph_name: GraphName = graph_name,
            cache: TensorSpec = cache,
        ) -> Any:
            return plan_bindings(
                graph_name,
                changed.values(),
                graph_contract(graph_name, model),
                model,
                cache,
                pack.entries,
            )

        bindings = plan(tensors)
        assert set(bindings.weights) == set(weights)
        assert (
            bindings.caches["past_key_values.1.value"]
            == bindings.caches["present.1.value"]
            == ".1.value"
        )
        assert plan({n: t for n, t in tensors.items() if n != "past_length"}).inputs == tuple(
            n for n in bindings.inputs if n != "past_length"
        )
        query = EngineTensor(
            "scratch.query.1", False, "float32", (-1, model.num_attention_heads, -1, model.head_dim)
        )
        assert plan({**tensors, query.name: query}).scratch == (query.name,)
        for change in (
            {"dtype": "float16"},
            {"shape": (-1, model.num_attention_heads + 1, -1, model.head_dim)},
        ):
            with pytest.raises(BundleError, match=r"expected scratch\.query\.1 to be"):
                plan({**tensors, query.name: EngineTensor(**{**vars(query), **change})})
        for name in ("present.0.key", graph_contract(graph_name, model).outputs[0].name):
            with pytest.raises(
                BundleError, match=f"{graph_name} engine: expected a tensor {name}, found none"
            ):
                plan({n: t for n, t in tensors.items() if n != name})
        changes: dict[str, tuple[dict[str, Any], ...]] = {
            "input_ids": ({"dtype": "float32"}, {"shape": (-1,)}),
            graph_contract(graph_name, model).outputs[0].name: (
                {"dtype": "float32"},
                {"shape": (-1, -1, -1, 7)},
            ),
            "past_key_values.0.key": (
                {"dtype": "float16"},
                {"shape": (*cache.shape, 1)},
                {"shape": (-1, 3, 65, 16)},
            ),
            "rope.cos": ({"dtype": "float16"}, {"shape": (5, 5)}),
        }
        for name, change in (
            (name, change) for name, several in changes.items() for change in several
        ):
            with pytest.raises(BundleError, match=f"expected {name} to be"):
                plan({**tensors, name: EngineTensor(**{**vars(tensors[name]), **change})})
        for extra in (
            EngineTensor("scale", True, "float32", ()),
            EngineTensor("rope.sin", False, "float32", pack.entries["rope.sin"].shape),
        ):
            with pytest.raises(BundleError, match=f"found {extra.name}"):
                plan({**tensors, extra.name: extra})


def test_checks_without_a_gpu() -> None:
    gpu = Gpu("RTX", "8.9", 1 << 30)
    assert check_gpu(record_of(compute_capability=None), gpu) is gpu
    with pytest.raises(
        DeviceError, match=r"compute capability 8\.9, found no GPU \(none\)"
    ) as raised:
        check_gpu(record_of(), NoGpu("none"))
    assert "in order" in raised.value.hint
    check_memory(MemoryPlan(1, 2, 3, 4), gpu)
    with pytest.raises(
        DeviceError,
        match=r"at least 1\.50 GiB of GPU memory \(weights 1\.00, engines 0\.00, cache 0\.50",
    ):
        check_memory(MemoryPlan(0, 1 << 30, 1 << 29, 0), gpu)


def test_the_modules_import_nothing_heavy() -> None:
    heavy = ("torch", "onnx", "onnx_ir", "onnxruntime", "tensorrt_rtx", "tensorrt", "cuda")
    code = (
        f"import sys, trimode.runtime.sessions.tensorrt.session, trimode.runtime.sessions.select; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The installed libraries


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, bundles: dict[str, Bundle]) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError, match="expected the package tensorrt, found") as raised:
        prepare(bundles["float32"], record_of("tensorrt"))
    assert raised.value.hint == "pip install 'trimode[tensorrt]'"


def test_on_a_machine_without_gpu_all_else_is_checked(bundles: dict[str, Bundle]) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings.runtime")
    if isinstance(device.find_gpu(), Gpu):
        pytest.skip("there is a GPU")
    record = record_of(library=f"tensorrt_rtx {trt.__version__}")
    check_library(trt, record)
    with pytest.raises(DeviceError, match="found no GPU"):
        TensorRTSession(bundles["float32"], record)


RUNTIME = Path(tensorrt_memory.__file__).parent
CALLED_ON = {
    "trt": "",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "config": "IRuntimeConfig",
    "_runtime": "Runtime",
}


def attributes(file: str) -> set[tuple[str, str]]:
    """(last name of what it is taken from, attribute) of every attribute in a module of the
    runtime.
    """
    nodes = [
        n for n in ast.walk(ast.parse((RUNTIME / file).read_text())) if isinstance(n, ast.Attribute)
    ]
    owner = {ast.Name: lambda n: n.id, ast.Attribute: lambda n: n.attr}
    return {(owner.get(type(n.value), lambda _: "")(n.value), n.attr) for n in nodes}


def test_every_cuda_name_exists() -> None:
    runtime, driver = (
        pytest.importorskip("cuda.bindings.runtime"),
        importlib.import_module("cuda.bindings.driver"),
    )
    names = {
        a
        for file in ("../gpu.py", "memory.py")
        for _, a in attributes(file)
        if a.startswith(("cuda", "cu")) and a != "cudart"
    }
    enums = (runtime.cudaError_t, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode)
    assert len(names) > 20
    for name in names:
        assert any(hasattr(owner, name) for owner in (runtime, driver, *enums)), name
    for name in ("major", "minor", "name", "totalGlobalMem"):
        assert hasattr(runtime.cudaDeviceProp, name)


def test_every_tensorrt_name_exists() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    seen = set()
    for file in ("graph.py", "library.py"):
        for base, name in attributes(file):
            if base in CALLED_ON:
                owner = getattr(trt, CALLED_ON[base]) if CALLED_ON[base] else trt
                assert hasattr(owner, name), (base, name)
                seen.add(base)
    assert seen == set(CALLED_ON)
    assert hasattr(trt.ExecutionContextAllocationStrategy, "ON_PROFILE_CHANGE")
    assert hasattr(trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")
    assert {"deserialize", "serialize"} <= set(dir(trt.IRuntimeCache))


def test_what_is_acted_out_exists() -> None:
    trt, runtime = pytest.importorskip("tensorrt_rtx"), pytest.importorskip("cuda.bindings.runtime")
    for name in ("IExecutionContext", "ICudaEngine", "IRuntimeConfig", "IRuntimeCache"):
        acted = {n for n in vars(getattr(host_gpu, name)) if not n.startswith("_")} - {"execute"}
        assert acted <= set(dir(getattr(trt, name))), name
    assert {n for n in vars(HostCuda) if n.startswith("cuda")} <= set(dir(runtime))

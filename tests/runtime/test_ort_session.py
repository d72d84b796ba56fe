"""ONNX Runtime with the weights as inputs: on the CPU, and on a GPU that is acted out by copies in
host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from conftest import Built
from prefix_checks import check_forwards_behind_a_prefix, check_random_copies, check_refusals

from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.errors import BundleError, DependencyError, UsageError
from trimode.formats.contract import GRAPH_NAMES
from trimode.runtime.bundle.open import Bundle, open_bundle
from trimode.runtime.model import TriModeModel
from trimode.runtime.sessions.ort import library as ort_library
from trimode.runtime.sessions.ort import memory as ort_memory
from trimode.runtime.sessions.ort.cache import OrtCache
from trimode.runtime.sessions.ort.memory import place, place_weights, zeros
from trimode.runtime.sessions.ort.session import OrtSession

SHAPE = "three_kv_heads"


@pytest.fixture(scope="session")
def half(built: Callable[[str], Built], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A float16 pack with targets for the CPU (float32) and for a GPU (float16)."""
    folder = tmp_path_factory.mktemp("half") / "bundle"
    build_bundle(
        built(SHAPE).checkpoint, folder, BuildOptions(targets=("cpu", "cuda"), precision="fp16")
    )
    return open_bundle(folder)


def tokens(model: TriModeModel, length: int) -> list[Any]:
    prompt = [np.random.default_rng(length).integers(12, 100, length).tolist()]
    return [
        call(prompt, max_new_tokens=30, **options)[0].tolist()
        for call, options in (
            (model.ar_generate, {}),
            (model.generate, {"block_length": 8}),
            (model.linear_spec_generate, {"block_length": 8}),
        )
    ]


def test_shared_weights_on_the_cpu(half: Bundle) -> None:
    record = half.chosen.targets["cpu"]
    assert (record.placement, record.compute_dtype, half.manifest.dtype) == (
        "shared",
        "float32",
        "float16",
    )
    shared, portable = (
        TriModeModel(half, OrtSession(half, record, 1)),
        TriModeModel(half, OrtSession(half, None, 1)),
    )
    for length in (1, 40, 300):
        assert tokens(shared, length) == tokens(portable, length)


def test_every_graph_reads_the_same_memory(half: Bundle) -> None:
    session = OrtSession(half, half.chosen.targets["cpu"], 1)
    for name in session._read_by["ar"]:
        assert {
            session._read_by[graph_name][name].value.data_ptr()
            for graph_name in GRAPH_NAMES
            if name in session._read_by[graph_name]
        } == {session._weights[name].value.data_ptr()}
    session.close()
    assert not session.sessions


@dataclass(frozen=True)
class Binding:
    """An IO binding on which ``cuda`` is host memory, and binding an array copies it, as it does on
    a GPU.
    """

    real: Any
    on_gpu: dict[int, Any]

    def is_on_gpu(self, address: int) -> bool:
        """Rows of a batch begin inside of what was allocated."""
        return any(
            begin <= address < begin + value.numpy().nbytes for begin, value in self.on_gpu.items()
        )

    def bind_input(self, name: str, device: str, *rest: Any) -> None:
        assert (device == "cuda") == self.is_on_gpu(rest[-1])
        self.real.bind_input(name, "cpu", *rest)

    def bind_output(self, name: str, device: str, *rest: Any) -> None:
        assert (device == "cuda") == self.is_on_gpu(rest[-1])
        self.real.bind_output(name, "cpu", *rest)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        assert not self.is_on_gpu(value.data_ptr())
        self.real.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        assert not self.is_on_gpu(value.data_ptr())
        self.real.bind_ortvalue_output(name, value)

    def bind_cpu_input(self, name: str, array: Any) -> None:
        self.real.bind_cpu_input(name, array.copy())


@pytest.fixture
def act_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, sessions run on a GPU whose memory is copies in host memory."""
    copies: dict[int, Any] = {}

    def from_numpy(array: Any, device: str, _device_id: int) -> Any:
        value = ort.OrtValue.ortvalue_from_numpy(array.copy() if device == "cuda" else array)
        if device != "cuda":
            return value
        copies[value.data_ptr()] = value
        # from a GPU it is a copy, here a view
        return SimpleNamespace(data_ptr=value.data_ptr, numpy=lambda: value.numpy().copy())

    class Session:
        def __init__(self, *args: Any, **_: Any) -> None:
            self.real = ort.InferenceSession(*args, providers=["CPUExecutionProvider"])
            self.get_inputs = self.real.get_inputs

        def io_binding(self) -> Binding:
            return Binding(self.real.io_binding(), copies)

        def run_with_iobinding(self, binding: Binding) -> None:
            self.real.run_with_iobinding(binding.real)

        def get_providers(self) -> list[str]:
            return [ort_library.CUDA_PROVIDER, "CPUExecutionProvider"]

    acted = SimpleNamespace(
        OrtValue=SimpleNamespace(ortvalue_from_numpy=from_numpy),
        InferenceSession=Session,
        SessionOptions=ort.SessionOptions,
        get_available_providers=lambda: [ort_library.CUDA_PROVIDER],
        __version__=ort.__version__,
    )

    def act() -> None:
        monkeypatch.setattr(ort_memory, "ort", acted)
        monkeypatch.setattr(ort_library, "ort", acted)

    return act


def test_on_a_gpu(half: Bundle, act_gpu: Callable[[], None]) -> None:
    """The float16 graphs over acted-out GPU memory give what they give over plain memory; the cache
    grows on the way.
    """
    record = half.chosen.targets["cuda"]
    plain = TriModeModel(half, OrtSession(half, record.model_copy(update={"device": "cpu"}), 1))
    act_gpu()
    on_gpu = TriModeModel(half, OrtSession(half, record, 1))
    for length in (1, 40, 250):
        assert tokens(on_gpu, length) == tokens(plain, length)
    caches = [model.session.new_cache() for model in (on_gpu, plain)]
    outputs = [
        model.session.run("verify", cache, np.arange(8)[None] + 20, 0)
        for model, cache in zip((on_gpu, plain), caches, strict=True)
    ]
    assert type(outputs[0][2]) is not np.ndarray
    assert outputs[0][2].shape == outputs[1][2].shape
    np.testing.assert_array_equal(np.asarray(outputs[0][2]), outputs[1][2])


def test_batches_on_a_gpu(half: Bundle, act_gpu: Callable[[], None]) -> None:
    """Forwards over some rows, rows that move, a cache that grows, and logits that are read after
    other rows' forwards.

    The same over plain memory runs forwards of the same shapes: float16 rounds otherwise in others,
    by more than a draw forgives.
    """
    record = half.chosen.targets["cuda"]
    plain = TriModeModel(half, OrtSession(half, record.model_copy(update={"device": "cpu"}), 1))
    act_gpu()
    on_gpu = TriModeModel(half, OrtSession(half, record, 1))
    results = []
    for model in (on_gpu, plain):
        model.session.free_tokens = 0  # type: ignore[attr-defined]
        results.append([batch_of(model, mode, 1.0) for mode in ("ar", "diffusion", "linear_spec")])
    assert results[0] == results[1]
    for mode in ("ar", "diffusion", "linear_spec"):
        assert batch_of(on_gpu, mode, 0.0) == [
            plain.stream([prompt], mode, max_new_tokens=limit, block_length=8, eos_token_ids=())
            .finish()
            .token_ids
            for prompt, limit in TEXTS[1:]
        ]


TEXTS = [
    (np.random.default_rng(n).integers(12, 100, n).tolist(), 20 + n % 10) for n in (3, 240, 40, 41)
]


def batch_of(model: TriModeModel, mode: Any, temperature: float) -> list[list[int]]:
    """Answers of all but the first, which leaves, so that the last takes its place."""
    batch = model.new_batch(4)
    rows = [
        batch.add(
            p,
            mode,
            max_new_tokens=n,
            block_length=8,
            temperature=temperature,
            seed=3,
            eos_token_ids=(),
        )
        for p, n in TEXTS
    ]
    for _ in range(4):
        batch.step()
    batch.finish(rows.pop(0))
    list(batch)
    return [row.result.token_ids for row in rows]


def test_without_the_cuda_provider(half: Bundle) -> None:
    if ort_library.CUDA_PROVIDER in ort.get_available_providers():
        pytest.skip("it is here")
    with pytest.raises(DependencyError, match="with the CUDA provider, found") as raised:
        OrtSession(half, half.chosen.targets["cuda"])
    assert "onnxruntime-gpu" in raised.value.hint


def test_a_pack_that_does_not_fit(half: Bundle, tmp_path: Any) -> None:
    pack = half.weights()
    name, entry = next(iter(pack.entries.items()))
    shape = list(entry.shape)
    cases = (
        ("missing", "float", [3]),
        (name, "float", [*shape, 1]),
        (name, "bfloat16", shape),
        (name, "int4", shape),
    )
    for other, kind, declared in cases:
        with pytest.raises(BundleError, match=f"{other}: expected tensor"):
            place_weights(
                pack, [{other: SimpleNamespace(type=f"tensor({kind})", shape=declared)}], "cpu"
            )


def test_bfloat16_bits_are_kept() -> None:
    bits = np.array([[0x3F80, 0x7FC1, 0xFF80, 0x0001]], np.uint16)
    assert (
        place(bits.view(np.float16), "bfloat16", "cpu").numpy().view(np.uint16).tolist()
        == bits.tolist()
    )
    assert zeros((2, 3), "bfloat16", "cpu").numpy().tolist() == [[0] * 3] * 2


def test_unaligned_tensors_are_copied() -> None:
    odd = np.arange(13, dtype=np.uint8)[1:].view("<f4")
    np.testing.assert_array_equal(place(odd, "float32", "cpu").numpy(), odd)


def test_a_capacity_that_graphs_fix(built: Callable[[str], Built]) -> None:
    cache = OrtCache(built(SHAPE).model.model, "float16", "cpu", 300)
    cache.reserve(10)
    assert (cache.capacity, cache.values[".0.key"].numpy().dtype) == (300, np.float16)
    with pytest.raises(UsageError, match="at most 300 tokens"):
        cache.reserve(301)


def test_threads() -> None:
    with pytest.raises(UsageError, match="at least 1 thread"):
        OrtSession(None, None, 0)  # type: ignore[arg-type]


def test_the_cache_is_updated_in_place(half: Bundle) -> None:
    """Past and present are one memory: a forward leaves every slot but its own as it was."""
    session = OrtSession(half, half.chosen.targets["cpu"], 1)
    cache = session.new_cache()
    session.run("ar", cache, np.arange(20)[None] + 12, 0)
    before = {name: buffer.numpy().copy() for name, buffer in cache.values.items()}
    session.run("verify", cache, np.arange(4)[None] + 12, 9)
    for name, buffer in cache.values.items():
        changed = (buffer.numpy() != before[name]).any((0, 1, 3)).nonzero()[0]
        assert set(changed.tolist()) <= {9, 10, 11, 12}
        assert changed.size


@pytest.fixture(scope="module")
def quantized(built: Callable[[str], Built], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    options = BuildOptions(targets=("cpu",), precision="int8", calibration="rtn")
    build_bundle(built(SHAPE).checkpoint, folder, options)
    return open_bundle(folder)


def buffers_of(cache: Any) -> Any:
    return [buffer.numpy() for buffer in cache.values.values()]


def caches_for_copies(session: OrtSession) -> list[Any]:
    """Three rows of 256 slots, two of 512, and one of 256."""
    caches = [session.new_batch_cache(rows) for rows in (3, 2, 1)]
    for cache, length in zip(caches, (7, 257, 256), strict=True):
        cache.reserve(length)
    return caches


def test_copied_prefixes_in_float32(quadratic: Callable[[str], Built]) -> None:
    model = quadratic(SHAPE).model
    session = OrtSession(model.bundle, None, 1)
    cache = session.new_cache()
    assert cache.bytes_per_token == 2 * model.model.num_hidden_layers * 3 * (
        model.model.head_dim * 4
    )
    check_random_copies(caches_for_copies(session), buffers_of, 1, 60)
    graph_names: Any = ("ar", "draft", "verify", "quadratic")
    check_forwards_behind_a_prefix(session, graph_names)


def test_copied_prefixes_in_float16_and_over_quantized_weights(
    half: Bundle, quantized: Bundle
) -> None:
    record = half.chosen.targets["cuda"].model_copy(update={"device": "cpu"})
    narrow = OrtSession(half, record, 1)
    assert narrow.new_cache().export_prefix(0, 0, 0)[0].dtype == np.float16
    for session in (narrow, OrtSession(quantized, quantized.chosen.targets["cpu"], 1)):
        check_random_copies(caches_for_copies(session), buffers_of, 2, 30)
        graph_names: Any = ("ar", "draft", "verify")
        check_forwards_behind_a_prefix(session, graph_names)


def test_copied_prefixes_on_a_gpu(half: Bundle, act_gpu: Callable[[], None]) -> None:
    act_gpu()
    session = OrtSession(half, half.chosen.targets["cuda"], 1)
    check_random_copies(caches_for_copies(session), buffers_of, 3, 20)
    check_forwards_behind_a_prefix(session, ("ar", "verify"))


def test_copies_that_are_refused(half: Bundle) -> None:
    cpu = OrtSession(half, half.chosen.targets["cpu"], 1)
    narrow = OrtSession(half, half.chosen.targets["cuda"].model_copy(update={"device": "cpu"}), 1)
    ours, other = (session.new_batch_cache(2) for session in (cpu, narrow))
    for cache in (ours, other):
        cache.reserve(10)
    check_refusals(ours, other)
    empty = cpu.new_batch_cache(2)
    empty.copy_prefix(0, 1, 0)
    assert [array.shape[1] for array in empty.export_prefix(1, 0, 0)] == [0] * 4
    with pytest.raises(UsageError, match="expected slots within the cache's 0, found 1"):
        empty.copy_prefix(0, 1, 1)


def test_capacities_grow_by_buckets(half: Bundle) -> None:
    session = OrtSession(half, half.chosen.targets["cpu"], 1)
    for length in (1, 256, 257, 512, 513):
        cache = session.new_batch_cache(2)
        cache.reserve(length)
        assert session.capacity_for(length) == cache.capacity
    fixed = half.chosen.targets["cpu"].model_copy(update={"capacity": 300})
    session = OrtSession(half, fixed, 1)
    assert session.capacity_for(5) == 300
    with pytest.raises(UsageError, match="at most 300 tokens"):
        session.capacity_for(301)

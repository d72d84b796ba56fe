"""The passes: what they change, that the lowered graph still computes the same, and that they
refuse what they do not understand.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from checkpoints import SHAPES, config_of, write_checkpoint
from once import TracedOnce
from onnx.reference import ReferenceEvaluator

from trimode.compiler.pack.layout import plan_pack
from trimode.compiler.pack.writer import write_pack
from trimode.compiler.passes.base import caches, lower, to_bytes, weights
from trimode.compiler.passes.choose_before_widening import ChooseBeforeWidening
from trimode.compiler.passes.compute_type import ComputeType
from trimode.compiler.passes.mask_slots import MaskSlots
from trimode.compiler.passes.narrow_logits import NarrowLogits
from trimode.compiler.passes.queries_to_outputs import QueriesToOutputs
from trimode.compiler.passes.static_capacity import StaticCacheCapacity
from trimode.compiler.passes.stored_type import StoredType
from trimode.compiler.passes.weights_to_inputs import WeightsToInputs
from trimode.errors import BuildError
from trimode.formats.contract import GRAPH_NAMES, DType, GraphName, cache_specs, graph_contract
from trimode.graphs.checkpoint import Checkpoint, describe_model, open_checkpoint
from trimode.graphs.decoder.trace import trace_graph
from trimode.runtime.bundle.weights import WeightPack

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CAPACITY = 41
ALL_GRAPH_NAMES: tuple[GraphName, ...] = (*GRAPH_NAMES, "quadratic")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    changes, dtype, rank, shards = SHAPES["three_kv_heads"]
    return open_checkpoint(
        write_checkpoint(
            tmp_path_factory.mktemp("c") / "it",
            config_of(**changes),
            dtype=dtype,
            rank=rank,
            shards=shards,
        )
    )


@pytest.fixture(scope="module")
def traced(checkpoint: Checkpoint, traced_once: TracedOnce) -> dict[GraphName, ir.Model]:
    return {
        graph_name: traced_once.graph(graph_name, checkpoint, describe_model(checkpoint))
        for graph_name in ALL_GRAPH_NAMES
    }


def feeds(
    checkpoint: Checkpoint, dtype: DType, graph: ir.Model, folder: Path
) -> dict[str, np.ndarray]:
    """Ragged rows, a cache with something in it, and every weight by its name."""
    model = describe_model(checkpoint)
    layout = plan_pack(checkpoint, model.num_positions, dtype)
    write_pack(layout, folder / "pack", lambda _: None)
    pack, rng = WeightPack(folder / "pack"), np.random.default_rng(0)
    fed: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, 100, (2, 7)),
        "past_length": np.array([3, 30]),
        "input_length": np.array([7, 4]),
        "drafter_scale": np.array(1, np.float32),
    }
    shape = (2, model.num_key_value_heads, CAPACITY, model.head_dim)
    fed |= {
        spec.name: (rng.standard_normal(shape) * 0.3).astype(NUMPY[dtype])
        for spec in cache_specs(model, "past_key_values")
    }
    fed |= {
        name: pack.raw(name).view(NUMPY[entry.dtype]).reshape(entry.shape)
        for name, entry in pack.entries.items()
    }
    if graph.graph.name == "quadratic":
        # six slots of the cache; seven drafts would take 56
        fed["input_ids"] = fed["input_ids"][:, :2]
    return {value.name: fed[value.name] for value in graph.graph.inputs if value.name}


def run_ort(graph: ir.Model, fed: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(to_bytes(graph), options, providers=["CPUExecutionProvider"]).run(
        outputs, fed
    )


@pytest.mark.parametrize("graph_name", ALL_GRAPH_NAMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_graph_in_sixteen_bits_computes_the_same(
    checkpoint: Checkpoint,
    traced: dict[GraphName, ir.Model],
    graph_name: GraphName,
    dtype: DType,
    tmp_path: Path,
) -> None:
    """ONNX Runtime for fp16, ONNX's own reference evaluator for bf16, which ONNX Runtime's CPU
    kernels do not know.
    """
    names = [spec.name for spec in graph_contract(graph_name, describe_model(checkpoint)).outputs]
    wide = lower(traced[graph_name], WeightsToInputs())
    expected = run_ort(wide, feeds(checkpoint, "float32", wide, tmp_path), names)
    narrow = lower(
        traced[graph_name], StaticCacheCapacity(CAPACITY), ComputeType(dtype), WeightsToInputs()
    )
    fed = feeds(checkpoint, dtype, narrow, tmp_path)
    found = (
        run_ort(narrow, fed, names)
        if dtype == "float16"
        else ReferenceEvaluator(onnx.load_from_string(to_bytes(narrow))).run(names, fed)
    )
    # Two layers, logits up to 12: a few dozen roundings of half a unit in the last place, 2^-11 and
    # 2^-8 relative.
    tolerance = {"float16": 0.03, "bfloat16": 0.25}[dtype]
    for name, one, other in zip(names, expected, found, strict=True):
        assert one.dtype == other.dtype, name
        if one.dtype == np.float32:
            np.testing.assert_allclose(other, one, atol=tolerance, err_msg=name)
    for ids in (names.index(name) for name in ("top_ids", "greedy_ids") if name in names):
        first = (
            (expected[ids][..., 0], found[ids][..., 0])
            if names[ids] == "top_ids"
            else (expected[ids], found[ids])
        )
        assert (first[0] == first[1]).mean() >= 0.9


@pytest.mark.parametrize("graph_name", ALL_GRAPH_NAMES)
def test_names_and_types_after_lowering(
    checkpoint: Checkpoint, traced: dict[GraphName, ir.Model], graph_name: GraphName
) -> None:
    model = describe_model(checkpoint)
    before = to_bytes(lower(traced[graph_name], WeightsToInputs()))
    lowered = lower(
        traced[graph_name], StaticCacheCapacity(99), ComputeType("bfloat16"), WeightsToInputs()
    )
    contract = graph_contract(graph_name, model)
    declared = [*contract.inputs, *cache_specs(model, "past_key_values", "bfloat16", 99)]
    found = list(lowered.graph.inputs)
    assert [v.name for v in found[: len(declared)]] == [s.name for s in declared]
    for value, spec in zip(found, declared, strict=False):
        assert value.dtype is not None
        assert (
            value.dtype.name.lower()
            == {"float32": "float", "int64": "int64", "bfloat16": "bfloat16"}[spec.dtype]
        )
        assert value.shape is not None
        assert [d if isinstance(d, int) else d.value for d in value.shape] == list(spec.shape)
    names = set(checkpoint.tensors) | {"rope.cos", "rope.sin", "rope.query_scale"}
    assert {v.name for v in found[len(declared) :]} <= names
    assert {v.name: v.dtype for v in found}["rope.cos"] == ir.DataType.FLOAT  # angles stay exact
    assert [v.name for v in lowered.graph.outputs[: len(contract.outputs)]] == [
        s.name for s in contract.outputs
    ]
    assert not weights(lowered)
    assert to_bytes(lower(traced[graph_name], WeightsToInputs())) == before  # passes work on copies
    assert to_bytes(
        lower(
            traced[graph_name], StaticCacheCapacity(99), ComputeType("bfloat16"), WeightsToInputs()
        )
    ) == to_bytes(lowered)


@pytest.mark.parametrize("graph_name", ALL_GRAPH_NAMES)
def test_weights_stored_in_sixteen_bits_are_widened(
    checkpoint: Checkpoint, traced: dict[GraphName, ir.Model], graph_name: GraphName, tmp_path: Path
) -> None:
    """bf16 weights in float32 arithmetic: exactly what float32 weights of the same values give."""
    names = [spec.name for spec in graph_contract(graph_name, describe_model(checkpoint)).outputs]
    wide = lower(traced[graph_name], WeightsToInputs())
    fed = feeds(checkpoint, "float32", wide, tmp_path)
    for name in checkpoint.tensors:
        if name in fed:
            fed[name] = fed[name].astype(np.float16).astype(np.float32)
    stored = lower(traced[graph_name], StoredType("float16"), WeightsToInputs())
    narrow = {
        name: array.astype(np.float16) if name in checkpoint.tensors else array
        for name, array in fed.items()
    }
    for one, other in zip(run_ort(wide, fed, names), run_ort(stored, narrow, names), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("graph_name", ALL_GRAPH_NAMES)
def test_queries_are_returned_and_nothing_else_changes(
    checkpoint: Checkpoint, traced: dict[GraphName, ir.Model], graph_name: GraphName, tmp_path: Path
) -> None:
    model = describe_model(checkpoint)
    names = [
        spec.name
        for spec in (*graph_contract(graph_name, model).outputs, *cache_specs(model, "present"))
    ]
    plain = lower(traced[graph_name], StaticCacheCapacity(CAPACITY), WeightsToInputs())
    marked = lower(
        traced[graph_name], StaticCacheCapacity(CAPACITY), QueriesToOutputs(), WeightsToInputs()
    )
    queries = [f"scratch.query.{layer}" for layer in range(model.num_hidden_layers)]
    assert [value.name for value in marked.graph.outputs] == [*names, *queries]
    fed = feeds(checkpoint, "float32", plain, tmp_path)
    found = run_ort(marked, fed, [*names, *queries])
    for one, other in zip(run_ort(plain, fed, names), found, strict=False):
        np.testing.assert_array_equal(one, other)
    rows = fed["input_ids"].shape[1]
    shape = (
        2,
        model.num_attention_heads,
        rows * (rows + 1) if graph_name == "quadratic" else rows,
        model.head_dim,
    )
    assert {query.shape for query in found[len(names) :]} == {shape}


@pytest.mark.parametrize("graph_name", ALL_GRAPH_NAMES)
def test_tokens_are_chosen_from_narrow_logits_and_are_the_same(
    checkpoint: Checkpoint, traced: dict[GraphName, ir.Model], graph_name: GraphName, tmp_path: Path
) -> None:
    """ONNX's reference evaluator, in bf16: every output bit for bit."""
    names = [spec.name for spec in graph_contract(graph_name, describe_model(checkpoint)).outputs]
    wide = lower(
        traced[graph_name],
        StaticCacheCapacity(CAPACITY),
        ComputeType("bfloat16"),
        WeightsToInputs(),
    )
    narrow = lower(
        traced[graph_name],
        StaticCacheCapacity(CAPACITY),
        ComputeType("bfloat16"),
        ChooseBeforeWidening(),
        WeightsToInputs(),
    )
    choosing = [node for node in narrow.graph if node.op_type in ("ArgMax", "TopK")]
    assert choosing
    assert {node.inputs[0].dtype for node in choosing if node.inputs[0] is not None} == {
        ir.DataType.BFLOAT16
    }
    fed = feeds(checkpoint, "bfloat16", wide, tmp_path)
    one, other = (
        ReferenceEvaluator(onnx.load_from_string(to_bytes(graph))).run(names, fed)
        for graph in (wide, narrow)
    )
    for name, expected, found in zip(names, one, other, strict=True):
        assert expected.dtype == found.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("graph_name", ALL_GRAPH_NAMES)
def test_a_mask_says_what_the_valid_length_said(
    checkpoint: Checkpoint, traced: dict[GraphName, ir.Model], graph_name: GraphName, tmp_path: Path
) -> None:
    """TensorRT-RTX ignores the length, so nothing but the mask may hide slots. Those behind the
    new rows hold large numbers: whoever sees one gives other outputs.
    """
    names = [spec.name for spec in graph_contract(graph_name, describe_model(checkpoint)).outputs]
    plain = lower(traced[graph_name], StaticCacheCapacity(CAPACITY), WeightsToInputs())
    masked = lower(
        traced[graph_name], StaticCacheCapacity(CAPACITY), MaskSlots(), WeightsToInputs()
    )
    attentions = [node for node in masked.graph if node.op_type == "Attention"]
    assert len(attentions) == 2
    assert {len(node.inputs) for node in attentions} == {4}
    assert len({node.inputs[3] for node in attentions}) == 1  # computed once
    fed = feeds(checkpoint, "float32", plain, tmp_path)
    rows = fed["input_ids"].shape[1]
    for name in [name for name in fed if name.startswith("past_key_values")]:
        for sequence, length in enumerate(fed["past_length"]):
            written = rows * (rows + 1) if graph_name == "quadratic" else rows
            fed[name][sequence, :, length + written :] = 50
    for name, one, other in zip(
        names, run_ort(plain, fed, names), run_ort(masked, fed, names), strict=True
    ):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("graph_name", ALL_GRAPH_NAMES)
def test_logits_are_returned_as_the_head_gave_them(
    checkpoint: Checkpoint, traced: dict[GraphName, ir.Model], graph_name: GraphName, tmp_path: Path
) -> None:
    """ONNX's reference evaluator: ONNX Runtime computes the product in float32 before a cast."""
    names = [spec.name for spec in graph_contract(graph_name, describe_model(checkpoint)).outputs]
    steps = (StaticCacheCapacity(CAPACITY), ComputeType("bfloat16"), ChooseBeforeWidening())
    wide = lower(traced[graph_name], *steps, WeightsToInputs())
    narrow = lower(traced[graph_name], *steps, NarrowLogits(), WeightsToInputs())
    fed = feeds(checkpoint, "bfloat16", wide, tmp_path)
    expected, found = (
        ReferenceEvaluator(onnx.load_from_string(to_bytes(graph))).run(names, fed)
        for graph in (wide, narrow)
    )
    for name, one, other in zip(names, expected, found, strict=True):
        assert other.dtype == (ml_dtypes.bfloat16 if name == "logits" else one.dtype)
        np.testing.assert_array_equal(other.astype(one.dtype), one, err_msg=name)
    float32 = lower(traced[graph_name], StaticCacheCapacity(CAPACITY), WeightsToInputs())
    unchanged = lower(
        traced[graph_name], StaticCacheCapacity(CAPACITY), NarrowLogits(), WeightsToInputs()
    )
    assert to_bytes(float32) == to_bytes(unchanged)


def test_each_pass_refuses_what_it_does_not_expect(traced: dict[GraphName, ir.Model]) -> None:
    twice = {
        "StaticCacheCapacity": (StaticCacheCapacity(8), StaticCacheCapacity(9)),
        "ComputeType": (ComputeType("float16"), ComputeType("bfloat16")),
        "StoredType": (ComputeType("float16"), StoredType("bfloat16")),
        "WeightsToInputs": (WeightsToInputs(), WeightsToInputs()),
        "QueriesToOutputs": (QueriesToOutputs(), QueriesToOutputs()),
        "MaskSlots": (MaskSlots(),),
    }
    for name, steps in twice.items():
        with pytest.raises(BuildError, match=rf"lower the graph \({name}\)"):
            lower(traced["ar"], *steps)


def test_a_pass_that_leaves_an_invalid_graph_is_caught(traced: dict[GraphName, ir.Model]) -> None:
    class Careless(ir.passes.InPlacePass):
        """Retypes the cache and forgets what is computed with it."""

        def call(self, model: ir.Model) -> ir.passes.PassResult:
            for value in caches(model):
                value.type = ir.TensorType(ir.DataType.FLOAT16)
            return ir.passes.PassResult(model, modified=True)

    with pytest.raises(BuildError, match="Careless"):
        lower(traced["verify"], Careless())


def test_tracing_and_lowering_are_deterministic(
    checkpoint: Checkpoint, traced: dict[GraphName, ir.Model]
) -> None:
    """The cache finds an engine by the bytes of its graph."""
    again = trace_graph("draft", checkpoint.config, describe_model(checkpoint), checkpoint.drafter)
    passes = (StaticCacheCapacity(99), ComputeType("bfloat16"), WeightsToInputs())
    assert to_bytes(lower(again, *passes)) == to_bytes(lower(traced["draft"], *passes))

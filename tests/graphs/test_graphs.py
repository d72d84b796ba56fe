"""The exported graphs themselves, run raw in ONNX Runtime on ragged batches, against Ministral3 in
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from checkpoints import SHAPES
from conftest import Built
from reference import Reference

from trimode.formats.contract import GRAPH_NAMES, GraphName, cache_specs

CAPACITY = 256
PAST = (0, 9, 200)


def run(
    built: Built, graph_name: GraphName, feeds: dict[str, Any], cache: dict[str, Any]
) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        built.bundle / f"{graph_name}.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {**feeds, **cache}), strict=True))


def empty_cache(built: Built, batch: int) -> dict[str, Any]:
    model = built.model.model
    shape = (batch, model.num_key_value_heads, CAPACITY, model.head_dim)
    rng = np.random.default_rng(0)  # garbage, not zeros: slots that are not valid must not matter
    return {
        spec.name: rng.standard_normal(shape).astype(np.float32)
        for spec in cache_specs(model, "past_key_values")
    }


def as_past(outputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name.replace("present", "past_key_values"): value
        for name, value in outputs.items()
        if name.startswith("present")
    }


def prefilled(built: Built) -> tuple[list[list[int]], dict[str, Any]]:
    """Three sequences of different length, read in one padded ar forward."""
    texts = [np.random.default_rng(n).integers(12, 100, n).tolist() for n in PAST]
    ids = np.full((len(PAST), max(PAST)), 5)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    zeros = np.zeros(len(PAST), np.int64)
    out = run(
        built,
        "ar",
        {"input_ids": ids, "past_length": zeros, "input_length": np.maximum(PAST, 1)},
        empty_cache(built, len(PAST)),
    )
    reference = Reference(built.checkpoint, torch.float64)
    for i, text in enumerate(texts):
        if text:
            close(out["logits"][i], reference.logits(text)[-1])
            assert out["greedy_ids"][i] == reference.logits(text)[-1].argmax()
    return texts, as_past(out)


def close(got: Any, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(got, expected.numpy(), atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("rows", [1, 2, 8, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_on_a_ragged_batch(built: Callable[[str], Built], shape: str, rows: int) -> None:
    it = built(shape)
    reference = Reference(it.checkpoint, torch.float64)
    texts, cache = prefilled(it)
    block = np.random.default_rng(1).integers(12, 100, (len(PAST), rows))
    feeds: dict[str, Any] = {"input_ids": block, "past_length": np.array(PAST)}

    scale = {"drafter_scale": np.array(1, np.float32)} if it.model.model.has_drafter else {}
    draft = run(it, "draft", {**feeds, **scale}, cache)
    verify = run(it, "verify", feeds, cache)
    for i, text in enumerate(texts):
        expected = (
            reference.logits(text + block[i].tolist(), block=rows, drafter=True)[-rows:]
            .softmax(-1)
            .topk(5)
        )
        np.testing.assert_array_equal(draft["top_ids"][i], expected.indices.numpy())
        close(draft["top_probabilities"][i], expected.values)
        logits = reference.logits(text + block[i].tolist())[-rows:]
        close(verify["logits"][i], logits)
        np.testing.assert_array_equal(verify["greedy_ids"][i], logits.argmax(-1).numpy())


@pytest.mark.parametrize("agreeing", [0, 1, 5, 7])
def test_accepted_length_counts_the_leading_agreement(
    built: Callable[[str], Built], agreeing: int
) -> None:
    it = built("three_kv_heads")
    _texts, cache = prefilled(it)
    block = np.full((len(PAST), 8), 20)
    past = np.array(PAST)
    for slot in range(7):  # grow a block that agrees everywhere, one slot at a time
        block[:, slot + 1] = run(it, "verify", {"input_ids": block, "past_length": past}, cache)[
            "greedy_ids"
        ][:, slot]
    if agreeing < 7:
        block[:, agreeing + 1] = (block[:, agreeing + 1] + 1) % 100
    out = run(it, "verify", {"input_ids": block, "past_length": past}, cache)
    assert out["accepted_length"].tolist() == [agreeing] * len(PAST)


@pytest.mark.parametrize("graph_name", GRAPH_NAMES)
def test_only_the_new_slots_of_the_cache_change(
    built: Callable[[str], Built], graph_name: GraphName
) -> None:
    it = built("one_kv_head")
    cache = empty_cache(it, 2)
    past, rows = np.array([3, 40]), 5
    feeds: dict[str, Any] = {"input_ids": np.full((2, rows), 30), "past_length": past}
    if graph_name == "ar":
        feeds["input_length"] = np.array([rows, rows])
    if graph_name == "draft":
        feeds["drafter_scale"] = np.array(0, np.float32)
    after = as_past(run(it, graph_name, feeds, cache))
    for name, before in cache.items():
        for i, n in enumerate(past):
            changed = (after[name][i] != before[i]).any(axis=(0, 2))
            assert changed.nonzero()[0].tolist() == list(range(n, n + rows))


def test_deeper_layers_need_the_causal_commit(built: Callable[[str], Built]) -> None:
    """Layer 0 has the same K/V in both attention modes, deeper layers do not: why a denoised block
    must be committed.
    """
    it = built("one_kv_head")
    feeds: dict[str, Any] = {
        "input_ids": np.arange(20, 28)[None],
        "past_length": np.zeros(1, np.int64),
    }
    causal = run(it, "verify", feeds, empty_cache(it, 1))
    both_ways = run(
        it, "draft", {**feeds, "drafter_scale": np.array(0, np.float32)}, empty_cache(it, 1)
    )
    np.testing.assert_allclose(causal["present.0.key"], both_ways["present.0.key"], atol=1e-6)
    assert np.abs(causal["present.1.key"] - both_ways["present.1.key"]).max() > 1e-2


@pytest.mark.parametrize("graph_name", GRAPH_NAMES)
def test_graphs_are_standard_and_hold_no_weight(
    built: Callable[[str], Built], graph_name: GraphName
) -> None:
    it = built("three_kv_heads")
    model = onnx.load(it.bundle / f"{graph_name}.onnx", load_external_data=False)
    assert {o.domain for o in model.opset_import} == {""}
    assert {n.domain for n in model.graph.node} == {""}
    outside = {
        i.name for i in model.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL
    }
    inside = [i for i in model.graph.initializer if i.name not in outside]
    assert all(np.prod(i.dims, dtype=int) < 64 for i in inside)
    weights = {n for n in outside if not n.startswith("rope.")}
    assert len([n for n in weights if "lora" not in n]) == 9 * 2 + 3
    assert any("lora" in n for n in weights) == (graph_name == "draft")
    contract = it.model.bundle.manifest.contracts[graph_name]
    caches = {s.name for s in cache_specs(it.model.model, "past_key_values")}
    assert {i.name for i in model.graph.input} == {s.name for s in contract.inputs} | caches


def test_no_transposed_weights(built: Callable[[str], Built]) -> None:
    """A Transpose of an initializer would make every runtime hold a second copy."""
    it = built("plain")
    for graph_name in GRAPH_NAMES:
        graph = onnx.load(it.bundle / f"{graph_name}.onnx", load_external_data=False).graph
        names = {i.name for i in graph.initializer}
        assert not [n.name for n in graph.node if n.op_type == "Transpose" and n.input[0] in names]


def test_external_data_names_the_pack(built: Callable[[str], Built]) -> None:
    it = built("three_kv_heads")
    model = onnx.load(Path(it.bundle) / "draft.onnx", load_external_data=False)
    locations = {
        e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"
    }
    assert locations == {"weights.safetensors"}

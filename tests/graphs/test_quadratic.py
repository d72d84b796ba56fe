"""The graph of quadratic self-speculation, raw in ONNX Runtime on ragged batches, against separate
forwards of Ministral3 in float64.
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

from trimode.formats.contract import cache_specs
from trimode.graphs.decoder.quadratic import (
    drafted_rows,
    quadratic_mask,
    quadratic_positions,
    quadratic_tokens,
)

PAST = (0, 9, 150)  # behind 150 tokens, all positions are beyond the rope's original length of 64
CAPACITY = 512


def run(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def cached(it: Built) -> tuple[list[list[int]], dict[str, Any]]:
    """Three texts of different length, and a cache that holds them, with noise in all other
    slots.
    """
    model, rng = it.model.model, np.random.default_rng(0)
    texts = [np.random.default_rng(n).integers(12, 100, n).tolist() for n in PAST]
    shape = (len(PAST), model.num_key_value_heads, CAPACITY, model.head_dim)
    cache = {
        spec.name: rng.standard_normal(shape).astype(np.float32)
        for spec in cache_specs(model, "past_key_values")
    }
    ids = np.full((len(PAST), max(PAST)), 5)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    feeds = {
        "input_ids": ids,
        "past_length": np.zeros(len(PAST), np.int64),
        "input_length": np.maximum(PAST, 1),
    }
    out = run(it.bundle / "ar.onnx", {**feeds, **cache})
    return texts, {name: out[name.replace("past_key_values", "present")] for name in cache}


def close(got: Any, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(got, expected.numpy(), atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_acceptance_drafts_as_separate_forwards_do(
    quadratic: Callable[[str], Built], shape: str, rows: int
) -> None:
    """Each token of the draft in turn is the last that is right; what follows it is one causal and
    one bidirectional forward.
    """
    it = quadratic(shape)
    reference = Reference(it.checkpoint, torch.float64)
    texts, cache = cached(it)
    draft = np.random.default_rng(rows).integers(12, 100, (len(PAST), rows))
    for last in range(rows) if rows <= 5 else (0, 7, rows - 1):
        for text, row in zip(texts, draft, strict=True):
            for slot in range(last):
                row[slot + 1] = reference.logits(text + row[: slot + 1].tolist())[-1].argmax()
            if last + 1 < rows:  # certainly wrong
                row[last + 1] = (
                    reference.logits(text + row[: last + 1].tolist())[-1].argmax() + 1
                ) % 100
        out = run(
            it.bundle / "quadratic.onnx",
            {"input_ids": draft, "past_length": np.array(PAST), **cache},
        )
        assert out["accepted_length"].tolist() == [last] * len(PAST)
        for i, (text, row) in enumerate(zip(texts, draft.tolist(), strict=True)):
            causal = reference.logits(text + row)[-rows:]
            close(out["logits"][i], causal)
            np.testing.assert_array_equal(out["greedy_ids"][i], causal.argmax(-1).numpy())
            masked = reference.logits(
                text + row[: last + 1] + [reference.mask_token_id] * rows, block=rows
            )[-rows:]
            masked[0] = causal[last]
            best = masked.softmax(-1).topk(5)
            np.testing.assert_array_equal(out["top_ids"][i], best.indices.numpy())
            close(out["top_probabilities"][i], best.values)


def test_the_tokens_keys_and_values_are_those_of_verify(quadratic: Callable[[str], Built]) -> None:
    """And what is written behind them ends where the contract says; nothing else of the cache
    changes.
    """
    it, rows = quadratic("one_kv_head"), 5
    _, cache = cached(it)
    feeds = {
        "input_ids": np.random.default_rng(3).integers(12, 100, (len(PAST), rows)),
        "past_length": np.array(PAST),
        **cache,
    }
    found, verified = (
        run(it.bundle / "quadratic.onnx", feeds),
        run(it.bundle / "verify.onnx", feeds),
    )
    for name, before in cache.items():
        after = found[name.replace("past_key_values", "present")]
        for i, n in enumerate(PAST):
            changed = (after[i] != before[i]).any(axis=(0, 2)).nonzero()[0]
            assert changed.tolist() == list(range(n, n + rows * (rows + 1)))
            kept = verified[name.replace("past_key_values", "present")][i, :, n : n + rows]
            np.testing.assert_allclose(after[i, :, n : n + rows], kept, atol=1e-5)


def test_the_layout_of_three() -> None:
    """By hand: d0 d1 d2, then three masks for each, behind two cached tokens in a cache of 16
    slots.
    """
    past = torch.tensor([2])
    assert quadratic_tokens(torch.tensor([[7, 8, 9]]), 100)[0].tolist() == [7, 8, 9] + [100] * 9
    assert quadratic_positions(past, 3)[0].tolist() == [2, 3, 4, 3, 4, 5, 4, 5, 6, 5, 6, 7]
    seen = [
        "".join("x" if s else "." for s in row)
        for row in quadratic_mask(past, 3, 16)[0, 0].tolist()
    ]
    assert seen == [
        "xxx.............",
        "xxxx............",
        "xxxxx...........",
        *["xxx..xxx........"] * 3,
        *["xxxx....xxx....."] * 3,
        *["xxxxx......xxx.."] * 3,
    ]
    assert drafted_rows(torch.tensor([0, 2]), 3).tolist() == [[0, 4, 5], [2, 10, 11]]


def test_the_graph_is_standard_and_holds_no_weight(quadratic: Callable[[str], Built]) -> None:
    it = quadratic("three_kv_heads")
    model = onnx.load(it.bundle / "quadratic.onnx", load_external_data=False)
    assert {o.domain for o in model.opset_import} == {n.domain for n in model.graph.node} == {""}
    outside = {
        i.name for i in model.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL
    }
    assert all(
        np.prod(i.dims, dtype=int) < 64 for i in model.graph.initializer if i.name not in outside
    )
    # the adapter is not in it
    assert len({n for n in outside if not n.startswith("rope.")}) == 9 * 2 + 3
    heads = [n for n in model.graph.node if "diffusion_head.weight" in n.input]
    assert [n.op_type for n in heads] == ["Gemm", "Gemm"]
    assert not [n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in outside]

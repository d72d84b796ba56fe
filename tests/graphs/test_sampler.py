"""The learned sampler's features, network and graph against float64 NumPy, written from the
definitions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from trimode.formats.contract import sampler_contract
from trimode.graphs.sampler.network import BlockSampler, SamplerShape, token_semantics
from trimode.graphs.sampler.trace import trace_sampler
from trimode.runtime.decode.learned_sampler import LearnedScorer

VOCABULARY = 61
SHAPE = SamplerShape(d_model=24, num_layers=3, num_heads=3, feed_forward=20)
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def sampler() -> BlockSampler:
    """Nothing in it is 0 or 1."""
    torch.manual_seed(4)
    sampler = BlockSampler(SHAPE, VOCABULARY)
    for parameter in sampler.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    sampler.token_table.copy_(torch.randn(VOCABULARY, 32))
    sampler.feature_mean.copy_(torch.randn(144))
    sampler.feature_std.copy_(torch.rand(144) + 0.5)
    return sampler.eval().requires_grad_(False)


def a_block(length: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """With probabilities of 0 and 1 among the others."""
    rng = np.random.default_rng(seed)
    p = -np.sort(-rng.dirichlet(np.full(6, 0.4), length)[:, :5], axis=1)
    p[0] = [1, 0, 0, 0, 0]
    ids = np.stack([rng.permutation(VOCABULARY)[:5] for _ in range(length)])
    return rng.integers(0, VOCABULARY, length), rng.random(length) < 0.6, ids, p.astype(np.float32)


def slow_features(block: Any, masked: Any, ids: Any, p: Any, table: Floats) -> Floats:
    length, rows = len(block), []
    num_masked = sum(map(bool, masked))
    for i in range(length):
        q = [float(x) for x in p[i]]
        row = [
            *q,
            q[0],
            q[0] - q[1],
            q[0] + q[1] + q[2],
            -sum(x * math.log(max(x, 1e-10)) for x in q),
            float(masked[i]),
            0.0,
            num_masked / length,
        ]
        row += [
            math.log(max(q[0], 1e-10)),
            1 - sum(x * x for x in q),
            i / length,
            math.log(num_masked + 1),
        ]
        for token in (block[i], *ids[i][:3]):
            row += table[token].tolist()
        rows.append(row)
    return np.array(rows)


def layer_norm(x: Floats, weights: dict[str, Floats], name: str) -> Floats:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def linear(x: Floats, weights: dict[str, Floats], name: str) -> Floats:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def rotated(x: Floats) -> Floats:
    """Each slot's pairs (2i, 2i + 1) as complex numbers, turned."""
    length, size = x.shape
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
    out = np.empty_like(x)
    out[:, 0::2], out[:, 1::2] = turned.real, turned.imag
    return out


def slow_scores(sampler: BlockSampler, block: Any, masked: Any, ids: Any, p: Any) -> Floats:
    w = {name: tensor.double().numpy() for name, tensor in sampler.state_dict().items()}
    x = linear(
        (slow_features(block, masked, ids, p, w["token_table"]) - w["feature_mean"])
        / w["feature_std"],
        w,
        "embed",
    )
    size = SHAPE.d_model // SHAPE.num_heads
    for n in range(SHAPE.num_layers):
        query, key, value = np.split(
            linear(layer_norm(x, w, f"layers.{n}.attention_norm"), w, f"layers.{n}.qkv"), 3, axis=1
        )
        heads = []
        for h in range(SHAPE.num_heads):
            part = slice(h * size, (h + 1) * size)
            q = rotated(layer_norm(query[:, part], w, f"layers.{n}.query_norm"))
            k = rotated(layer_norm(key[:, part], w, f"layers.{n}.key_norm"))
            weights = np.exp(q @ k.T / math.sqrt(size))
            heads.append(weights / weights.sum(1, keepdims=True) @ value[:, part])
        x = x + linear(np.concatenate(heads, 1), w, f"layers.{n}.output")
        up = linear(layer_norm(x, w, f"layers.{n}.mlp_norm"), w, f"layers.{n}.up")
        x = x + linear(
            up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2))), w, f"layers.{n}.down"
        )
    confidence = np.clip(p[:, 0].astype(np.float64), 1e-6, 1 - 1e-6)
    logits = (
        np.log(confidence / (1 - confidence)) + linear(layer_norm(x, w, "norm"), w, "head")[:, 0]
    )
    return 1 / (1 + np.exp(-logits))


def as_batch(arrays: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array)[None] for array in arrays)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 32, 64])
def test_features_and_scores_are_their_definition(sampler: BlockSampler, length: int) -> None:
    block = a_block(length, length)
    features = sampler.features(*as_batch(block))[0]
    assert features.shape == (length, 144)
    table = sampler.token_table.double().numpy()
    np.testing.assert_allclose(
        features.double(), slow_features(*block, table), rtol=1e-5, atol=2e-6
    )
    np.testing.assert_allclose(
        sampler(*as_batch(block))[0], slow_scores(sampler, *block), atol=2e-5
    )


def test_an_untrained_network_scores_by_the_probability() -> None:
    fresh = BlockSampler(SHAPE, VOCABULARY).eval()
    block = a_block(9, 1)
    np.testing.assert_allclose(
        fresh(*as_batch(block))[0].detach(), np.clip(block[3][:, 0], 1e-6, 1 - 1e-6), atol=1e-6
    )


@pytest.fixture(scope="module")
def graph(sampler: BlockSampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampler") / "sampler.onnx"
    path.write_bytes(ir.serde.serialize_model(trace_sampler(sampler)).SerializeToString())
    return path


def test_the_graph_scores_as_the_network_does(sampler: BlockSampler, graph: Path) -> None:
    scorer = LearnedScorer(graph, 1)
    for length in (1, 2, 3, 8, 31, 32, 64):  # of one graph
        block = a_block(length, 90 + length)
        np.testing.assert_allclose(scorer.score(*block), slow_scores(sampler, *block), atol=2e-5)


def test_the_graph_is_standard_and_as_declared(graph: Path) -> None:
    onnx.checker.check_model(str(graph), full_check=True)
    model = onnx.load(str(graph))
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    inputs, outputs = sampler_contract()
    for values, specs in ((model.graph.input, inputs), (model.graph.output, outputs)):
        for value, spec in zip(values, specs, strict=True):
            kind = value.type.tensor_type
            assert (value.name, tuple(d.dim_param or d.dim_value for d in kind.shape.dim)) == (
                spec.name,
                spec.shape,
            )
            assert (
                onnx.TensorProto.DataType.Name(kind.elem_type)
                == {"int64": "INT64", "bool": "BOOL", "float32": "FLOAT"}[spec.dtype]
            )


def test_a_batch_is_its_blocks(sampler: BlockSampler) -> None:
    blocks = [a_block(6, seed) for seed in range(4)]
    together = sampler(
        *(torch.from_numpy(np.stack(arrays)) for arrays in zip(*blocks, strict=True))
    )
    for row, block in zip(together, blocks, strict=True):
        torch.testing.assert_close(row, sampler(*as_batch(block))[0])


def test_token_semantics_are_principal_components() -> None:
    rng = np.random.default_rng(3)
    embeddings = rng.normal(size=(200, 48)) * np.linspace(3, 0.1, 48) + rng.normal(size=48) * 5
    table = token_semantics(torch.from_numpy(embeddings).float()).double().numpy()
    assert table.dtype == np.float64
    centred = embeddings - embeddings.mean(0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    expected = (
        left[:, :32] * values[:32] * np.sign(right[np.arange(32), np.abs(right[:32]).argmax(1)])
    )
    expected /= np.sqrt((expected**2).mean())
    np.testing.assert_allclose(table, expected, atol=4e-3)
    assert (np.diff((table**2).mean(0)) < 0).all()


@pytest.mark.parametrize("shape", [(200, 20), (7, 48), (5, 5)])
def test_semantics_of_few_tokens_or_narrow_embeddings(shape: tuple[int, int]) -> None:
    embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    table = token_semantics(embeddings)
    assert (table.shape, table.dtype) == ((shape[0], 32), torch.float16)
    assert torch.equal(table, token_semantics(embeddings.double()))
    assert not table[:, min(shape) :].any()
    distances = torch.cdist(table[:, : min(shape)].double(), table[:, : min(shape)].double())
    expected = torch.cdist(embeddings.double(), embeddings.double())
    torch.testing.assert_close(
        distances / distances.max(), expected / expected.max(), atol=2e-3, rtol=0
    )


def test_equal_embeddings_give_zeros() -> None:
    assert not token_semantics(torch.full((9, 40), 3.0)).any()

"""Products with int4 weights in ONNX Runtime's own operator, against float64, and what they write
at the end.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import save_file

from trimode.calib.demo.tasks import FAMILIES, examples
from trimode.compiler.options import BuildOptions
from trimode.compiler.pack.layout import read_tensors
from trimode.compiler.passes.base import to_bytes
from trimode.compiler.passes.recipes import lower_portable
from trimode.compiler.pipeline import build_bundle
from trimode.compiler.stages.graphs import point_into_packs
from trimode.errors import BuildError
from trimode.formats.contract import DType
from trimode.graphs.numerics.integers import dequantize, quantize
from trimode.runtime import TriModeModel
from trimode.runtime.bundle.weights import PrecisionWeights

ROWS = (1, 2, 5, 33)
DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"


def product(inputs: int, outputs: int) -> ir.Model:
    """``y = x w^T`` as a traced graph has it: the weight has no data."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", inputs]))
    weight = ir.Value(
        name="it.weight", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([outputs, inputs])
    )
    node = ir.node("Gemm", [x, weight], attributes={"transB": 1})
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", outputs])
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=[weight], opset_imports={"": 24}, name="it"
    )
    return ir.Model(graph, ir_version=11)


def write_pack(
    folder: Path, stored: DType, block: int, inputs: int, outputs: int, pre: np.ndarray | None
) -> tuple[Path, np.ndarray]:
    """A pack by hand, every number from -8 to 7 in it, and the weights that it stands for."""
    import ml_dtypes

    rng = np.random.default_rng(block)
    dtype: Any = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[
        stored
    ]
    scale = np.exp(rng.uniform(-4, 0, (outputs, inputs // block))).astype(dtype)
    numbers = rng.integers(-8, 8, (outputs, inputs)).astype(np.float32)
    raw = quantize(numbers, np.ones_like(scale, np.float32), "int4")
    tensors: dict[str, Any] = {"it.weight": raw, "it.weight_scale": scale}
    if pre is not None:
        tensors["it.pre_quant_scale"] = pre.astype(dtype)
    path = folder / "weights.safetensors"
    save_file(tensors, path)
    return path, dequantize(raw, scale.astype(np.float32), "int4").astype(np.float64)


@pytest.mark.parametrize("accuracy_level", [1, 4])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_the_product(
    tmp_path: Path, block: int, stored: DType, accuracy_level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Level 1 errs by float32's rounding alone; level 4 by half a step of int8 an input at most,
    the step being a block's largest input over 127.
    """
    monkeypatch.setattr("trimode.compiler.passes.recipes.INT4_ACCURACY_LEVEL", accuracy_level)
    inputs, outputs = 3 * block if block > 16 else 80, 37
    pre = (
        np.exp2(np.random.default_rng(1).integers(-2, 3, inputs)).astype(np.float32)
        if block != 64
        else None
    )
    path, weight = write_pack(tmp_path, stored, block, inputs, outputs, pre)
    tensors = read_tensors(PrecisionWeights([path]))
    graph = lower_portable(stored, product(inputs, outputs), tensors)
    assert [node.op_type for node in graph.graph].count("MatMulNBits") == 1
    assert not any(node.op_type in ("DequantizeLinear", "Gemm") for node in graph.graph)
    point_into_packs(graph, tensors, tmp_path)
    (tmp_path / "it.onnx").write_bytes(to_bytes(graph))
    onnx.checker.check_model(str(tmp_path / "it.onnx"))
    session = ort.InferenceSession(tmp_path / "it.onnx", providers=["CPUExecutionProvider"])
    for rows in ROWS:
        x = np.random.default_rng(rows).standard_normal((rows, inputs)).astype(np.float32)
        scaled = (x if pre is None else x * pre).astype(np.float64)
        found, expected = session.run(None, {"x": x})[0], scaled @ weight.T
        allowed = 1e-6 * inputs * (np.abs(scaled) @ np.abs(weight).T) / 8
        if accuracy_level == 4:
            half_step = np.abs(scaled).reshape(rows, -1, block).max(2) / 254
            allowed = allowed + 1.01 * np.repeat(half_step, block, 1) @ np.abs(weight).T
        assert (np.abs(found - expected) <= allowed).all()


@pytest.mark.parametrize("pre", [False, True])
def test_two_products_over_one_weight(tmp_path: Path, pre: bool) -> None:
    """As the head of ``quadratic``, whose second product reads rows that the first has chosen: the
    weight is turned into unsigned numbers once.
    """
    factors = (
        np.exp2(np.random.default_rng(1).integers(-2, 3, 96)).astype(np.float32) if pre else None
    )
    path, weight = write_pack(tmp_path, "float32", 32, 96, 37, factors)
    model = product(96, 37)
    (x,), first = model.graph.inputs, model.graph[0]
    index = ir.Value(name="rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([3]))
    model.graph.inputs.append(index)
    gather = ir.node("Gather", [x, index])
    second = ir.node("Gemm", [gather.outputs[0], first.inputs[1]], attributes={"transB": 1})
    for value, name, columns in ((gather.outputs[0], "chosen", 96), (second.outputs[0], "z", 37)):
        value.name, value.type, value.shape = (
            name,
            ir.TensorType(ir.DataType.FLOAT),
            ir.Shape([3, columns]),
        )
    model.graph.extend([gather, second])
    model.graph.outputs.append(second.outputs[0])
    tensors = read_tensors(PrecisionWeights([path]))
    graph = lower_portable("float32", model, tensors)
    kinds = [node.op_type for node in graph.graph]
    assert (kinds.count("MatMulNBits"), kinds.count("BitwiseXor")) == (2, 1)
    assert not {"DequantizeLinear", "Gemm"} & set(kinds)
    point_into_packs(graph, tensors, tmp_path)
    (tmp_path / "it.onnx").write_bytes(to_bytes(graph))
    onnx.checker.check_model(str(tmp_path / "it.onnx"))
    session = ort.InferenceSession(tmp_path / "it.onnx", providers=["CPUExecutionProvider"])
    x_values, rows = (
        np.random.default_rng(3).standard_normal((5, 96)).astype(np.float32),
        np.array([4, 0, 4]),
    )
    scaled = (x_values if factors is None else x_values * factors).astype(np.float64)
    step = np.repeat(np.abs(scaled).reshape(5, -1, 32).max(2) / 254, 32, 1) * 1.01
    y, z = session.run(None, {"x": x_values, "rows": rows})
    allowed = step @ np.abs(weight).T + 1e-5 * np.abs(scaled) @ np.abs(weight).T
    assert (np.abs(y - scaled @ weight.T) <= allowed).all()
    np.testing.assert_allclose(z, y[rows], rtol=1e-6, atol=1e-6)


def test_a_pack_that_does_not_fit(tmp_path: Path) -> None:
    path, _ = write_pack(tmp_path, "float32", 32, 96, 5, None)
    graph = lower_portable("float32", product(96, 5), read_tensors(PrecisionWeights([path])))
    other, _ = write_pack(tmp_path, "float32", 32, 64, 5, None)
    with pytest.raises(BuildError, match=r"expected the tensor it\.weight"):
        point_into_packs(graph, read_tensors(PrecisionWeights([other])), tmp_path)


def test_self_speculation_writes_what_ar_writes(tmp_path: Path) -> None:
    """One row and a block of rows sum in another order: on the demo never enough for another
    token.
    """
    build_bundle(
        DEMO, tmp_path / "bundle", BuildOptions(precision="int4", calibration="rtn", quadratic=True)
    )
    model = TriModeModel.from_pretrained(tmp_path / "bundle", num_threads=1)
    right = 0
    for family in list(FAMILIES)[::3]:
        (example,) = itertools.islice(examples(5, "held-out", [family]), 1)
        ids = [model.codec.encode_chat([{"role": "user", "content": example.prompt}])]
        answer, _ = model.ar_generate(ids, max_new_tokens=160)
        for use_drafter in (True, False):
            drafted, _ = model.linear_spec_generate(
                ids, max_new_tokens=160, use_drafter=use_drafter
            )
            np.testing.assert_array_equal(drafted, answer)
        np.testing.assert_array_equal(model.self_spec_generate(ids, max_new_tokens=160)[0], answer)
        right += model.codec.decode(answer[0, len(ids[0]) :].tolist()) in example.answers
    assert right >= len(list(FAMILIES)[::3]) - 1

"""What the runtime reads and rewrites of an ONNX file, against the onnx package."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from trimode.runtime.sessions.ort.onnx_file import change_external_data, operators


def external(name: str, **entries: str) -> TensorProto:
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=[70_000, 3], data_location=TensorProto.EXTERNAL
    )
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def model() -> onnx.ModelProto:
    inside = helper.make_tensor("inside", TensorProto.FLOAT, [2], [1.5, -2.0])
    nodes = [
        helper.make_node("Add", ["x", "inside"], ["y"], alpha=0.25, values=[1, 2, -3]),
        helper.make_node("MatMulNBits", ["y", "a", "b"], ["z"], domain="com.microsoft", K=1 << 40),
        helper.make_node("Add", ["z", "z"], ["out"], doc_string="ü" * 200),
    ]
    tensors = [
        inside,
        external("a", location="a.bin", offset="0", length="840000"),
        external("b", location="b.bin", prepacked_0="k|1;2;0|3;4;0"),
    ]
    graph = helper.make_graph(
        nodes, "it", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])], [], tensors
    )
    return helper.make_model(graph, ir_version=10, producer_name="p" * 300)


def test_operators(model: onnx.ModelProto) -> None:
    assert operators(model.SerializeToString()) == {"Add", "MatMulNBits"}
    assert operators(b"") == set()


def test_external_data_changes_and_nothing_else(model: onnx.ModelProto) -> None:
    seen = []

    def change(entries: dict[str, str]) -> dict[str, str]:
        seen.append(entries)
        return {**entries, "location": "é" * 90, "more": ""}

    changed = onnx.load_from_string(change_external_data(model.SerializeToString(), change))
    assert seen == [
        {"location": "a.bin", "offset": "0", "length": "840000"},
        {"location": "b.bin", "prepacked_0": "k|1;2;0|3;4;0"},
    ]
    for tensor in model.graph.initializer[1:]:
        tensor.external_data[0].value = "é" * 90
        tensor.external_data.add(key="more", value="")
    assert changed == model


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_bytes_that_are_no_model(model: onnx.ModelProto, cut: int) -> None:
    with pytest.raises(ValueError, match=r"a field of|a number that"):
        operators(model.SerializeToString()[:-cut])
    with pytest.raises(ValueError, match="wire type 7"):
        operators(b"\x0f")
    with pytest.raises(ValueError, match="does not end"):
        operators(b"\xff\xff")

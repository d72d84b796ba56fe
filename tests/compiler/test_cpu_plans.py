"""What ONNX Runtime makes of a CPU's graphs, against sizes that follow from the model's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from checkpoints import config_of, write_checkpoint
from typer.testing import CliRunner

from trimode.cli.main import app
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.compiler.plans import cpu
from trimode.compiler.plans.cpu import CpuGraph, read_cpu_graphs
from trimode.runtime.bundle.open import Bundle, open_bundle
from trimode.runtime.sessions.ort import library, session
from trimode.runtime.sessions.ort.session import OrtSession

SHAPES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192}
CONFIG = config_of(**SHAPES)
HEADS, KV_HEADS, SIZE = (
    CONFIG[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
)
OF_LAYER = 128 * SIZE * (2 * HEADS + 2 * KV_HEADS) + 3 * 128 * 192
"""Weights of a layer's seven products."""
HEAD = 128 * CONFIG["vocab_size"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("cpu")
    source = write_checkpoint(folder / "it", CONFIG)
    options = {"precision": "bf16", "targets": ("cpu",), "cache": folder / "cache"}
    for changes in ({}, {"precision": "int8"}, {"precision": "int4"}):
        scales = {"calibration": "rtn"} if changes else {}
        build_bundle(source, folder / "b", BuildOptions(**{**options, **changes, **scales}))
    build_bundle(source, folder / "fp32", BuildOptions(cache=folder / "cache"))
    found = {name: open_bundle(folder / "b", name) for name in ("bf16", "int8", "int4")}
    return {**found, "fp32": open_bundle(folder / "fp32")}


def graph_of(bundle: Bundle, graph_name: str) -> CpuGraph:
    (found,) = (
        one
        for one in read_cpu_graphs(bundle, bundle.chosen.targets["cpu"])
        if one.graph_name == graph_name
    )
    return found


def products_of(graph: CpuGraph) -> dict[tuple[str, str], tuple[int, int]]:
    return {(one.operator, one.reading): (one.count, one.weights) for one in graph.products}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", {("Gemm", "packed"): (15, 4 * (2 * OF_LAYER + HEAD))}),
        ("bf16", {("Gemm", "given"): (15, 4 * (2 * OF_LAYER + HEAD))}),
        (
            "int8",
            {("Gemm", "dequantized"): (14, 2 * OF_LAYER), ("Gemm", "packed"): (1, 4 * HEAD)},
        ),
        (
            "int4",
            {("MatMulNBits", "packed"): (14, OF_LAYER), ("Gemm", "packed"): (1, 4 * HEAD)},
        ),
    ],
)
def test_products_and_how_they_read_weights(
    bundles: dict[str, Bundle], precision: str, expected: dict[tuple[str, str], tuple[int, int]]
) -> None:
    found = products_of(graph_of(bundles[precision], "verify"))
    assert found == expected


def test_large_weights_are_mapped_and_not_packed(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "PRIVATE_WEIGHTS_BYTES", 0)
    found = products_of(graph_of(bundles["fp32"], "ar"))
    assert found == {("Gemm", "as it lies"): (15, 4 * (2 * OF_LAYER + HEAD))}


@pytest.mark.parametrize("graph_name", ["ar", "verify"])
def test_what_remains_beside_the_products(bundles: dict[str, Bundle], graph_name: str) -> None:
    graph = graph_of(bundles["int8"], graph_name)
    rows = 1 if graph_name == "ar" else CONFIG["block_size"]
    assert graph.rows == rows
    remaining = {one.operator: (one.count, one.written) for one in graph.remaining}
    # queries, keys and values to heads, and the answer back, in float32
    assert remaining["Transpose"] == (8, 2 * 4 * rows * SIZE * (2 * HEADS + 2 * KV_HEADS))
    assert remaining["DequantizeLinear"] == (14, 2 * 4 * OF_LAYER)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_graphs_are_loaded_as_a_session_loads_them(
    bundles: dict[str, Bundle], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def noted(mapped_bytes: int, _: int | None, **choices: Any) -> Any:
        calls.append((mapped_bytes, choices.get("dequantizes", False)))
        return library.session_options(mapped_bytes, 1, **choices)

    bundle = bundles[precision]
    record = bundle.chosen.targets["cpu"]
    monkeypatch.setattr(session, "session_options", noted)
    OrtSession(bundle, record).close()
    of_session = set(calls)
    calls.clear()
    monkeypatch.setattr(cpu, "session_options", noted)
    read_cpu_graphs(bundle, record)
    assert set(calls) == of_session


def test_inspect_shows_a_cpus_graphs(bundles: dict[str, Bundle]) -> None:
    path = str(bundles["int8"].path)
    run = CliRunner().invoke
    data = json.loads(run(app, ["inspect", path, "--plans", "--target", "cpu", "--json"]).stdout)
    assert [(one["precision"], one["role"]) for one in data] == [
        (precision, graph_name)
        for precision in ("bf16", "int8", "int4")
        for graph_name in ("ar", "draft", "verify")
    ]
    assert data[3]["products"][0] == {
        "operator": "Gemm",
        "reading": "dequantized",
        "count": 14,
        "weights": 2 * OF_LAYER,
        "packed": 0,
    }
    table = run(app, ["inspect", path, "--plans", "--target", "cpu"]).stdout
    assert "int4 verify" in table
    assert "nothing was run" in table

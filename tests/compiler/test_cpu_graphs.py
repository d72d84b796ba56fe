"""Graphs of the target ``cpu``: int4 products round every row alike, bit for bit; attention reads
valid slots alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from checkpoints import config_of, write_checkpoint

from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import BuildResult, build_bundle
from trimode.errors import UsageError
from trimode.graphs.checkpoint import open_checkpoint
from trimode.runtime.bundle.open import open_bundle
from trimode.runtime.sessions.ort.session import OrtSession

SIZES = {
    128: {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "head_dim": 32},
    64: {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8, "head_dim": 24},
    32: {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 40},
    16: {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "head_dim": 16},
}
"""Shapes by the block that rounding to nearest takes for them."""
TOKENS = np.random.default_rng(3).integers(0, 109, (1, 96))


class Built(NamedTuple):
    """A bundle's folder, and what building it said."""

    path: Path
    result: BuildResult


Build = Callable[..., Built]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Bundles by block and options, each built once."""
    made: dict[str, Built] = {}

    def of(block: int, **options: Any) -> Built:
        key = f"{block} {sorted(options.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("cpu")
            config = config_of(num_key_value_heads=2, **SIZES[block])
            checkpoint = write_checkpoint(folder / "checkpoint", config, rank=2)
            bundle = folder / "bundle"
            made[key] = Built(bundle, build_bundle(checkpoint, bundle, BuildOptions(**options)))
        return made[key]

    return of


def session_of(built: Built, num_threads: int = 1) -> OrtSession:
    target = built.result.record.targets["cpu"]
    return OrtSession(open_bundle(built.path), target, num_threads)


def cached(session: OrtSession, tokens: np.ndarray) -> Any:
    cache = session.new_cache()
    if tokens.size:
        session.run("ar", cache, tokens, 0)
    return cache


@pytest.mark.parametrize(
    ("block", "quantize_head", "num_threads"),
    [(128, True, 1), (128, False, 2), (64, True, 2), (32, False, 1), (16, True, 1)],
)
def test_a_row_among_many_rounds_as_it_does_alone(
    build: Build, block: int, quantize_head: bool, num_threads: int
) -> None:
    options = {"precision": "int4", "calibration": "rtn", "quantize_head": quantize_head}
    built = build(block, **options)
    calibration = built.result.record.calibration
    assert calibration is not None
    assert calibration.block_size == block
    session = session_of(built, num_threads)
    for past in (0, 1, 19):
        alone = cached(session, TOKENS[:, :past])
        logits = [
            np.array(session.run("ar", alone, TOKENS[:, at : at + 1], at)[1][0])
            for at in range(past, past + 33)
        ]
        for rows in (1, 2, 3, 8, 17, 33):
            together = cached(session, TOKENS[:, :past])
            found = session.run("verify", together, TOKENS[:, past : past + rows], past)[2]
            np.testing.assert_array_equal(np.array(found[0]), np.array(logits[:rows]))
            for one, other in zip(alone.values.values(), together.values.values(), strict=True):
                end = past + rows
                np.testing.assert_array_equal(one.numpy()[:, :, :end], other.numpy()[:, :, :end])


def test_texts_of_a_batch_round_as_they_do_alone(build: Build) -> None:
    session = session_of(build(128, precision="int4", calibration="rtn"))
    batch, lengths = session.new_batch_cache(3), [5, 23, 11]
    batch.reserve(64)
    singles = []
    for row, length in enumerate(lengths):
        single = cached(session, TOKENS[:, row : row + length])
        batch.import_prefix(row, 0, [np.array(one[0]) for one in _slots(single, length)])
        singles.append(single)
    for rows in (1, 4, 7):
        ids = np.stack([TOKENS[0, 40 + row : 40 + row + rows] for row in range(3)])
        past, real = np.array(lengths), np.full(3, rows)
        found = np.array(session.run_rows("verify", batch, range(3), ids, past, real)[2])
        for row, single in enumerate(singles):
            alone = session.run("verify", single, ids[row : row + 1], lengths[row])[2]
            np.testing.assert_array_equal(found[row], np.array(alone[0]))


def _slots(cache: Any, length: int) -> list[np.ndarray]:
    return [buffer.numpy()[:, :, :length] for buffer in cache.values.values()]


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_not_valid_is_not_read(build: Build, exact: bool) -> None:
    """Not even multiplied by zero: NaN behind the text changes nothing."""
    session = session_of(
        build(64, precision="int4", calibration="rtn", quadratic=True, exact=exact)
    )
    for graph in session.contracts:
        outputs = []
        for noise in (0.0, np.nan):
            cache = cached(session, TOKENS[:, :30])
            cache.reserve(300)
            for buffer in cache.values.values():
                buffer.numpy()[:, :, 30:] = noise
            outputs.append([np.array(x) for x in session.run(graph, cache, TOKENS[:, :7], 30, 1.0)])
        for one, other in zip(*outputs, strict=True):
            np.testing.assert_array_equal(one, other)


def test_dense_graphs_against_the_trunk(build: Build) -> None:
    """Causal and bidirectional, with rows that are odd in number, over a cache with room left."""
    built = build(32, precision="fp32")
    session, checkpoint = session_of(built), open_checkpoint(built.path.parent / "checkpoint")
    reference = TorchSession(load_trunk(checkpoint, session.model.num_positions))
    expected, found = cached(reference, TOKENS[:, :21]), cached(session, TOKENS[:, :21])
    for graph in session.contracts:
        for rows in (1, 5, 32):
            ids = TOKENS[:, 21 : 21 + rows]
            pairs = zip(
                session.run(graph, found, ids, 21, 1.0),
                reference.run(graph, expected, ids, 21, 1.0),
                strict=True,
            )
            for one, other in pairs:
                np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-4)


def test_the_manifest_says_what_is_multiplied(build: Build) -> None:
    usual = build(64, precision="int4", calibration="rtn", quadratic=True)
    exact = build(64, precision="int4", calibration="rtn", quadratic=True, exact=True)
    for built, inputs, level in ((usual, "int8", 4), (exact, "float32", 1)):
        record = built.result.record.targets["cpu"]
        assert record.int4_inputs == inputs
        assert levels(built.path / record.graphs["ar"].file) == {level}
        assert levels(built.path / built.result.record.graphs["ar"]) == {1}
    assert build(32, precision="fp32").result.record.targets["cpu"].int4_inputs is None


def levels(path: Path) -> set[int]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {
        attribute.i
        for node in nodes
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }


def test_the_head_is_quantized_where_it_is_asked_for(build: Build) -> None:
    for asked, dtype in ((False, "float32"), (True, "int4")):
        built = build(128, precision="int4", calibration="rtn", quantize_head=asked)
        entry = open_bundle(built.path).weights().entries["diffusion_head.weight"]
        assert entry.dtype == dtype
        calibration = built.result.record.calibration
        assert calibration is not None
        assert calibration.quantizes_head == asked


@pytest.mark.parametrize("calibration", [None, Path("cal")])
def test_a_calibration_says_itself_whether_the_head_is(calibration: Path | None) -> None:
    with pytest.raises(UsageError, match="`quantize_head`: expected `calibration` rtn"):
        BuildOptions(precision="int4", calibration=calibration, quantize_head=True).check()

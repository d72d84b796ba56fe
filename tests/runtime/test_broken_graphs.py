"""A graph that returns NaN is an error that names it and the position, in every mode, alone and in
a batch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Built

from trimode.errors import UsageError
from trimode.runtime.decode.forward import NotFiniteError
from trimode.runtime.decode.learned_sampler import LearnedScorer
from trimode.runtime.model import TriModeModel
from trimode.runtime.sessions.base import DeviceArray, SessionView

PROMPT = [20, 30, 40, 50]
FREE: dict[str, Any] = {"max_new_tokens": 20, "eos_token_ids": ()}


def poison_pack(bundle: Path, name: str) -> None:
    """Let one number of a weight be NaN."""
    file = bundle / "weights.safetensors"
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        begin, _ = json.loads(stream.read(length))[name]["data_offsets"]
        stream.seek(8 + length + begin)
        stream.write(np.array([np.nan], "<f4").tobytes())


@pytest.fixture
def opened(built: Callable[[str], Built], tmp_path: Path) -> Callable[[str], TriModeModel]:
    def open_with(name: str) -> TriModeModel:
        bundle = shutil.copytree(built("three_kv_heads").bundle, tmp_path / "bundle")
        poison_pack(bundle, name)
        return TriModeModel.from_pretrained(bundle, num_threads=1, verify=False)

    return open_with


def test_every_mode_says_so(opened: Callable[[str], TriModeModel]) -> None:
    model = opened("encoder.norm.weight")
    modes: tuple[Any, ...] = ("ar", "diffusion", "linear_spec", "auto")
    for mode in modes:
        stream = model.stream([PROMPT], mode, **FREE)
        with pytest.raises(
            NotFiniteError, match="graph ar: expected finite logits, found NaN at position 3"
        ) as raised:
            stream.finish()
        assert raised.value.hint
        batch = model.new_batch(2)
        row = batch.add(PROMPT, mode, **FREE)
        with pytest.raises(NotFiniteError, match="graph ar"):
            list(batch)
        assert (row.is_at_work, row.result.finish_reason) == (False, None)
    with pytest.raises(NotFiniteError, match="graph ar"):
        model.generate_batch([PROMPT, PROMPT[:2]], "ar")


def test_a_drafter_that_is_broken_is_named(opened: Callable[[str], TriModeModel]) -> None:
    model = opened("encoder.layers.1.self_attn.o_proj.lora_A.weight")
    assert len(model.ar_generate([PROMPT], max_new_tokens=5)[0][0]) == 9
    with pytest.raises(
        NotFiniteError, match="graph draft: expected finite probabilities, found NaN at position 4"
    ):
        model.linear_spec_generate([PROMPT])


class Poisoned(SessionView):
    """The real session; the last row of one graph's numbers is infinite from one forward on. On a
    GPU logits stay there.
    """

    def __init__(
        self, session: Any, graph_name: str, output: int, first: int = 1, is_gpu: bool = False
    ) -> None:
        super().__init__(session)
        self._graph_name, self._output, self._left, self._is_gpu = graph_name, output, first, is_gpu
        self.num_copied = 0

    def run(self, graph_name: Any, *rest: Any) -> Any:
        outputs = [np.array(one) for one in super().run(graph_name, *rest)]
        self._left -= graph_name == self._graph_name
        if graph_name == self._graph_name and self._left <= 0:
            outputs[self._output].reshape(-1)[-1] = np.inf
        return tuple(
            self._on_gpu(one) if self._is_gpu and one.shape[-1] > 5 else one for one in outputs
        )

    def _on_gpu(self, values: np.ndarray) -> Any:
        def fetch() -> np.ndarray:
            self.num_copied += 1
            return values

        return DeviceArray(values.shape, values.dtype, fetch)


@pytest.mark.parametrize(
    ("mode", "graph_name", "output", "position"),
    [
        ("ar", "ar", 1, 3),
        ("diffusion", "draft", 1, 4 + 7),
        ("linear_spec", "verify", 2, 4 + 7),
        ("quadratic_spec", "quadratic", 2, 4 + 7),
        ("quadratic_spec", "quadratic", 4, 4 + 7),
    ],
)
def test_each_graph_is_looked_at(
    quadratic: Callable[[str], Built], mode: Any, graph_name: str, output: int, position: int
) -> None:
    whole = quadratic("three_kv_heads").model
    model = TriModeModel(whole.bundle, Poisoned(whole.session, graph_name, output))
    stream = model.stream([PROMPT], mode, block_length=8, **FREE)
    with pytest.raises(
        NotFiniteError,
        match=rf"graph {graph_name}: expected finite \w+, found inf at position {position}",
    ):
        stream.finish()
    for read in (lambda: next(stream), stream.finish, lambda: stream.result, lambda: list(stream)):
        with pytest.raises(UsageError, match=f"an error has ended: graph {graph_name}"):
            read()
    assert stream.so_far.finish_reason is None


def test_logits_on_a_gpu_are_looked_at_once_a_text_and_when_they_are_read(
    built: Callable[[str], Built],
) -> None:
    whole = built("three_kv_heads").model
    session = Poisoned(whole.session, "ar", 1, first=3, is_gpu=True)
    model = TriModeModel(whole.bundle, session)
    assert len(model.stream([PROMPT], "ar", **FREE).finish().token_ids) == 20
    assert session.num_copied == 1
    with pytest.raises(
        NotFiniteError, match="graph ar: expected finite logits, found inf at position 5"
    ):
        TriModeModel(whole.bundle, Poisoned(whole.session, "ar", 1, 3, True)).stream(
            [PROMPT], "ar", logprobs=1, **FREE
        ).finish()
    for first in (1, 2):
        again = TriModeModel(whole.bundle, Poisoned(whole.session, "verify", 2, first, True))
        with pytest.raises(NotFiniteError, match="graph verify"):
            again.stream([PROMPT], "linear_spec", temperature=1.0, block_length=1, **FREE).finish()


class RowsOnGpu(Poisoned):
    """Its logits can be copied row by row, and it counts what is copied."""

    def _on_gpu(self, values: np.ndarray) -> Any:
        def fetch(*index: int) -> np.ndarray:
            if values.dtype == np.float32:  # logits, and not a block's ids
                self.num_copied += values[index].size // values.shape[-1]
            return values[index].copy()

        return DeviceArray(values.shape, values.dtype, fetch, fetch)


@pytest.mark.parametrize("options", [{"temperature": 1.3, "seed": 3}, {"logprobs": 2}])
def test_rows_that_decide_nothing_stay_on_a_gpu(
    built: Callable[[str], Built], options: dict[str, Any]
) -> None:
    whole = built("three_kv_heads").model
    session = RowsOnGpu(whole.session, "verify", 2, first=10**6, is_gpu=True)
    choices = {"block_length": 8, **options, **FREE}
    expected = whole.stream([PROMPT], "linear_spec", **choices).finish()
    result = TriModeModel(whole.bundle, session).stream([PROMPT], "linear_spec", **choices).finish()
    assert (result.token_ids, result.nfe) == (expected.token_ids, expected.nfe)
    # a row for each token, one more for the prompt's check, and those of the last block, cut off
    assert len(result.token_ids) <= session.num_copied <= len(result.token_ids) + 1 + 8
    assert session.num_copied < 8 * result.forwards.verify
    last_of_block = RowsOnGpu(whole.session, "verify", 2, is_gpu=True)
    with pytest.raises(NotFiniteError, match=r"graph verify: .* at position 4"):
        TriModeModel(whole.bundle, last_of_block).stream(
            [PROMPT], "linear_spec", temperature=1.0, block_length=1, **FREE
        ).finish()


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear_spec"])
def test_reports_hold_finite_numbers_or_none(built: Callable[[str], Built], mode: Any) -> None:
    """With tokens forbidden, penalised beyond all measure, and cut off."""
    model = built("three_kv_heads").model
    extremes: tuple[dict[str, Any], ...] = (
        {"temperature": 1e-300},
        {"temperature": 1.0, "repetition_penalty": 1e308},
        {"temperature": 1.0, "repetition_penalty": 1e-308},
        {"repetition_penalty": 1e-308},
        {"temperature": 1e308, "top_k": 2},
        {"temperature": 1.0, "top_p": 1e-300, "min_p": 1.0},
    )
    for extreme in extremes:
        result = model.stream(
            [PROMPT],
            mode,
            logprobs=5,
            min_new_tokens=4,
            max_new_tokens=12,
            seed=1,
            eos_token_ids=(1, 2),
            **extreme,
        ).finish()
        assert result.logprobs is not None
        values = [
            value
            for one in result.logprobs
            for value in (one.logprob, *(v for _, v in one.top))
            if value is not None
        ]
        assert np.isfinite(values).all(), extreme
        assert all(0 <= token < 109 for token in result.token_ids)
        json.dumps({"logprobs": result.logprobs, "elapsed_s": result.elapsed_s}, allow_nan=False)


def test_a_sampler_that_returns_nan(tmp_path: Path) -> None:
    """sqrt(p - 0.5) of the best candidate: no number where that is improbable."""
    h, t = onnx.helper, onnx.TensorProto
    inputs = [
        h.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("input_ids", t.INT64, ("b", "r")),
            ("masked", t.BOOL, ("b", "r")),
            ("top_ids", t.INT64, ("b", "r", 5)),
            ("top_probabilities", t.FLOAT, ("b", "r", 5)),
        )
    ]
    nodes = [
        h.make_node("Gather", ["top_probabilities", "zero"], ["best"], axis=2),
        h.make_node("Sub", ["best", "half"], ["rest"]),
        h.make_node("Sqrt", ["rest"], ["scores"]),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array(0), "zero"),
        onnx.numpy_helper.from_array(np.array(0.5, np.float32), "half"),
    ]
    graph = h.make_graph(
        nodes,
        "sampler",
        inputs,
        [h.make_tensor_value_info("scores", t.FLOAT, ("b", "r"))],
        constants,
    )
    onnx.save(
        h.make_model(graph, ir_version=10, opset_imports=[h.make_opsetid("", 20)]),
        tmp_path / "sampler.onnx",
    )
    scorer = LearnedScorer(tmp_path / "sampler.onnx", 1)
    ids, probabilities = np.zeros((3, 5), np.int64), np.full((3, 5), 0.75, np.float32)
    masked = np.array([False, True, True])
    probabilities[0] = 0  # of a slot that is decided: means nothing
    assert scorer.score(np.zeros(3, np.int64), masked, ids, probabilities)[1:].tolist() == [
        0.5,
        0.5,
    ]
    probabilities[2] = 0.25
    with pytest.raises(
        NotFiniteError, match="graph sampler: expected finite scores, found NaN at slot 2"
    ):
        scorer.score(np.zeros(3, np.int64), masked, ids, probabilities)

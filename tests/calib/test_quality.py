"""Measures of quantization against slow sums in float64 over everything that was kept, and the
sensitivity search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SHAPES, config_of, write_checkpoint
from torch import Tensor
from whole_trunk import record

from trimode.calib.evaluate.quantization.candidate import Candidate, quantized_copy
from trimode.calib.evaluate.quantization.decoding import answer, divergences
from trimode.calib.evaluate.quantization.fidelity import Fidelity, ProbabilityDivergence
from trimode.calib.evaluate.quantization.job import check_output, measure, save_report
from trimode.calib.evaluate.quantization.lockstep import Lockstep
from trimode.calib.evaluate.quantization.questions import (
    Decoding,
    QualitySettings,
    Question,
    decodings_for,
    draw_questions,
)
from trimode.calib.evaluate.quantization.sensitivity import (
    DropLimit,
    _Original,
    _Trials,
    save_without,
    search,
    shortest,
)
from trimode.calib.reference.episodes import Episode, count_rows, forwards_of, pattern_for
from trimode.calib.reference.torch_session import TorchCache, TorchSession, load_trunk
from trimode.calib.scales.settings import QuantizeSettings
from trimode.errors import BuildError, CheckpointError, DependencyError, UsageError
from trimode.formats.calibration import (
    SCHEMA_VERSION,
    Calibration,
    LayerRecord,
    Scales,
    load_calibration,
)
from trimode.formats.contract import GRAPH_NAMES, GraphName
from trimode.formats.evaluation import DivergenceRecord, Report
from trimode.graphs.checkpoint import Checkpoint, describe_model, open_checkpoint
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.identity import SourceDigest
from trimode.graphs.numerics.scales import LayerScales, layer_scales
from trimode.runtime.decode.sequence import Forwards
from trimode.runtime.decode.stream import Generation

RECORDED = QuantizeSettings("int8", max_new_tokens=10)
BAD = "encoder.layers.1.mlp.up_proj"
Kept = dict[GraphName, list[np.ndarray]]


class Silent:
    def stage(self, name: str, total: int) -> Callable[[int], None]:
        return lambda _: None


class Model:
    """A random checkpoint, opened, with what it answers."""

    def __init__(self, folder: Path, shape: str = "three_kv_heads") -> None:
        changes, dtype, rank, shards = SHAPES[shape]
        self.checkpoint = open_checkpoint(
            write_checkpoint(
                folder, config_of(**changes, block_size=8), dtype=dtype, rank=rank, shards=shards
            )
        )
        self.info = describe_model(self.checkpoint)
        self.trunk = load_trunk(self.checkpoint, self.info.num_positions)
        rng = np.random.default_rng(7)
        self.questions = [
            Question(rng.integers(12, self.info.vocab_size, 5 + 9 * i).tolist()) for i in range(4)
        ]
        self.episodes = record(
            self.trunk, self.info, [q.token_ids for q in self.questions[:2]], RECORDED
        )

    @property
    def layers(self) -> list[str]:
        names = self.checkpoint.tensors.items()
        return [
            n.removesuffix(".weight")
            for n, e in names
            if len(e.shape) == 2 and "embed" not in n and "lora" not in n and "head" not in n
        ]

    def int8(self, ruined: Sequence[str] = (), *, inputs: bool = True) -> Candidate:
        """Every layer and the head at a scale for each row, and some inputs cut; all weights of the
        ruined layers become zero.
        """
        layers = layer_scales(self.int8_scales(ruined, inputs=inputs), "int8")
        return Candidate("by-hand", "int8", "by hand", None, layers, "0" * 64)

    def int8_scales(self, ruined: Sequence[str] = (), *, inputs: bool = True) -> Scales:
        """The same as a calibration has them."""
        scales: Scales = {}
        for name in (*self.layers, "diffusion_head"):
            weight = self.trunk.get_parameter(f"{name}.weight").detach().numpy()
            scales[f"{name}.weight_amax"] = np.abs(weight).max(1)
            if name in ruined:
                scales[f"{name}.weight_amax"][:] = 1e4
            if inputs:
                scales[f"{name}.input_amax"] = np.array(4, np.float32)
        return scales


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("quality") / "checkpoint")


# Formulas


def slow_snr(x: np.ndarray, y: np.ndarray) -> float:
    signal = noise = 0.0
    for a, b in zip(x.ravel().tolist(), y.ravel().tolist(), strict=True):
        signal += a * a
        noise += (a - b) ** 2
    return 10 * math.log10(signal / noise)


def slow_cosine(x: np.ndarray, y: np.ndarray) -> float:
    cosines = []
    for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        lengths = math.sqrt(math.fsum(a * a)) * math.sqrt(math.fsum(b * b))
        cosines.append(
            math.fsum(a * b) / lengths if lengths else float(not a.any() and not b.any())
        )
    return sum(cosines) / len(cosines)


def slow_divergence(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    nats, same = [], 0
    for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        p, q = (np.exp(row - row.max()) / math.fsum(np.exp(row - row.max())) for row in (a, b))
        nats.append(math.fsum(p * np.log(p / q)))
        same += int(a.argmax() == b.argmax())
    return math.fsum(nats) / len(nats), same / len(nats)


def test_fidelity_adds_up_to_the_formulas() -> None:
    rng = np.random.default_rng(0)
    x = (
        rng.standard_normal((11, 7)).astype(np.float32)
        * np.logspace(-3, 3, 11, dtype=np.float32)[:, None]
    )
    y = x + rng.standard_normal(x.shape).astype(np.float32) * 0.1
    x[4], y[4] = 0, 0  # the same: cosine 1
    x[5] = 0  # only one of them: cosine 0
    fidelity = Fidelity()
    fidelity.add(torch.from_numpy(x[:3]), torch.from_numpy(y[:3]))
    fidelity.add(torch.from_numpy(x[3:].reshape(2, 4, 7)), torch.from_numpy(y[3:].reshape(2, 4, 7)))
    assert fidelity.num_rows == 11
    assert fidelity.snr_db == pytest.approx(slow_snr(x, y), rel=1e-12)
    assert fidelity.cosine == pytest.approx(slow_cosine(x, y), rel=1e-12)


def test_divergence_adds_up_to_the_formula() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((150, 33)) * 5).astype(np.float32)
    y = x + rng.standard_normal(x.shape).astype(np.float32)
    divergence = ProbabilityDivergence()
    divergence.add(torch.from_numpy(x[:131][None]), torch.from_numpy(y[:131][None]))
    divergence.add(torch.from_numpy(x[131:]), torch.from_numpy(y[131:]))
    nats, same = slow_divergence(x, y)
    assert divergence.num_rows == 150
    assert 0 < same < 1
    assert divergence.kl_nats == pytest.approx(nats, rel=1e-10)
    assert divergence.top1_agreement == same


def test_what_does_not_differ_and_what_is_not_finite() -> None:
    x = torch.randn(3, 5)
    same, broken, outputs = Fidelity(), Fidelity(), ProbabilityDivergence()
    same.add(x, x)
    assert (same.snr_db, same.cosine) == (200.0, pytest.approx(1, abs=1e-15))
    broken.add(x, x / 0)
    outputs.add(x, torch.full_like(x, float("nan")))
    for observe in (lambda: broken.snr_db, lambda: broken.cosine, lambda: outputs.kl_nats):
        with pytest.raises(CheckpointError, match="expected finite hidden states"):
            observe()


# In lockstep


def kept_while(
    trunk: TriModeTrunk, names: list[str], episodes: list[Episode]
) -> tuple[dict[str, Kept], dict[str, dict[GraphName, list[Any]]], Kept]:
    """All outputs of these modules, by graph, in float64; their inputs as they were; and all
    logits.
    """
    now: list[GraphName] = []
    outputs: dict[str, Kept] = {name: {} for name in names}
    inputs: dict[str, dict[GraphName, list[Any]]] = {name: {} for name in names}
    logits: Kept = {}

    def hook_of(name: str) -> Any:
        def observe(_module: Any, args: tuple[Any, ...], out: Tensor) -> None:
            outputs[name].setdefault(now[0], []).append(
                out.reshape(-1, out.shape[-1]).double().numpy()
            )
            inputs[name].setdefault(now[0], []).append(args)

        return observe

    handles = [trunk.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    handles.append(
        trunk.diffusion_head.register_forward_hook(
            lambda _m, _a, out: logits.setdefault(now[0], []).append(out[0].double().numpy())
        )
    )
    for episode in episodes:
        text = TorchCache()
        for forward in forwards_of(episode):
            now[:] = [forward.graph_name]
            positions = torch.arange(forward.past_length, forward.past_length + len(forward.ids))[
                None
            ]
            hidden = trunk(
                torch.tensor([forward.ids]),
                positions,
                pattern_for(forward, text),
                forward.drafter_scale or None,
            )
            trunk.head(hidden[:, forward.first_logits_row :])
    for handle in handles:
        handle.remove()
    return outputs, inputs, logits


def test_a_comparison_is_what_two_replays_give(model: Model) -> None:
    candidate = model.int8()
    layers = candidate.linear_scales(model.trunk)
    blocks = [f"encoder.layers.{i}" for i in range(model.info.num_hidden_layers)]
    chosen = ["encoder.layers.0.self_attn.o_proj", BAD, "diffusion_head"]
    kept, inputs, logits = kept_while(model.trunk, [*blocks, *chosen], model.episodes)
    quantized = quantized_copy(model.trunk, "int8", layers)
    other_kept, _, other_logits = kept_while(quantized, blocks, model.episodes)

    comparison = Lockstep(model.trunk, quantized_copy(model.trunk, "int8", layers), chosen)
    comparison.run(model.episodes, lambda _: None)
    for graph_name in GRAPH_NAMES:
        for index, block in enumerate(blocks):
            x, y = (
                np.concatenate(kept[block][graph_name]),
                np.concatenate(other_kept[block][graph_name]),
            )
            found = comparison.accumulated[index][graph_name]
            assert found.num_rows == len(x) == count_rows(model.episodes)[graph_name]
            assert found.snr_db == pytest.approx(slow_snr(x, y), rel=1e-9)
            assert found.cosine == pytest.approx(slow_cosine(x, y), rel=1e-9)
        for name in chosen:
            y = np.concatenate(
                [
                    quantized.get_submodule(name)(*args)
                    .detach()
                    .double()
                    .numpy()
                    .reshape(-1, kept[name][graph_name][0].shape[-1])
                    for args in inputs[name][graph_name]
                ]
            )
            assert comparison.local[name][graph_name].snr_db == pytest.approx(
                slow_snr(np.concatenate(kept[name][graph_name]), y), rel=1e-9
            )
        nats, same = slow_divergence(
            np.concatenate(logits[graph_name]), np.concatenate(other_logits[graph_name])
        )
        assert comparison.outputs[graph_name].kl_nats == pytest.approx(nats, rel=1e-7)
        assert comparison.outputs[graph_name].top1_agreement == same
    # The ar graph returns the logits of a prompt's last row and of the rows after it.
    assert comparison.outputs["ar"].num_rows == sum(
        len(e.tokens) - e.prompt_length + 1 for e in model.episodes
    )


@pytest.mark.parametrize("name", [BAD, "diffusion_head"])
def test_blocks_before_the_first_quantized_layer_need_not_run_twice(
    model: Model, name: str
) -> None:
    scales = {name: model.int8().linear_scales(model.trunk)[name]}
    whole = Lockstep(model.trunk, quantized_copy(model.trunk, "int8", scales))
    part = Lockstep(
        model.trunk,
        quantized_copy(model.trunk, "int8", scales),
        first_block=1 if name == BAD else 2,
        outputs_alone=True,
    )
    whole.run(model.episodes, lambda _: None)
    part.run(model.episodes, lambda _: None)
    assert {graph_name: one.kl_nats for graph_name, one in whole.outputs.items()} == {
        graph_name: one.kl_nats for graph_name, one in part.outputs.items()
    }
    assert all(one.kl_nats > 0 for one in part.outputs.values())


def test_a_twin_shares_what_is_not_quantized(model: Model) -> None:
    before = {name: tensor.clone() for name, tensor in model.trunk.state_dict().items()}
    quantized = quantized_copy(model.trunk, "int8", {BAD: LayerScales(np.array(0.5, np.float32))})
    for name, tensor in model.trunk.named_parameters():
        assert torch.equal(tensor, before[name])
        assert (quantized.get_parameter(name).data_ptr() == tensor.data_ptr()) == (
            name != f"{BAD}.weight"
        )
    assert not torch.equal(quantized.get_parameter(f"{BAD}.weight"), before[f"{BAD}.weight"])


# The report


def report_on(
    model: Model,
    candidate: Candidate,
    questions: list[Question] | None = None,
    to_text: Any = None,
    **settings: Any,
) -> Report:
    chosen = QualitySettings(**{"max_new_tokens": 10, **settings})
    return measure(
        model.checkpoint,
        model.info,
        questions or model.questions,
        "1" * 64,
        [candidate],
        chosen,
        progress=Silent(),
        to_text=to_text,
    )


def test_a_report_of_token_ids_alone(model: Model, tmp_path: Path) -> None:
    report = report_on(model, model.int8())
    assert [p.name for p in report.precisions] == ["float32", "by-hand"]
    original, quantized = report.precisions
    assert [(d.mode, d.use_drafter) for d in quantized.decoding] == [
        ("ar", None),
        ("diffusion", None),
        ("linear-spec", True),
        ("linear-spec", False),
    ]
    assert all(d.same_tokens == 1 and d.exact_match is None for d in original.decoding)
    assert all(
        d.equals_ar == 1 and not d.partings
        for p in report.precisions
        for d in p.decoding
        if d.mode == "linear-spec"
    )
    assert quantized.outputs["ar"].kl_nats > 0
    assert quantized.local.keys() == {*model.layers, "diffusion_head"}
    # in the model's order
    assert list(quantized.local)[:2] == [
        "encoder.layers.0.self_attn.q_proj",
        "encoder.layers.0.self_attn.k_proj",
    ]
    assert len(quantized.accumulated) == model.info.num_hidden_layers
    assert report.data.num_answers == 0
    assert report.passed
    assert report_on(model, model.int8()).model_dump_json() == report.model_dump_json()
    save_report(tmp_path / "out", report, draws=False)
    assert Report.model_validate_json((tmp_path / "out" / "report.json").read_text()) == report
    check_output(tmp_path / "out")  # an earlier report may be replaced


def test_a_checkpoint_without_a_drafter(tmp_path: Path) -> None:
    plain = Model(tmp_path / "checkpoint", "plain")
    report = report_on(plain, plain.int8(), plain.questions[:2], modes=("ar", "linear_spec"))
    assert [(d.mode, d.use_drafter) for d in report.precisions[1].decoding] == [
        ("ar", None),
        ("linear-spec", None),
    ]
    # recorded, although it drafts without an adapter
    assert report.data.num_rows.keys() == set(GRAPH_NAMES)
    assert report.precisions[1].decoding[1].equals_ar is not None


def test_rows_are_those_that_calibration_replays(model: Model) -> None:
    report = report_on(model, model.int8())
    texts = [question.token_ids for question in model.questions]
    assert report.data.num_rows == count_rows(record(model.trunk, model.info, texts, RECORDED))


def test_answers_are_compared_as_text(model: Model) -> None:
    def to_text(ids: Any) -> str:
        return " ".join(map(str, ids))

    ar = Decoding("ar")
    given = answer(
        TorchSession(model.trunk), model.info, model.questions, [ar], 10, lambda _: None
    )[ar]
    answers = [
        ("x", to_text(given[0].token_ids)),
        ("something else",),
        (),
        (to_text(given[3].token_ids),),
    ]
    questions = [replace(q, answers=a) for q, a in zip(model.questions, answers, strict=True)]
    report = report_on(model, model.int8(), questions, to_text, modes=("ar",))
    assert report.data.num_answers == 3
    assert report.precisions[0].decoding[0].exact_match == pytest.approx(2 / 3)
    assert report.data.num_rows.keys() == {"ar"}


def test_partings_say_how_close_it_was(model: Model) -> None:
    def generation(ids: list[int]) -> Generation:
        return Generation(ids, "ar", 1, 1, 1.0, None, Forwards(), "length", None, None, 0.0)

    first, second, third = model.questions[:3]
    ar = [generation([20, 21, 22]), generation([20, 21]), generation([20])]
    spec = [generation([20, 40, 22]), generation([20, 21]), generation([20, 21])]
    found = divergences(TorchSession(model.trunk), [first, second, third], ar, spec)
    assert [(one.question, one.position) for one in found] == [(0, 1), (2, 1)]
    ids = np.array([[*first.token_ids, 20]])
    logits = TorchSession(model.trunk).run("ar", TorchSession(model.trunk).new_cache(), ids, 0)[1][
        0
    ]
    assert found[0].preference == pytest.approx(float(logits[21]) - float(logits[40]), abs=1e-5)
    assert found[1].preference is None


def test_a_report_says_when_self_speculation_is_not_autoregression(model: Model) -> None:
    report = report_on(model, model.int8(), modes=("ar", "linear_spec"))
    parted = (
        report.precisions[1]
        .decoding[1]
        .model_copy(
            update={"partings": (DivergenceRecord(question=0, position=3, preference=None),)}
        )
    )
    precision = report.precisions[1].model_copy(
        update={"decoding": (report.precisions[1].decoding[0], parted)}
    )
    assert not report.model_copy(update={"precisions": (report.precisions[0], precision)}).passed


def test_the_picture(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_report(tmp_path / "out", report_on(model, model.int8()), draws=True)
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_no_folder_without_its_picture(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    report = report_on(model, model.int8(), modes=("ar",))
    with pytest.raises(DependencyError, match="expected matplotlib"):
        save_report(tmp_path / "out", report, draws=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modes": ("ar", "quadratic")},
            "expected `modes` among ar,diffusion,linear-spec, found quadratic",
        ),
        ({"modes": ()}, "found none"),
        ({"modes": ("ar", "ar")}, "each of `modes` once"),
        ({"num_samples": 5}, "expected at least 5 prompts, found 4"),
        ({"num_samples": 0}, "`num_samples` of at least 1"),
        ({"device": "tpu"}, "`device` cpu or cuda"),
    ],
)
def test_settings_that_are_refused(model: Model, settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        report_on(model, model.int8(), **settings)


def test_candidates_that_are_refused(model: Model) -> None:
    with pytest.raises(CheckpointError, match="expected a calibration of this checkpoint"):
        report_on(model, replace(model.int8(), source_sha256="f" * 64))
    with pytest.raises(UsageError, match="found by-hand twice"):
        measure(
            model.checkpoint,
            model.info,
            model.questions,
            "",
            [model.int8()] * 2,
            QualitySettings(),
            progress=Silent(),
        )
    with pytest.raises(UsageError, match="at least 1 prompts, found 0"):
        measure(
            model.checkpoint,
            model.info,
            [],
            "",
            [model.int8()],
            QualitySettings(),
            progress=Silent(),
        )


def test_questions_are_drawn_with_their_answers(model: Model) -> None:
    questions = [replace(q, answers=(str(i),)) for i, q in enumerate(model.questions)]
    drawn = draw_questions(questions, 3, 5, model.info)
    assert drawn == draw_questions(questions, 3, 5, model.info)
    assert [question.answers for question in drawn] == sorted(
        question.answers for question in drawn
    )
    assert len({question.answers for question in drawn}) == 3
    assert decodings_for(("linear_spec",), has_drafter=False) == (Decoding("linear_spec"),)


# Sensitivity


@pytest.mark.parametrize("most", [0, 1, 2, 7, 42])
def test_the_shortest_head_that_holds(most: int) -> None:
    for least in range(most + 1):
        tried: list[int] = []

        def holds(kept: int, least: int = least, tried: list[int] = tried) -> bool:
            tried.append(kept)
            return kept >= least

        assert shortest(most, holds) == least
        assert len(tried) == len(set(tried)) <= 2 + math.log2(max(1, most))
        assert most not in tried or most == 0


def test_where_more_layers_kept_may_be_worse() -> None:
    holding = {3, 6, 7, 9, 12}
    found = shortest(12, lambda kept: kept in holding)
    assert found in holding
    assert found - 1 not in holding


def sensitivity(
    model: Model,
    candidate: Candidate,
    max_drop: float,
    questions: list[Question] | None = None,
    **settings: Any,
) -> Any:
    chosen = QualitySettings(
        **{"max_new_tokens": 10, "modes": ("ar", "diffusion", "linear_spec"), **settings}
    )
    budget = DropLimit(max_drop, ranking_samples=2)
    return search(
        model.checkpoint,
        model.info,
        candidate,
        questions or model.questions,
        "1" * 64,
        budget,
        chosen,
        progress=Silent(),
    )


def test_a_layer_that_is_ruined_ranks_first_and_is_kept(model: Model) -> None:
    candidate = model.int8([BAD], inputs=False)
    found = sensitivity(model, candidate, 50)
    assert next(iter(found.ranking)) == BAD
    assert list(found.ranking.values()) == sorted(found.ranking.values(), reverse=True)
    assert found.kept == (BAD,)
    assert max(found.drops_if_none_kept.values()) > 50
    assert max(found.drops.values()) <= 50
    assert found == sensitivity(model, candidate, 50)


def test_nothing_is_kept_where_the_budget_holds_at_once(model: Model) -> None:
    found = sensitivity(model, model.int8(), 100, modes=("linear_spec",))
    assert found.kept == ()
    assert found.drops == found.drops_if_none_kept
    assert found.drops.keys() == {"linear-spec"}
    assert found.data.num_tokens.keys() == {"ar", "verify"}  # what is drafted decides no token


def test_no_layer_can_be_quantized(model: Model) -> None:
    with pytest.raises(
        BuildError, match="expected a layer that can be quantized with a drop of at most 0 points"
    ):
        sensitivity(model, model.int8([*model.layers, "diffusion_head"]), 0, modes=("ar",))


def test_a_drop_is_of_answers_where_known_and_of_tokens_where_not(model: Model) -> None:
    def generation(token: int) -> Generation:
        return Generation([token], "ar", 1, 1, 1.0, None, Forwards(), "length", None, None, 0.0)

    ar = Decoding("ar")
    questions = [
        Question([1], a) for a in (("5",), ("4", "5"), ("5",), ("5",), (), (), ("5",), ("6", "8"))
    ]
    before = [generation(t) for t in (5, 5, 6, 6, 5, 5, 5, 5)]
    after = [generation(t) for t in (5, 6, 5, 7, 5, 6, 6, 7)]
    # lost: the second, the sixth (tokens), the seventh; gained: the third; wrong both times: the
    # fourth, the eighth
    trials = _Trials(
        _Original(model.trunk, model.info, questions, {ar: before}),
        model.int8(),
        {},
        [],
        QualitySettings(max_new_tokens=1),
        lambda ids: str(ids[0]),
        Silent(),
    )
    assert trials._drop(ar, {ar: after}) == pytest.approx(100 * (3 - 1) / 8)
    assert DropLimit(25).holds({"ar": 25.0, "diffusion": -3.0})
    assert not DropLimit(24.9).holds({"ar": 25.0, "diffusion": -3.0})


@pytest.mark.parametrize("max_drop", [-0.1, 100.1, float("nan"), float("inf")])
def test_budgets_that_are_refused(max_drop: float) -> None:
    with pytest.raises(UsageError, match="`max_drop` from 0 to 100 points"):
        DropLimit(max_drop).check()
    with pytest.raises(UsageError, match="`ranking_samples` of at least 1"):
        DropLimit(1, 0).check()


def digest_of(checkpoint: Checkpoint) -> str:
    digest = SourceDigest(checkpoint)
    list(digest.read_all())
    return digest.base_hexdigest()


def test_a_calibration_without_the_layers_that_are_kept(model: Model, tmp_path: Path) -> None:
    candidate = model.int8([BAD], inputs=False)
    scales = model.int8_scales([BAD], inputs=False)
    calibration = Calibration(
        schema_version=1,
        trimode_version="0",
        precision="int8",
        algorithm="smoothquant",
        block_size=None,
        source_name="it",
        source_sha256=digest_of(model.checkpoint),
        scales_sha256="",
        data=None,
        libraries={},
        layers={
            name: LayerRecord(input_amax={"ar": 1.0}, weight_snr_db=30.0)
            for name in candidate.layers
        },
    )
    found = sensitivity(model, candidate, 50)
    save_without(tmp_path / "kept", calibration, scales, found)
    record, left = load_calibration(tmp_path / "kept")
    assert record.schema_version == SCHEMA_VERSION
    assert record.algorithm == "smoothquant+sensitivity"
    assert record.sensitivity == found
    assert set(record.layers) == set(candidate.layers) - {BAD}
    assert left.keys() == {name for name in scales if not name.startswith(BAD)}
    assert record.source_sha256 == calibration.source_sha256

    text = (tmp_path / "kept" / "calibration.json").read_text()
    (tmp_path / "kept" / "calibration.json").write_text(
        text.replace('"schema_version": 2', '"schema_version": 3')
    )
    with pytest.raises(
        CheckpointError, match="expected a calibration of schema version 1 or 2, found 3"
    ):
        load_calibration(tmp_path / "kept")

    again = found.model_copy(update={"kept": ("diffusion_head",)})
    record = save_without(tmp_path / "kept", record, left, again)
    assert record.algorithm == "smoothquant+sensitivity"
    assert record.sensitivity is not None
    assert record.sensitivity.kept == (BAD, "diffusion_head")

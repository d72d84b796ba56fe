"""Finds the layers to keep in high precision, within a budget.

Layers are ranked by what quantizing one of them alone does to the probabilities. The shortest head
of that ranking is sought with which the budget on exact match holds: by bisection, for every trial
answers all questions in every mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import trimode
from trimode.calib.data.checks import check_at_least
from trimode.calib.evaluate.quantization.candidate import Candidate, quantized_copy
from trimode.calib.evaluate.quantization.decoding import (
    Answers,
    answer,
    answer_and_record,
    right_answers,
    same_tokens,
)
from trimode.calib.evaluate.quantization.job import read_original
from trimode.calib.evaluate.quantization.lockstep import Lockstep
from trimode.calib.evaluate.quantization.questions import (
    Decoding,
    QualitySettings,
    Question,
    ToText,
    draw_questions,
)
from trimode.calib.reference.device import check_device
from trimode.calib.reference.episodes import Episode, count_rows
from trimode.calib.reference.torch_session import TorchSession
from trimode.errors import BuildError, UsageError
from trimode.formats.calibration import (
    SCHEMA_VERSION,
    Calibration,
    CalibrationDataRecord,
    Scales,
    SensitivityRecord,
    save_calibration,
)
from trimode.formats.contract import GraphName, Mode, ModelInfo
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.numerics.scales import LayerScales
from trimode.progress import Progress

DEFAULT_RANKING_SAMPLES = 8
SUFFIX = "+sensitivity"
DECIDING_GRAPHS: dict[Mode, tuple[GraphName, ...]] = {
    "ar": ("ar",),
    "diffusion": ("ar", "draft"),
    "linear_spec": ("ar", "verify"),
}
"""The graphs whose rows decide a mode's tokens. What self-speculation drafts decides its speed and
no token.
"""


@dataclass(frozen=True)
class DropLimit:
    """Limits how much exact match may be lost.

    A question counts as matched if its answer is known and the text is exactly that, or if it is
    not known and the tokens are those of the checkpoint in float32. A mode's drop is 100 times the
    share that float32 matches minus the share that the quantized model does, over the same
    questions; a question lost and another one gained cancel.

    Attributes:
        max_drop: Most points, 0 to 100, that any of the modes may drop.
        ranking_samples: Number of questions, the first of those drawn, whose rows rank the layers.
    """

    max_drop: float
    ranking_samples: int = DEFAULT_RANKING_SAMPLES

    def check(self) -> None:
        """Raise :class:`UsageError` for a value that cannot be used."""
        if not 0 <= self.max_drop <= 100:  # nor NaN
            raise UsageError(
                f"expected `max_drop` from 0 to 100 points, found {self.max_drop}",
                "1 allows one question in a hundred to be lost",
            )
        check_at_least(self, ranking_samples=1)

    def holds(self, drops: dict[Mode, float]) -> bool:
        """Tell whether no mode drops more."""
        return all(drop <= self.max_drop + 1e-9 for drop in drops.values())


def search(
    checkpoint: Checkpoint,
    model: ModelInfo,
    candidate: Candidate,
    questions: Sequence[Question],
    questions_sha256: str,
    budget: DropLimit,
    settings: QualitySettings,
    *,
    progress: Progress,
    to_text: ToText | None = None,
) -> SensitivityRecord:
    """Find few layers to keep in high precision, along their ranking.

    Match is not monotonic in what is kept. So bisection finds *a* length with which the limit was
    measured to hold and with one less to fail, not always the least. Memory: eight bytes a
    parameter.

    Args:
        checkpoint: Original.
        model: Facts that decoding needs.
        candidate: Calibration of the checkpoint.
        questions: Questions to draw from.
        questions_sha256: Digest of the file that holds them.
        budget: Exact match that may be lost.
        settings: Modes that have to hold the budget, and the number of questions.
        progress: Display of the stages.
        to_text: Tokenizer's decoder; None if no answer is known.

    Raises:
        UsageError: a setting or a question cannot be used.
        CheckpointError: the checkpoint cannot be read, the calibration is of another one or does
            not fit it, or numbers are not finite.
        BuildError: no layer can be quantized within the budget.
        DeviceError: the device is not here.
    """
    settings.check()
    budget.check()
    check_device(settings.device)
    drawn = draw_questions(questions, settings.num_samples, settings.seed, model)
    trunk, _ = read_original(checkpoint, model, [candidate], settings.device, progress)
    original, episodes = _answer_originally(trunk, model, drawn, settings, progress)
    rows = [episode for one in episodes[: budget.ranking_samples] for episode in one]
    layers = candidate.linear_scales(trunk)
    ranking = rank_layers(trunk, candidate, layers, rows, progress)
    trials = _Trials(original, candidate, layers, tuple(ranking), settings, to_text, progress)
    num_kept = _fewest_kept(trials, len(ranking), budget)
    return SensitivityRecord(
        kept=tuple(ranking)[:num_kept],
        ranking=ranking,
        max_drop=budget.max_drop,
        drops=_named(trials.drops(num_kept)),
        drops_if_none_kept=_named(trials.drops(0)),
        data=_data_record(questions_sha256, drawn, settings, rows),
        max_new_tokens=settings.max_new_tokens,
        scales_sha256=candidate.scales_sha256 or "",
    )


def rank_layers(
    trunk: TriModeTrunk,
    candidate: Candidate,
    layers: dict[str, LayerScales],
    episodes: Sequence[Episode],
    progress: Progress,
) -> dict[str, float]:
    """Rank the layers by sensitivity, the most sensitive first.

    It is the divergence (nats a row) of the probabilities when that layer alone is quantized, over
    the same with all of them quantized, graph by graph, and the largest of these: graphs differ in
    scale by orders of magnitude, and the budget is for each mode. Unlike an error at the layer's
    own output it knows what the rest of the model makes of it. The cost is a replay a layer.
    """
    advance = progress.stage("rank layers", len(episodes) * (len(layers) + 1))

    def divergences(some: dict[str, LayerScales], first_block: int) -> dict[GraphName, float]:
        quantized = quantized_copy(trunk, candidate.precision, some)
        comparison = Lockstep(trunk, quantized, first_block=first_block, outputs_alone=True)
        comparison.run(episodes, advance)
        return {graph_name: one.kl_nats for graph_name, one in comparison.outputs.items()}

    whole = divergences(layers, 0)
    blocks = len(trunk.encoder.layers)
    scores = {}
    for name, scales in layers.items():
        alone = divergences({name: scales}, _block_of(name, blocks))
        scores[name] = max(
            alone[graph_name] / whole[graph_name] if whole[graph_name] else 0.0
            for graph_name in whole
        )
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))


def shortest(most: int, holds: Callable[[int], bool]) -> int:
    """Find by bisection a number that holds after one that fails.

    It lies from 0 to ``most``, which is known to hold and not tried.
    """
    if most == 0 or holds(0):
        return 0
    failed, held = 0, most
    while held - failed > 1:
        middle = (failed + held) // 2
        failed, held = (failed, middle) if holds(middle) else (middle, held)
    return held


def save_without(
    output: Path, calibration: Calibration, scales: Scales, found: SensitivityRecord
) -> Calibration:
    """Write the calibration without the scales of the layers that are kept.

    They are added to those of an earlier search.
    """
    earlier = calibration.sensitivity.kept if calibration.sensitivity is not None else ()
    kept = set(found.kept)
    record = calibration.model_copy(
        update={
            "schema_version": SCHEMA_VERSION,
            "trimode_version": trimode.__version__,
            "algorithm": calibration.algorithm.removesuffix(SUFFIX) + SUFFIX,
            "layers": {
                name: layer for name, layer in calibration.layers.items() if name not in kept
            },
            "sensitivity": found.model_copy(update={"kept": (*earlier, *found.kept)}),
        }
    )
    save_calibration(
        output,
        record,
        {name: values for name, values in scales.items() if name.rpartition(".")[0] not in kept},
    )
    return record


def decoding_of(mode: Mode, model: ModelInfo) -> Decoding:
    """Return how a mode is run: with any drafter there is."""
    return Decoding(mode, use_drafter=mode == "linear_spec" and model.has_drafter)


class _Original(NamedTuple):
    """Holds the original trunk with its answers."""

    trunk: TriModeTrunk
    model: ModelInfo
    questions: Sequence[Question]
    answers: Answers


@dataclass(frozen=True)
class _Trials:
    """Measures what is lost with so many layers kept, each number once."""

    original: _Original
    candidate: Candidate
    layers: dict[str, LayerScales]
    ranking: Sequence[str]
    settings: QualitySettings
    to_text: ToText | None
    progress: Progress
    _drops: dict[int, dict[Mode, float]] = field(default_factory=dict)

    def drops(self, num_kept: int) -> dict[Mode, float]:
        """Return the points that each mode drops; see :class:`DropLimit`."""
        if num_kept not in self._drops:
            self._drops[num_kept] = self._measure(num_kept)
        return self._drops[num_kept]

    def _measure(self, num_kept: int) -> dict[Mode, float]:
        trunk, model, questions, answers = self.original
        layers = {name: self.layers[name] for name in self.ranking[num_kept:]}
        quantized = quantized_copy(trunk, self.candidate.precision, layers)
        advance = self.progress.stage(f"{num_kept} layers kept", len(questions) * len(answers))
        found = answer(
            TorchSession(quantized),
            model,
            questions,
            tuple(answers),
            self.settings.max_new_tokens,
            advance,
        )
        return {decoding.mode: self._drop(decoding, found) for decoding in answers}

    def _drop(self, decoding: Decoding, found: Answers) -> float:
        questions, answers = self.original.questions, self.original.answers[decoding]
        before = right_answers(questions, answers, self.to_text)
        after = right_answers(questions, found[decoding], self.to_text)
        same = same_tokens(answers, found[decoding])
        lost = sum(
            (True if one is None else one) - (is_same if other is None else other)
            for one, other, is_same in zip(before, after, same, strict=True)
        )
        return 100 * lost / len(questions)


def _answer_originally(
    trunk: TriModeTrunk,
    model: ModelInfo,
    questions: Sequence[Question],
    settings: QualitySettings,
    progress: Progress,
) -> tuple[_Original, list[list[Episode]]]:
    """Answer in every mode, and record the forwards that decide tokens."""
    recorded: dict[Decoding, Sequence[GraphName]] = {
        decoding_of(mode, model): DECIDING_GRAPHS[mode] for mode in settings.modes
    }
    advance = progress.stage("answer", len(questions) * len(recorded))
    answers, episodes = answer_and_record(
        trunk, model, questions, recorded, settings.max_new_tokens, advance
    )
    return _Original(trunk, model, questions, answers), episodes


def _fewest_kept(trials: _Trials, num_layers: int, budget: DropLimit) -> int:
    """Find a length of the ranking with which the budget holds."""
    num_kept = shortest(num_layers, lambda kept: budget.holds(trials.drops(kept)))
    if num_kept == num_layers:
        raise BuildError(
            f"expected a layer that can be quantized with a drop of at most {budget.max_drop:g} "
            f"points, found none in {num_layers}",
            "allow a larger `max_drop`, or build without quantization",
        )
    return num_kept


def _data_record(
    sha256: str, drawn: Sequence[Question], settings: QualitySettings, rows: Sequence[Episode]
) -> CalibrationDataRecord:
    return CalibrationDataRecord(
        sha256=sha256, num_samples=len(drawn), seed=settings.seed, num_tokens=count_rows(rows)
    )


def _block_of(layer: str, num_blocks: int) -> int:
    """Return a layer's decoder block; the number of blocks for the head."""
    parts = layer.split(".")
    return int(parts[2]) if parts[:2] == ["encoder", "layers"] else num_blocks


def _named(drops: dict[Mode, float]) -> dict[str, float]:
    return {mode.replace("_", "-"): drop for mode, drop in drops.items()}

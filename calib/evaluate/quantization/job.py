"""Measures the cost of quantization, and writes the report's folder."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import trimode
from trimode.calib.evaluate.quantization.candidate import (
    COMPUTE_TYPE,
    Candidate,
    quantized_copy,
    weight_bytes,
)
from trimode.calib.evaluate.quantization.decoding import (
    Answers,
    answer,
    answer_and_record,
    divergences,
    right_answers,
    same_tokens,
)
from trimode.calib.evaluate.quantization.fidelity import Fidelity, ProbabilityDivergence
from trimode.calib.evaluate.quantization.lockstep import ByGraph, Lockstep
from trimode.calib.evaluate.quantization.questions import (
    Decoding,
    QualitySettings,
    Question,
    ToText,
    decodings_for,
    draw_questions,
    graphs_for,
)
from trimode.calib.reference.device import check_device
from trimode.calib.reference.episodes import Episode, count_rows
from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.calib.scales.statistics import LOSSLESS_DB
from trimode.errors import UsageError
from trimode.formats.contract import GraphName, Mode, ModelInfo
from trimode.formats.evaluation import (
    SCHEMA_VERSION,
    DecodingRecord,
    DivergenceRecord,
    FidelityRecord,
    MeasuredPrecision,
    ModeName,
    OutputFidelity,
    QuestionsRecord,
    Report,
)
from trimode.formats.files import check_replaceable, staged_replacement
from trimode.formats.texts import name_of
from trimode.formats.versions import PYTHON, versions
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.identity import SourceDigest
from trimode.progress import Progress
from trimode.report.quantization_figure import draw
from trimode.runtime.decode.stream import Generation

REPORT = "report.json"
FIGURE = "report.png"
LIBRARIES = ("torch", "numpy")
_LOSSLESS = FidelityRecord(snr_db=LOSSLESS_DB, cosine=1.0)


def measure(
    checkpoint: Checkpoint,
    model: ModelInfo,
    questions: Sequence[Question],
    questions_sha256: str,
    candidates: Sequence[Candidate],
    settings: QualitySettings,
    *,
    progress: Progress,
    to_text: ToText | None = None,
) -> Report:
    """Measure what each candidate loses against the checkpoint in float32.

    The original's answers are recorded and replayed, as calibration does it
    (:mod:`trimode.calib.reference.episodes`). Memory: eight bytes a parameter, of the original and
    of one candidate at a time.

    Args:
        checkpoint: Original.
        model: Facts that decoding needs.
        questions: Questions to draw from.
        questions_sha256: Digest of the file that holds them.
        candidates: At least one, each with a name of its own.
        settings: Questions and modes to measure.
        progress: Display of the stages.
        to_text: Tokenizer's decoder; None where no answer is known.

    Raises:
        UsageError: a setting or a question cannot be used, or two candidates have one name.
        CheckpointError: the checkpoint cannot be read, a candidate is of another one or does not
        fit it, or numbers are not finite.
        BuildError: a scale is too large for the compute type.
        DeviceError: the device is not here.
    """
    settings.check()
    _check_names(candidates)
    check_device(settings.device)
    drawn = draw_questions(questions, settings.num_samples, settings.seed, model)
    trunk, digest = read_original(checkpoint, model, candidates, settings.device, progress)
    bench = _answered(trunk, model, drawn, settings, progress, to_text)
    measured = [_measure_candidate(bench, candidate, checkpoint) for candidate in candidates]
    return Report(
        schema_version=SCHEMA_VERSION,
        trimode_version=trimode.__version__,
        source_name=name_of(checkpoint.path),
        source_sha256=digest,
        data=QuestionsRecord(
            sha256=questions_sha256,
            num_questions=len(drawn),
            num_answers=sum(bool(question.answers) for question in drawn),
            seed=settings.seed,
            num_rows=count_rows(bench.episodes),
        ),
        modes=tuple(map(_name, settings.modes)),
        max_new_tokens=settings.max_new_tokens,
        block_length=model.block_size,
        thresholds={_name(decoding.mode): decoding.threshold for decoding in bench.answers},
        compute_type=COMPUTE_TYPE,
        dense_bytes=weight_bytes(checkpoint, COMPUTE_TYPE),
        precisions=(_original_record(bench, checkpoint, measured[0]), *measured),
        libraries=versions((PYTHON, *LIBRARIES)),
    )


def save_report(output: Path, report: Report, *, draws: bool) -> None:
    """Write the folder, all or nothing; replace an earlier report.

    Args:
        output: Folder that :func:`check_output` accepts.
        report: Measurements to write.
        draws: Whether to draw the figure too.

    Raises:
        DependencyError: a figure is wanted, and matplotlib is not installed.
    """
    with staged_replacement(output, REPORT) as staged:
        (staged / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if draws:
            draw(report, staged / FIGURE)


def check_output(output: Path) -> None:
    """Raise :class:`UsageError` where ``output`` exists and is neither empty nor a report."""
    check_replaceable(output, REPORT, "a report")


def read_original(
    checkpoint: Checkpoint,
    model: ModelInfo,
    candidates: Sequence[Candidate],
    device: str,
    progress: Progress,
) -> tuple[TriModeTrunk, str]:
    """Read the trunk in float32 and the checkpoint's digest.

    Raises :class:`CheckpointError` where a candidate is of another checkpoint.
    """
    advance = progress.stage("read checkpoint", 1)
    digest = SourceDigest(checkpoint)
    trunk = load_trunk(checkpoint, model.num_positions, read=digest.read)
    for candidate in candidates:
        candidate.check_source(digest.base_hexdigest())
    advance(1)
    return trunk.to(device), digest.hexdigest()


@dataclass(frozen=True)
class _Bench:
    """Holds the original with its answers, to compare every candidate with."""

    trunk: TriModeTrunk
    model: ModelInfo
    questions: Sequence[Question]
    answers: Answers
    episodes: Sequence[Episode]
    settings: QualitySettings
    progress: Progress
    to_text: ToText | None

    def decoding_records(self, trunk: TriModeTrunk, answers: Answers) -> tuple[DecodingRecord, ...]:
        """Compare the answers of ``trunk`` with the original's and with each other."""
        return tuple(self._decoding_record(trunk, answers, decoding) for decoding in answers)

    def _decoding_record(
        self, trunk: TriModeTrunk, answers: Answers, decoding: Decoding
    ) -> DecodingRecord:
        generations, autoregressive = answers[decoding], answers.get(Decoding("ar"))
        verdicts = right_answers(self.questions, generations, self.to_text)
        right = [known for known in verdicts if known is not None]
        num_tokens = sum(len(one.token_ids) for one in generations)
        nfe = sum(one.nfe for one in generations)
        speculates = decoding.mode == "linear_spec"
        equals_ar: float | None = None
        partings: tuple[DivergenceRecord, ...] = ()
        if speculates and autoregressive:
            partings = self._partings(trunk, autoregressive, generations)
            equals_ar = 1 - len(partings) / len(generations)
        return DecodingRecord(
            mode=_name(decoding.mode),
            use_drafter=decoding.use_drafter if speculates and self.model.has_drafter else None,
            same_tokens=_share(same_tokens(self.answers[decoding], generations)),
            exact_match=_share(right) if right else None,
            num_tokens=num_tokens,
            nfe=nfe,
            tokens_per_forward=num_tokens / nfe,
            acceptance_length=_acceptance_length(generations),
            equals_ar=equals_ar,
            partings=partings,
        )

    def _partings(
        self,
        trunk: TriModeTrunk,
        autoregressive: Sequence[Generation],
        speculative: Sequence[Generation],
    ) -> tuple[DivergenceRecord, ...]:
        found = divergences(TorchSession(trunk), self.questions, autoregressive, speculative)
        return tuple(DivergenceRecord(**asdict(one)) for one in found)


def _answered(
    trunk: TriModeTrunk,
    model: ModelInfo,
    drawn: Sequence[Question],
    settings: QualitySettings,
    progress: Progress,
    to_text: ToText | None,
) -> _Bench:
    """Answer the questions by the original, and record its forwards."""
    decodings = decodings_for(settings.modes, has_drafter=model.has_drafter)
    advance = progress.stage("answer", len(drawn) * len(decodings))
    answers, by_question = answer_and_record(
        trunk, model, drawn, _recorded(decodings), settings.max_new_tokens, advance
    )
    episodes = [episode for one in by_question for episode in one]
    return _Bench(trunk, model, drawn, answers, episodes, settings, progress, to_text)


def _acceptance_length(generations: Sequence[Generation]) -> float | None:
    """Return the mean over all cycles; None without any."""
    cycles = sum(one.forwards.verify for one in generations)
    accepted = sum((one.acceptance_length or 0) * one.forwards.verify for one in generations)
    return accepted / cycles if cycles else None


def _measure_candidate(
    bench: _Bench, candidate: Candidate, checkpoint: Checkpoint
) -> MeasuredPrecision:
    layers = candidate.linear_scales(bench.trunk)
    quantized = quantized_copy(bench.trunk, candidate.precision, layers)
    decoding = bench.decoding_records(quantized, _answer(bench, candidate.name, quantized))
    # it numbers the quantized's layers anew: after these have answered
    lockstep = Lockstep(bench.trunk, quantized, _in_model_order(bench.trunk, layers))
    advance = bench.progress.stage(f"{candidate.name}: compare", len(bench.episodes))
    lockstep.run(bench.episodes, advance)
    return MeasuredPrecision(
        name=candidate.name,
        precision=candidate.precision,
        algorithm=candidate.algorithm,
        scales_sha256=candidate.scales_sha256,
        num_quantized=len(layers),
        weight_bytes=weight_bytes(checkpoint, COMPUTE_TYPE, candidate.precision, layers),
        local={name: _fidelity(by_graph) for name, by_graph in lockstep.local.items()},
        accumulated=tuple(_fidelity(by_graph) for by_graph in lockstep.accumulated),
        outputs={graph_name: _output_fidelity(one) for graph_name, one in lockstep.outputs.items()},
        decoding=decoding,
    )


def _answer(bench: _Bench, name: str, quantized: TriModeTrunk) -> Answers:
    num_answers = len(bench.questions) * len(bench.answers)
    return answer(
        TorchSession(quantized),
        bench.model,
        bench.questions,
        tuple(bench.answers),
        bench.settings.max_new_tokens,
        bench.progress.stage(f"{name}: answer", num_answers),
    )


def _in_model_order(trunk: TriModeTrunk, layers: Container[str]) -> list[str]:
    return [name for name, _ in trunk.named_modules() if name in layers]


def _original_record(
    bench: _Bench, checkpoint: Checkpoint, other: MeasuredPrecision
) -> MeasuredPrecision:
    """Record the original beside itself.

    Its answers are measured, and nothing else differs. ``other`` says which rows there are.
    """
    return MeasuredPrecision(
        name="float32",
        precision=None,
        algorithm=None,
        scales_sha256=None,
        num_quantized=0,
        weight_bytes=weight_bytes(checkpoint, "float32"),
        local={},
        accumulated=tuple(dict.fromkeys(by_graph, _LOSSLESS) for by_graph in other.accumulated),
        outputs={
            graph_name: OutputFidelity(num_rows=one.num_rows, kl_nats=0.0, top1_agreement=1.0)
            for graph_name, one in other.outputs.items()
        },
        decoding=bench.decoding_records(bench.trunk, bench.answers),
    )


def _recorded(decodings: Sequence[Decoding]) -> dict[Decoding, Sequence[GraphName]]:
    """Choose the graphs to record; self-speculation beside the drafter's has none."""
    with_drafter = any(decoding.use_drafter for decoding in decodings)
    spare = Decoding("linear_spec") if with_drafter else None
    return {
        decoding: () if decoding == spare else graphs_for([decoding.mode]) for decoding in decodings
    }


def _output_fidelity(one: ProbabilityDivergence) -> OutputFidelity:
    return OutputFidelity(
        num_rows=one.num_rows, kl_nats=one.kl_nats, top1_agreement=one.top1_agreement
    )


def _fidelity(by_graph: ByGraph) -> dict[GraphName, FidelityRecord]:
    return {graph_name: _record(one) for graph_name, one in by_graph.items()}


def _record(one: Fidelity) -> FidelityRecord:
    return FidelityRecord(snr_db=one.snr_db, cosine=one.cosine)


def _check_names(candidates: Sequence[Candidate]) -> None:
    names = [candidate.name for candidate in candidates]
    twice = [name for name in names if names.count(name) > 1 or name == "float32"]
    if twice or not names:
        raise UsageError(
            "expected calibrations with names of their own, "
            f"found {twice[0] + ' twice' if twice else 'none'}",
            "pass each in `calibrations` once",
        )


def _share(holds: Sequence[bool]) -> float:
    return sum(holds) / len(holds)


def _name(mode: Mode) -> ModeName:
    return cast("ModeName", mode.replace("_", "-"))

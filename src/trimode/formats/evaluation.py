"""Declares ``report.json``: the measured cost of quantization.

Shares are from 0 to 1.
"""

from __future__ import annotations

from typing import Literal

from trimode.formats.calibration import QuantizedPrecision
from trimode.formats.contract import DType, GraphName
from trimode.formats.record import Record

SCHEMA_VERSION = 1
ModeName = Literal["ar", "diffusion", "linear-spec"]


class FidelityRecord(Record):
    """Holds signal-to-noise ratio and mean cosine.

    The ratio is in decibels, 200 where nothing differs. Formulas are in
    :mod:`trimode.calib.evaluate.quantization.fidelity`.
    """

    snr_db: float
    cosine: float


class OutputFidelity(Record):
    """Compares probabilities with the original's.

    Attributes:
        num_rows: Number of tokens whose logits a graph returned.
        kl_nats: Mean divergence from the original's probabilities, in nats.
        top1_agreement: Share of tokens with the original's most probable choice.
    """

    num_rows: int
    kl_nats: float
    top1_agreement: float


class DivergenceRecord(Record):
    """Names a question that self-speculation and autoregression answer differently.

    Both have the same weights.

    Attributes:
        question: Index of the question among those that were drawn.
        position: Position of the first token that differs, counted from 0.
        preference: Lead of AR's logit over the other's there, near 0 where rounding decided; None
            where one text ends first.
    """

    question: int
    position: int
    preference: float | None


class DecodingRecord(Record):
    """Measures one mode over all questions.

    Attributes:
        mode: Name of the mode.
        use_drafter: True with the drafter, False without; None where there is no choice.
        same_tokens: Share of questions with the tokens that the original gives in this mode.
        exact_match: Share of the questions with known answers that are answered with exactly one of
            them; None where no answer is known.
        num_tokens: Number of generated tokens.
        nfe: Number of forwards, as the reference counts them.
        tokens_per_forward: ``num_tokens / nfe``.
        acceptance_length: Mean number of tokens a draft-and-verify cycle.
        equals_ar: Share of questions that self-speculation answers with the tokens of ``ar`` over
            the same weights; None where ``ar`` was not asked for.
        partings: Questions that it answers with other tokens.
    """

    mode: ModeName
    use_drafter: bool | None
    same_tokens: float
    exact_match: float | None
    num_tokens: int
    nfe: int
    tokens_per_forward: float
    acceptance_length: float | None
    equals_ar: float | None
    partings: tuple[DivergenceRecord, ...]


class MeasuredPrecision(Record):
    """Measures one precision.

    Attributes:
        name: ``float32``, or the calibration as it was named.
        precision: Type of the quantized layers; None for float32.
        algorithm: Algorithm that found the scales.
        scales_sha256: Digest of the calibration's scales; None for ``rtn`` and float32.
        num_quantized: Number of quantized layers.
        weight_bytes: Size of codes, scales and high-precision weights in ``compute_type``; for
            float32, four bytes a weight. Position tables do not count: they are the same for all.
        local: Fidelity of a layer's output given the original's input, by layer and graph.
        accumulated: Fidelity of the hidden states after each decoder layer, by graph, with
            everything before quantized.
        outputs: Fidelity of the outputs, by graph.
        decoding: Measurements of the modes.
    """

    name: str
    precision: QuantizedPrecision | None
    algorithm: str | None
    scales_sha256: str | None
    num_quantized: int
    weight_bytes: int
    local: dict[str, dict[GraphName, FidelityRecord]]
    accumulated: tuple[dict[GraphName, FidelityRecord], ...]
    outputs: dict[GraphName, OutputFidelity]
    decoding: tuple[DecodingRecord, ...]


class QuestionsRecord(Record):
    """Names the questions.

    Attributes:
        sha256: Digest of the file.
        num_questions: Number of questions drawn.
        num_answers: Number of questions with a known answer.
        seed: Seed of the draw.
        num_rows: Number of tokens compared, by graph; those of ``ar`` are whole texts, prompt and
            answer.
    """

    sha256: str
    num_questions: int
    num_answers: int
    seed: int
    num_rows: dict[GraphName, int]


class Report(Record):
    """Holds the contents of ``report.json``.

    Attributes:
        schema_version: Version of this schema.
        trimode_version: Version of the library that wrote the file.
        source_name: Name of the checkpoint's folder.
        source_sha256: Digest of the checkpoint, by :class:`trimode.graphs.identity.SourceDigest`.
        data: Questions that were asked.
        modes: Modes that were measured.
        max_new_tokens: Limit on the tokens of each answer.
        block_length: Block length of diffusion and drafts.
        thresholds: Confidence thresholds by mode.
        compute_type: Type of scales and dense weights in ``weight_bytes`` and, for scales alone, in
            the measurements. Products are in float32.
        dense_bytes: Size of all weights in that type, with nothing quantized.
        precisions: Measurements of the precisions, float32 first.
        libraries: Versions of the libraries that took part.
    """

    schema_version: int
    trimode_version: str
    source_name: str
    source_sha256: str
    data: QuestionsRecord
    modes: tuple[ModeName, ...]
    max_new_tokens: int
    block_length: int
    thresholds: dict[ModeName, float]
    compute_type: DType
    dense_bytes: int
    precisions: tuple[MeasuredPrecision, ...]
    libraries: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether self-speculation gives autoregression's tokens in every precision."""
        return not any(
            record.partings for precision in self.precisions for record in precision.decoding
        )


def decoding_name(record: DecodingRecord) -> str:
    """The mode, and whether it did without the drafter."""
    return f"{record.mode}, no drafter" if record.use_drafter is False else record.mode

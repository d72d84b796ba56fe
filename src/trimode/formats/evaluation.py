"""``report.json``: what quantization costs, measured. Shares are from 0 to 1."""

from __future__ import annotations

from typing import Literal

from trimode.formats.calibration import QuantizedPrecision
from trimode.formats.contract import DType, Role
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
    """Probabilities against the original's, over the rows whose logits a graph returns."""

    num_rows: int
    kl_nats: float
    top1_agreement: float


class DivergenceRecord(Record):
    """A question that self-speculation answers otherwise than autoregression of the same weights.

    Attributes:
        question: counted from 0, among those that were drawn.
        position: Position of the first token that differs, counted from 0.
        preference: AR's logit above the other's there; next to nothing where rounding decided. None
            where one text ends first.
    """

    question: int
    position: int
    preference: float | None


class DecodingRecord(Record):
    """One way of decoding, over all questions.

    Attributes:
        use_drafter: None where there is no choice.
        same_tokens: share of questions with the tokens that the original gives in this mode.
        exact_match: share of questions with a known answer that are answered with exactly this
        text; None where none is known.
        num_tokens: that were generated.
        nfe: forward passes as the reference counts them.
        tokens_per_forward: ``num_tokens / nfe``.
        acceptance_length: tokens of a draft-and-verify cycle, mean over all cycles.
        equals_ar: self-speculation: share of questions with the tokens of ``ar`` over the same
        weights; None where ``ar`` was not asked for.
        partings: the other questions.
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
    """One precision.

    Attributes:
        name: ``float32``, or the calibration as it was named.
        precision: None = float32.
        algorithm: that found the scales.
        scales_sha256: Digest of the calibration's scales; None for ``rtn`` and float32.
        num_quantized: layers.
        weight_bytes: codes, scales, and what stays in high precision in ``report.compute_type``; of
            float32 four bytes a weight. Without position tables, which are the same for all.
        local: by layer and role, of the layer's output given the original's input.
        accumulated: by decoder block and role, of the hidden states after it, everything before
        being quantized.
        outputs: by role.
        decoding: by mode.
    """

    name: str
    precision: QuantizedPrecision | None
    algorithm: str | None
    scales_sha256: str | None
    num_quantized: int
    weight_bytes: int
    local: dict[str, dict[Role, FidelityRecord]]
    accumulated: tuple[dict[Role, FidelityRecord], ...]
    outputs: dict[Role, OutputFidelity]
    decoding: tuple[DecodingRecord, ...]


class QuestionsRecord(Record):
    """The questions.

    Attributes:
        sha256: Digest of the file.
        num_questions: that were drawn.
        num_answers: Questions with a known answer.
        num_rows: that were compared, by role; ``ar`` rows are those of whole texts, prompt and
            answer.
    """

    sha256: str
    num_questions: int
    num_answers: int
    seed: int
    num_rows: dict[Role, int]


class Report(Record):
    """The contents of ``report.json``.

    Attributes:
        source_sha256: the checkpoint's digest, as :class:`trimode.graphs.identity.SourceDigest`
        takes it.
        compute_type: Type of scales and dense weights in ``weight_bytes`` and, scales alone, in
            what was measured. Products are in float32.
        dense_bytes: the weights in that type, nothing being quantized.
        thresholds: by mode.
        precisions: float32 first.
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

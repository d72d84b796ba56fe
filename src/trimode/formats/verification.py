"""Declares the records of ``verification.json``.

They say what was compared, how much it differed, and whether that is allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from trimode.errors import BundleError, TrimodeError
from trimode.formats.contract import DType, GraphName, Mode
from trimode.formats.disk import what_is_wrong
from trimode.formats.files import check_file_place, replace_text
from trimode.formats.manifest import PrecisionName
from trimode.formats.record import Record
from trimode.formats.texts import Unreadable, read_bytes

VERIFICATION = "verification.json"
_COPY = "verify a copy of the bundle"

Subject = Literal["target", "portable"]


class _Judged(Record):
    passed: bool


class CheckpointRecord(Record):
    """Names the checkpoint that was compared against.

    Attributes:
        name: Name of the checkpoint's folder.
        sha256: Digest of the checkpoint, as in the manifest's ``source``.
        is_source: True if the bundle was built from these very tensors and this ``config.json``.
    """

    name: str
    sha256: str
    is_source: bool


class BoundsRecord(Record):
    """Holds the tolerances (see :mod:`trimode.compiler.verify.tolerance`).

    Attributes:
        dtype: Compute type that the bound follows from.
        relative: Largest error of logits, keys and values over the largest reference value; the
            mean error may be a sixth of it.
    """

    dtype: DType
    relative: float


class OutputRecord(_Judged):
    """Compares one output of a graph.

    Where the reference itself is NaN or infinite, scale and tolerances are 0, and nothing passes.

    Attributes:
        name: Name of the output.
        max_error: Largest absolute error; None where there is no such number: another shape, NaN,
            infinity.
        mean_error: Mean absolute error, likewise.
        scale: Largest absolute reference value; for probabilities, the largest reference logit at
            this place.
        tolerance: Limit on ``max_error``.
        mean_tolerance: Limit on ``mean_error``.
    """

    name: str
    max_error: float | None
    mean_error: float | None
    scale: float
    tolerance: float
    mean_tolerance: float


class IdsRecord(_Judged):
    """Compares token ids of a graph.

    Attributes:
        name: Name of the output.
        num_compared: Number of ids.
        num_equal: Number of them equal to the reference's.
        largest_preference: Lead of the reference's own id where ids differ, in logits
            (``greedy_ids``) or in probability (``top_ids``); None where all are equal, or an id is
            no id.
        tolerance: Limit on ``largest_preference``.
    """

    name: str
    num_compared: int
    num_equal: int
    largest_preference: float | None
    tolerance: float


class CodesRecord(_Judged):
    """Compares the quantized inputs of a graph.

    Attributes:
        num_compared: Number of inputs.
        num_other: Number of them that are not the code nearest to the reference's value.
        refused: Number of codes that no rounding error explains, by layer.
    """

    num_compared: int
    num_other: int
    refused: dict[str, int]


class WeightsParity(_Judged):
    """Compares the bundle's quantized weights with the checkpoint's.

    The checkpoint's are quantized by the bundle's scales.

    Attributes:
        num_layers: Number of quantized layers.
        num_compared: Number of weights.
        differs: Number of weights that are not the same, bit for bit, by layer.
    """

    num_layers: int
    num_compared: int
    differs: dict[str, int]


class ScalesParity(_Judged):
    """Compares the bundle's scales with those of its calibration.

    Attributes:
        calibration: Name of the calibration, or ``rtn``.
        num_layers: Number of quantized layers.
        differs: Scales that are not the same, bit for bit, or that only one of the two has.
    """

    calibration: str
    num_layers: int
    differs: tuple[str, ...]


class GraphParity(_Judged):
    """Compares one forward of one graph with the reference.

    Attributes:
        subject: ``target``: the target's session; ``portable``: the portable graph on a ragged
            batch, in ONNX Runtime on the CPU.
        graph: Name of the graph.
        positions: Number of cached tokens of each sequence of the batch.
        rows: Number of new tokens.
        use_drafter: True with the adapter, False without; None for graphs that have none.
        outputs: Comparisons of the outputs.
        ids: Comparisons of the token ids.
        codes: Codes of quantized inputs, where visible; the reference has taken them over.
        has_accepted_length: True if ``accepted_length`` follows from the graph's own greedy ids;
            None for graphs without it.
    """

    subject: Subject
    graph: GraphName
    positions: tuple[int, ...]
    rows: int
    use_drafter: bool | None
    outputs: tuple[OutputRecord, ...]
    ids: tuple[IdsRecord, ...]
    codes: CodesRecord | None = None
    has_accepted_length: bool | None


class TokenParity(_Judged):
    """Compares one generation with another over the same prompt.

    Attributes:
        mode: Mode of the generation.
        against: ``reference``: the same mode over the torch trunk; ``ar``: the target's own ar
            mode.
        use_drafter: True with the drafter, False without; None where there is no choice.
        prompt: Index of the prompt.
        prompt_length: Number of the prompt's tokens.
        num_tokens: Length of the longer of the two.
        num_equal: Number of places where both have the same token.
        first_divergence: Place of the first token that differs, from 0; None where all are equal.
        preference: Lead of the reference's own choice at that place, in logits, or in probability
            for a diffusion slot; None where all are equal or it cannot be told.
        tolerance: Limit on ``preference``; None where tokens must be equal.
        nfe, other_nfe: Numbers of forwards of the two.
    """

    mode: Mode
    against: Literal["reference", "ar"]
    use_drafter: bool | None
    prompt: int
    prompt_length: int
    num_tokens: int
    num_equal: int
    first_divergence: int | None
    preference: float | None
    tolerance: float | None
    nfe: int
    other_nfe: int


class SamplerParity(_Judged):
    """Compares the bundle's learned sampler with the network it comes from.

    Attributes:
        name: Name of the trained sampler's folder.
        num_scores: Number of scores compared.
        max_error: Largest absolute error; None where a score is no number.
        tolerance: Limit on ``max_error``.
    """

    name: str
    num_scores: int
    max_error: float | None
    tolerance: float


class Verification(_Judged):
    """Holds the verification of one target of one precision.

    Attributes:
        date: Time in UTC, ISO 8601.
        precision: Precision that was verified.
        target: Target that was verified.
        backend, device, compute_dtype: Library, device and compute type of the target.
        manifest_sha256: Digest of the bundle's ``manifest.json``; another one means another bundle
            than the one verified.
        checkpoint: Checkpoint that was compared against.
        seed: Seed for random tokens.
        long_position: Position of the long comparisons.
        original_length: Rope's length before scaling; None where it is not scaled.
        weight_dtype: Type of the bundle's weights that are not quantized; the reference's are
            rounded to it, too.
        bounds: Tolerances by subject.
        weights, scales: Results for a quantized precision; ``scales`` None where there was nothing
            to compare them with.
        graphs: Comparisons of graphs.
        tokens: Comparisons of generations.
        sampler: Comparison of the learned sampler; None where the bundle has none, or it was not
            named.
        notes: Comparisons left out, with the reason.
        versions: Versions of the library and of what it used.
    """

    date: str
    precision: PrecisionName
    target: str
    backend: str
    device: str
    compute_dtype: DType
    manifest_sha256: str
    checkpoint: CheckpointRecord
    seed: int
    long_position: int
    original_length: int | None
    weight_dtype: DType
    bounds: dict[Subject, BoundsRecord]
    weights: WeightsParity | None
    scales: ScalesParity | None
    graphs: tuple[GraphParity, ...]
    tokens: tuple[TokenParity, ...]
    sampler: SamplerParity | None = None
    notes: tuple[str, ...]
    versions: dict[str, str]


class Verifications(Record):
    """Holds ``verification.json``: the latest record of each precision and target."""

    schema_version: Literal[2] = 2
    verifications: tuple[Verification, ...]

    def replaced(self, new: Verification) -> Verifications:
        """Replace the record of the same target and precision."""
        others = (
            old
            for old in self.verifications
            if (old.precision, old.target) != (new.precision, new.target)
        )
        return Verifications(verifications=(*others, new))


def read_verifications(bundle: Path) -> Verifications:
    """Read ``verification.json`` of a bundle.

    Empty if it is missing, damaged, or of another schema.

    Raises:
        BundleError: it may not be read.
    """
    path = bundle / VERIFICATION
    try:
        data = read_bytes(path)
    except Unreadable as error:
        if error.is_missing:
            return Verifications(verifications=())
        raise BundleError(
            f"{path}: expected a file that can be read, found: {error.reason}",
            "delete it, or check its permissions",
        ) from error
    try:
        return Verifications.model_validate_json(data)
    except ValidationError:
        return Verifications(verifications=())


def write_verification(verification: Verification, bundle: Path) -> Path:
    """Write a result into ``verification.json`` of a bundle.

    Replaces an earlier one for the same target, whole or not at all.

    Raises:
        BundleError: the bundle cannot be written to.
    """
    path = bundle / VERIFICATION
    try:
        replace_text(
            path, read_verifications(bundle).replaced(verification).model_dump_json(indent=1) + "\n"
        )
    except OSError as error:
        found = f"{path}: expected to be able to write, found: {what_is_wrong(error, path)}"
        raise BundleError(found, _COPY) from error
    return path


def check_verification_place(bundle: Path) -> None:
    """Check, before the work, that a bundle can take the result.

    Raises:
        BundleError: the bundle cannot be written to.
    """
    try:
        check_file_place(bundle / VERIFICATION)
    except TrimodeError as error:
        raise BundleError(error.message, _COPY) from error

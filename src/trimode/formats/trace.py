"""Declares the trace of a decoding, and reads it.

It is a file of JSON lines. The first line is the header. Then come, for each run, its start, its
forwards as they happened, and its end. Runs that were at work at the same time lie between each
other; ``run`` tells them apart. A line of kind ``texts`` comes before the first line that names its
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from trimode.errors import UsageError
from trimode.formats.contract import Mode
from trimode.formats.record import OtherVersion, Record, first_fault
from trimode.formats.texts import Unreadable, lines_of, parse_json, read_text

SCHEMA_VERSION: Literal[1] = 1
Phase = Literal["prefill", "decode", "denoise", "draft", "verify", "commit", "quadratic"]
Graph = Literal["ar", "draft", "verify", "quadratic"]


class TraceRecord(Record):
    """Holds one line of a trace."""

    def line(self) -> str:
        """One line of JSON; values that are not known are left out."""
        return self.model_dump_json(exclude_none=True)


class TraceHeader(TraceRecord):
    """Begins a trace.

    Attributes:
        schema_version: Version of this schema.
        trimode_version: Version of the library that wrote it.
        model: Name of the checkpoint.
        target, precision: Target and precision that ran.
        mask_token_id: Token of a masked position.
        eos_token_ids: Tokens that end a text.
    """

    kind: Literal["header"] = "header"
    schema_version: Literal[1] = SCHEMA_VERSION
    trimode_version: str
    model: str
    target: str
    precision: str
    mask_token_id: int
    eos_token_ids: tuple[int, ...]


class RunStart(TraceRecord):
    """Begins one run.

    Attributes:
        run: Number of the run.
        mode: Mode of the run.
        prompt_ids: Token ids of the prompt.
        max_new_tokens, block_length, threshold, temperature: Options of the run.
    """

    kind: Literal["start"] = "start"
    run: int
    mode: Mode
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    block_length: int
    threshold: float
    temperature: float


class TokenTexts(TraceRecord):
    """Gives the texts of tokens that occur from here on.

    Attributes:
        texts: Text of each token id; special tokens by their names.
    """

    kind: Literal["texts"] = "texts"
    texts: dict[int, str]


class Candidate(Record):
    """Names a token that a forward held possible, and its probability."""

    token_id: int
    probability: float


class PositionRecord(Record):
    """Says what a forward told of one position of the text.

    Attributes:
        position: Place in the text; the prompt begins at 0.
        token_id: Token that came there in this step; None = it is not decided.
        confidence: Probability of that token, where the forward has told it.
        top: Most probable tokens, best first; empty where they stay on a GPU.
    """

    position: int
    token_id: int | None = None
    confidence: float | None = None
    top: tuple[Candidate, ...] = ()


class ModeSwitch(Record):
    """Says that mode ``auto`` goes on in another way.

    Attributes:
        before: Block length of the step before; 1 stands for AR.
        after: Block length from here on.
        reason: Reason in words.
    """

    before: int
    after: int
    reason: str


class ForwardRecord(TraceRecord):
    """Holds one forward of a run, and what became of it.

    Attributes:
        run: Number of the run.
        graph: Graph that ran.
        phase: Purpose of the forward.
        num_parts: Forwards that it took: an engine may read a prompt in parts.
        past_length: Tokens cached before it; the first token of ``input_ids`` has this position.
        input_ids: Tokens that it read, masks included.
        positions: Findings on positions that were not decided.
        drafted: Tokens that it verified as drafts, from position ``past_length + 1`` on.
        accepted: Number of these that became text.
        rejected: Number of these from the first wrong one on; drafts behind the end of the text
            are neither.
        committed: Tokens that became text with this forward.
        text: Text that became certain with them; None without a tokenizer.
        cached_length: Tokens cached afterwards.
        nfe: Forwards of the run so far, as the reference counts them.
        ms: Milliseconds from asking for the forward to its effect.
        end_ms: Milliseconds from the start of the run to the effect.
        switch: Change of the way that began with this forward.
    """

    kind: Literal["forward"] = "forward"
    run: int
    graph: Graph
    phase: Phase
    num_parts: int = 1
    past_length: int
    input_ids: tuple[int, ...]
    positions: tuple[PositionRecord, ...] = ()
    drafted: tuple[int, ...] = ()
    accepted: int = 0
    rejected: int = 0
    committed: tuple[int, ...] = ()
    text: str | None = None
    cached_length: int
    nfe: int
    ms: float
    end_ms: float
    switch: ModeSwitch | None = None


class CommitRecord(TraceRecord):
    """Holds tokens that became text without a forward.

    They were forced, or known before.

    Attributes:
        run: Number of the run.
        committed: Tokens.
        text: Text that became certain with them; None without a tokenizer.
        cached_length: Tokens cached afterwards.
        end_ms: Milliseconds from the start of the run.
    """

    kind: Literal["commit"] = "commit"
    run: int
    committed: tuple[int, ...]
    text: str | None = None
    cached_length: int
    end_ms: float


class RunEnd(TraceRecord):
    """Ends one run.

    Attributes:
        run: Number of the run.
        finish_reason: ``stop`` or ``length``; None = it did not come to its end.
        text: Text that was held back until the end; None without a tokenizer.
        num_tokens: Tokens of the answer.
        nfe: Forwards as the reference counts them.
        forwards: Executed forwards by phase.
        tokens_per_forward: Tokens of the answer divided by ``nfe``.
        acceptance_length: Tokens of a draft-and-verify cycle on average; None without cycles.
        seed: Seed of the draws; None where nothing was drawn.
        elapsed_s: Seconds of the run.
        error: Error that ended it, if any.
    """

    kind: Literal["end"] = "end"
    run: int
    finish_reason: Literal["stop", "length"] | None = None
    text: str | None = None
    num_tokens: int = 0
    nfe: int = 0
    forwards: dict[Phase, int] = Field(default_factory=dict)
    tokens_per_forward: float = 0.0
    acceptance_length: float | None = None
    seed: int | None = None
    elapsed_s: float = 0.0
    error: str | None = None


StepRecord = ForwardRecord | CommitRecord
Line = Annotated[
    TraceHeader | RunStart | TokenTexts | ForwardRecord | CommitRecord | RunEnd,
    Field(discriminator="kind"),
]
_LINE: TypeAdapter[Any] = TypeAdapter(Line)


@dataclass
class TracedRun:
    """Holds one run of a trace.

    Attributes:
        start: Prompt and options.
        steps: Forwards, and commits without one, in their order.
        end: Result; None where the trace was cut off.
    """

    start: RunStart
    steps: list[StepRecord] = field(default_factory=list)
    end: RunEnd | None = None

    @property
    def forwards(self) -> list[ForwardRecord]:
        """Forwards in their order."""
        return [step for step in self.steps if isinstance(step, ForwardRecord)]

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the answer."""
        return [token for step in self.steps for token in step.committed]

    @property
    def text(self) -> str | None:
        """Text of the answer; None without a tokenizer."""
        pieces = [step.text for step in self.steps]
        pieces += [self.end.text if self.end else None]
        known = [piece for piece in pieces if piece is not None]
        return "".join(known) if known else None


@dataclass
class Trace:
    """Holds a trace that was read.

    Attributes:
        header: Model that ran.
        texts: Text of each token id that occurs; empty without a tokenizer.
        runs: Runs by number.
    """

    header: TraceHeader
    texts: dict[int, str] = field(default_factory=dict)
    runs: dict[int, TracedRun] = field(default_factory=dict)


def read_trace(path: Path) -> Trace:
    """Read a trace that ``trimode run --trace`` wrote.

    Raises:
        UsageError: it is missing, or no trace of this version.
    """
    try:
        return _read(read_text(path))
    except Unreadable as error:
        hint = "name a file that `trimode run --trace FILE` wrote"
        raise UsageError(f"{path}: {error}", hint) from error


def _read(text: str) -> Trace:
    trace: Trace | None = None
    for number, line in lines_of(text):
        if trace is None:
            _check_version(parse_json(line))
        record = _parse(number, line)
        if trace is None:
            if not isinstance(record, TraceHeader):
                raise Unreadable(f"line {number}: expected a header first, found {record.kind}")
            trace = Trace(record)
        else:
            _add(trace, number, record)
    if trace is None:
        raise Unreadable("expected the header of a trace, found no line")
    return trace


def _check_version(header: Any) -> None:
    version = header.get("schema_version") if isinstance(header, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise OtherVersion([SCHEMA_VERSION], version)


def _parse(number: int, line: str) -> Any:
    try:
        return _LINE.validate_json(line)
    except ValidationError as error:
        raise Unreadable(f"line {number}: {first_fault(error)}") from error


def _add(trace: Trace, number: int, record: Any) -> None:
    if isinstance(record, TokenTexts):
        trace.texts |= record.texts
        return
    if isinstance(record, RunStart) and record.run not in trace.runs:
        trace.runs[record.run] = TracedRun(record)
        return
    run = None if isinstance(record, TraceHeader | RunStart) else trace.runs.get(record.run)
    if run is None or run.end is not None:
        raise Unreadable(f"line {number}: expected a line of a run at work, found {record.kind}")
    if isinstance(record, ForwardRecord | CommitRecord):
        run.steps.append(record)
    else:
        run.end = record

"""Declares ``result.json`` and ``requests.jsonl`` of a load test.

Names are those of ``vllm bench serve`` wherever the meaning is equal. What vLLM keeps as arrays of
one file (``ttfts``, ``itls``, ``latencies``) is a line per request here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field, ValidationError

from trimode.errors import UsageError
from trimode.formats.record import Record, first_fault, read_record
from trimode.formats.texts import Unreadable, lines_of, read_text

SCHEMA_VERSION = 1
RESULT = "result.json"
REQUESTS = "requests.jsonl"
PAGE = "report.html"


class SpeculationRecord(Record):
    """Counts drafts and what was accepted, in vLLM's fields and meaning.

    Attributes:
        num_spec_steps: Number of verify steps.
        num_draft_tokens: Number of tokens proposed.
        num_accepted_draft_tokens: Number of proposals accepted, without bonus tokens.
        acceptance_histogram: Number of steps by the number of tokens that they accepted.
        mean_acceptance_length: Tokens per step with the bonus token, ``1 + accepted / steps``.
        draft_acceptance_rate: ``accepted / proposed``.
    """

    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    acceptance_histogram: dict[int, int] = Field(default_factory=dict)
    mean_acceptance_length: float
    draft_acceptance_rate: float

    @classmethod
    def summed(cls, records: Iterable[SpeculationRecord]) -> SpeculationRecord | None:
        """Add up the counts; None if there is no step."""
        steps = drafted = accepted = 0
        histogram: dict[int, int] = {}
        for one in records:
            steps += one.num_spec_steps
            drafted += one.num_draft_tokens
            accepted += one.num_accepted_draft_tokens
            for length, count in one.acceptance_histogram.items():
                histogram[length] = histogram.get(length, 0) + count
        if not steps:
            return None
        return cls(
            num_spec_steps=steps,
            num_draft_tokens=drafted,
            num_accepted_draft_tokens=accepted,
            acceptance_histogram=dict(sorted(histogram.items())),
            mean_acceptance_length=1 + accepted / steps,
            draft_acceptance_rate=accepted / drafted if drafted else 0.0,
        )


class RequestRecord(Record):
    """Describes one request of a run.

    Attributes:
        run: Index of the run in ``result.json``.
        question_id: Name of the conversation.
        category: Category of the conversation; may be empty.
        turn: Turn of the conversation, from 0.
        start_time: Seconds from the run's first measured request to the sending of this one.
        ttft: Seconds to the first text; None if there was none.
        latency: Seconds to the last event; None if the request failed.
        itl: Seconds between one event with text and the next.
        input_tokens: Tokens of the prompt, as the server counted; None if it did not.
        cached_tokens: Tokens of the prompt that the server did not have to compute.
        output_tokens: Tokens of the answer, as the server counted, or else events with text.
        status: HTTP status; None if there was no answer.
        finish_reason: Reason that the server gave; None if it gave none.
        error: Fault in one line; empty if there was none.
        text: Answer.
        speculative_decoding: Acceptance, if the server told.
    """

    run: int
    question_id: str
    category: str
    turn: int
    start_time: float
    ttft: float | None
    latency: float | None
    itl: tuple[float, ...]
    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int
    status: int | None
    finish_reason: str | None
    error: str
    text: str
    speculative_decoding: SpeculationRecord | None = None


class TimesRecord(Record):
    """Summarises times of requests in milliseconds; None if no request has them.

    ``ttft`` is the time to the first text, ``tpot`` the time per token after the first,
    ``itl`` the time between two events with text, ``e2el`` the time to the last event.
    """

    mean_ttft_ms: float | None = None
    median_ttft_ms: float | None = None
    std_ttft_ms: float | None = None
    p90_ttft_ms: float | None = None
    p99_ttft_ms: float | None = None
    mean_tpot_ms: float | None = None
    median_tpot_ms: float | None = None
    std_tpot_ms: float | None = None
    p90_tpot_ms: float | None = None
    p99_tpot_ms: float | None = None
    mean_itl_ms: float | None = None
    median_itl_ms: float | None = None
    std_itl_ms: float | None = None
    p90_itl_ms: float | None = None
    p99_itl_ms: float | None = None
    mean_e2el_ms: float | None = None
    median_e2el_ms: float | None = None
    std_e2el_ms: float | None = None
    p90_e2el_ms: float | None = None
    p99_e2el_ms: float | None = None


class ServedRecord(Record):
    """Tells what the server counted in a run and its warm-up.

    Fields are None where it does not say.

    Attributes:
        hit_rate: Share of the prompts' tokens that were reused.
        rows_per_forward: Mean number of rows of a forward.
        forward_share: Share of the forwards by graph: which modes were at work.
        mode_switches: Number of changes of the mode.
        spec_decode_acceptance_length: Tokens per verify step with the bonus token.
        spec_decode_acceptance_rate: Accepted share of the drafts in percent, as in vLLM.
        cpu_share: Processor seconds per second, if the server runs here.
        rss_first_bytes: Mean resident memory in the first part of the run.
        rss_last_bytes: Mean resident memory in the last part.
        rss_part_s: Seconds of such a part: a minute, or less in a short run.
        counters: Growth of each counter of ``/metrics``, labels included.
    """

    hit_rate: float | None = None
    rows_per_forward: float | None = None
    forward_share: dict[str, float] = Field(default_factory=dict)
    mode_switches: int | None = None
    spec_decode_acceptance_length: float | None = None
    spec_decode_acceptance_rate: float | None = None
    cpu_share: float | None = None
    rss_first_bytes: int | None = None
    rss_last_bytes: int | None = None
    rss_part_s: float | None = None
    counters: dict[str, float] = Field(default_factory=dict)


class RunRecord(TimesRecord):
    """Measures one mode at one load.

    Attributes:
        mode: Mode that was asked for; None = the server's own.
        max_concurrency: Conversations at a time; None = an open loop.
        request_rate: Conversations begun per second; None = a closed loop.
        burstiness: Shape of the gamma distribution of the gaps; 1 is a Poisson process.
        partial: Whether the run was interrupted.
        duration: Seconds from the first measured request to the end of the last one.
        request_goodput: Requests per second within the limits; None without limits.
        good_share: Share of all requests, failed ones too, that are within the limits.
        mean_concurrent_requests: Mean number of requests under way.
        output_throughput_per_user: Output tokens per second of one client.
        mean_tokens_per_chunk: Tokens per event with text.
        client_cpu_share: Processor seconds per second that this client used.
        acceptance_by_category: Acceptance, summed over each category.
        errors: Number of failed requests by fault.
    """

    mode: str | None = None
    max_concurrency: int | None = None
    request_rate: float | None = None
    burstiness: float | None = None
    partial: bool = False
    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None = None
    good_share: float | None = None
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    mean_concurrent_requests: float
    output_throughput_per_user: float | None = None
    mean_tokens_per_chunk: float | None = None
    output_tokens_counted_by: str
    client_cpu_share: float
    acceptance: SpeculationRecord | None = None
    acceptance_by_category: dict[str, SpeculationRecord] = Field(default_factory=dict)
    errors: dict[str, int] = Field(default_factory=dict)
    served: ServedRecord = ServedRecord()


class DifferenceRecord(Record):
    """Shows an answer that differs from its reference."""

    run: int
    question_id: str
    turn: int
    expected: str
    found: str


class CheckRecord(Record):
    """Compares greedy answers with those of single requests.

    Attributes:
        compared: Number of answers compared.
        differing: Number of answers that differ in text, number of tokens or reason of the end.
        differences: First differing answers.
    """

    compared: int
    differing: int
    differences: tuple[DifferenceRecord, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every answer equals its reference."""
        return not self.differing


class WorkloadRecord(Record):
    """Describes the requests that were sent."""

    data: str
    data_sha256: str
    num_questions: int
    num_turns: int
    endpoint: str
    shared_prefix: int
    max_tokens: int
    min_tokens: int | None
    temperature: float
    seed: int
    warmup_s: float
    duration_s: float | None
    num_prompts: int | None
    goodput_ms: dict[str, float]


class ServerRecord(Record):
    """Describes the server as it describes itself.

    Attributes:
        url: Address of the server.
        model: Name of the model that was asked.
        bundle_sha256: Digest of the bundle, if the server tells.
        version: Fields of ``/version``, if there is one.
    """

    url: str
    model: str
    bundle_sha256: str | None = None
    version: dict[str, str] = Field(default_factory=dict)


class LoadResult(Record):
    """Holds the contents of the file; ``runs`` are in the order measured."""

    schema_version: int = SCHEMA_VERSION
    trimode_version: str
    commit: str | None
    command: str
    date: str
    machine: dict[str, str | int]
    partial: bool
    server: ServerRecord
    workload: WorkloadRecord
    runs: tuple[RunRecord, ...]
    check: CheckRecord | None = None


def read_result(place: Path) -> LoadResult:
    """Read the result of a load test, from its folder or file.

    Raises:
        UsageError: it is missing, or not of the form.
    """
    path = place / RESULT if place.is_dir() else place
    try:
        return read_record(path, LoadResult, (SCHEMA_VERSION,))
    except Unreadable as error:
        raise UsageError(
            f"{path}: expected the result of a load test, found: {error.reason}",
            "name a folder that `trimode bench serve` wrote",
        ) from error


def read_requests(folder: Path) -> Iterator[RequestRecord]:
    """Read the requests of a load test.

    Raises:
        UsageError: the file is missing, or not of the form.
    """
    path = folder / REQUESTS
    try:
        for number, line in lines_of(read_text(path)):
            try:
                yield RequestRecord.model_validate_json(line)
            except ValidationError as error:
                raise Unreadable(f"line {number}: {first_fault(error)}") from error
    except Unreadable as error:
        raise UsageError(
            f"{path}: expected requests of a load test, found: {error.reason}",
            "name a folder that `trimode bench serve` wrote",
        ) from error

"""Lists choices for the running rows, and predicts what each gives."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.load.state import RowState

AR_STEPS_IN_A_CYCLE = 2
"""AR forwards while another group drafts and verifies: one beside each of its forwards."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Describes one choice for all rows that are not pinned.

    Attributes:
        name: Name of the choice, the same whichever rows it is made for.
        block_length: Block length of the rows that are no exceptions; 1 stands for AR.
        exceptions: Block lengths of other rows, by key.
    """

    name: str
    block_length: int
    exceptions: Mapping[Hashable, int] = field(default_factory=lambda: MappingProxyType({}))

    def length_of(self, row: RowState) -> int:
        """Return a row's block length; a pinned row keeps its own."""
        if row.is_pinned:
            return row.block_length
        return self.exceptions.get(row.key, self.block_length)


@dataclass(frozen=True, slots=True)
class Prospect:
    """Tells what a candidate is expected to give.

    Attributes:
        candidate: Choice that it is about.
        tokens_per_ms: Tokens of use, of all rows together.
        round_ms: Milliseconds until each row has had a cycle.
        longest_ms: Milliseconds of its longest forward, which a prompt may have to wait for.
        slowest_ms: Milliseconds a token of the row that is served worst.
    """

    candidate: Candidate
    tokens_per_ms: float
    round_ms: float
    longest_ms: float
    slowest_ms: float


def uniform(lengths: Iterable[int]) -> Iterator[Candidate]:
    """Yield AR for all rows, and each block length for all."""
    for length in (AR_STEP, *lengths):
        yield Candidate(name_of(length), length)


def splits(rows: Sequence[RowState], block_length: int) -> Iterator[Candidate]:
    """Yield splits: rows that expect least in AR, others in blocks.

    In AR are the rows up to the middle of the range, or half of the rows.
    """
    free = [row for row in rows if not row.is_pinned]
    expected = {row.key: row.expected_tokens(block_length) for row in free}
    ordered = sorted(free, key=lambda row: expected[row.key])
    if len(ordered) < 2:
        return
    least, most = expected[ordered[0].key], expected[ordered[-1].key]
    low = [row for row in ordered if expected[row.key] < (least + most) / 2]
    halves = ordered[: len(ordered) // 2]
    for name, members in (("low", low), ("half", halves)):
        if members:
            exceptions = MappingProxyType({row.key: AR_STEP for row in members})
            yield Candidate(f"{name} in ar, {name_of(block_length)}", block_length, exceptions)


def name_of(block_length: int) -> str:
    """Return a block length's name in logs and metrics."""
    return "ar" if block_length == AR_STEP else f"linear_spec {block_length}"


def judge(candidate: Candidate, rows: Sequence[RowState], table: CostTable) -> Prospect:
    """Predict what a candidate gives in a round.

    In a round each row has a cycle, or steps of AR. Rows in diffusion and quadratic
    self-speculation are left out, since they take the same time whatever the others do.
    """
    groups: dict[int, list[RowState]] = {}
    for row in rows:
        if row.mode not in ("diffusion", "quadratic_spec"):
            groups.setdefault(candidate.length_of(row), []).append(row)
    repeats = 1 if set(groups) == {AR_STEP} else AR_STEPS_IN_A_CYCLE
    round_ms = longest_ms = tokens = 0.0
    least_tokens = float("inf")
    for length, members in groups.items():
        times = forward_times(table, length, members)
        count = repeats if length == AR_STEP else 1
        found = [count * row.expected_tokens(length) for row in members]
        round_ms += count * sum(times)
        longest_ms = max(longest_ms, *times)
        tokens += sum(found)
        least_tokens = min(least_tokens, *found)
    return Prospect(candidate, tokens / round_ms, round_ms, longest_ms, round_ms / least_tokens)


def forward_times(table: CostTable, length: int, members: Sequence[RowState]) -> list[float]:
    """Predict the milliseconds of each forward of a group's cycle."""
    cached = max(row.cached_length for row in members)
    if length == AR_STEP:
        return [table.ms("ar", len(members), 1, cached)]
    return [
        table.ms("draft", len(members), length, cached),
        table.ms("verify", len(members), length, cached),
    ]

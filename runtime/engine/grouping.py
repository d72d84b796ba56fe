"""Chooses which forwards of a batch's rows run next, and together.

What a row's tokens are does not depend on any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from trimode.formats.contract import GraphName
from trimode.runtime.decode.forward import Forward

PATIENCE = 4
"""Steps that a row waits before its forward comes first, however many wait for another. While a row
waits, the forwards of the others are smaller than they could be: of 1, 2, 4 and 16 the last took
most forwards by far, the others hardly differed (AR of the demo, batches of 8).
"""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """Holds a row and the forward that it waits for.

    Attributes:
        row: Place of the row.
        forward: Forward that it waits for.
        since: Step from which on it has waited.
    """

    row: int
    forward: Forward
    since: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens of its forward."""
        return len(self.forward.token_ids)


@dataclass(frozen=True, slots=True)
class JointForward:
    """Describes a forward over neighbouring rows.

    Attributes:
        graph_name: Graph that runs.
        drafter_scale: Scale of the drafter, for ``draft``.
        num_tokens: Tokens of each row; shorter forwards are padded on the right.
        rows: Rows that run, also those between the members, which have not asked for it.
        members: Rows that have asked for it, ascending.
    """

    graph_name: GraphName
    drafter_scale: float
    num_tokens: int
    rows: range
    members: tuple[Waiting, ...]


Length = Callable[[int], int]
"""Cached tokens of a row, as of now."""
Fits = Callable[[int, int], bool]
"""Whether a row of so many cached tokens takes a forward of so many more; it must not reach beyond
the cache or the position tables.
"""


def choose_group(waiting: Sequence[Waiting], now: int) -> list[Waiting]:
    """Choose the rows whose forwards come next, all of one kind.

    It is the kind that most rows wait for, of equal ones that of the row that waits longest. Once a
    row has waited for :data:`PATIENCE` steps, its kind comes first.
    """
    groups = by_kind(waiting)
    oldest = min(waiting, key=lambda one: one.since)
    if now - oldest.since >= PATIENCE:
        return next(group for group in groups if oldest in group)
    return max(groups, key=lambda group: (len(group), -min(one.since for one in group)))


def by_kind(waiting: Iterable[Waiting]) -> list[list[Waiting]]:
    """Group rows by the kind of their forward.

    Rows of one kind may run together.
    """
    groups: dict[tuple[GraphName, int, float], list[Waiting]] = {}
    for one in waiting:
        groups.setdefault(_kind(one), []).append(one)
    return list(groups.values())


def join_forwards(
    group: Sequence[Waiting], length_of: Length, fits: Fits, free_tokens: int
) -> Iterator[JointForward]:
    """Yield a group's forwards, as few as possible.

    Each is to be run before the next is asked for.

    A row between two members goes along, with padding that is written behind what it has cached,
    where that is harmless and costs little.

    Args:
        group: Rows of one kind.
        length_of: Function asked for the cached tokens of rows that go along. Some of these rows
            may have gone on with a forward before.
        fits: Function that says whether padding has room; a member's own tokens always have.
        free_tokens: Number of tokens of such rows that are cheaper than a further forward.
    """
    rest = sorted(group, key=lambda one: one.row)
    while rest:
        longest = max(one.num_tokens for one in rest)
        taken = [
            one
            for one in rest
            if one.num_tokens == longest or fits(one.forward.past_length, longest)
        ]
        rest = [one for one in rest if one not in taken]
        for members in _stretches(taken, longest, length_of, fits, free_tokens):
            first = members[0].forward
            yield JointForward(
                first.graph_name,
                first.drafter_scale,
                longest,
                range(members[0].row, members[-1].row + 1),
                tuple(members),
            )


def _kind(waiting: Waiting) -> tuple[GraphName, int, float]:
    """Return the kind of a forward.

    Forwards of one kind may run together. Those of ``ar`` may differ in length, by less than a
    factor of two, which bounds the padding.
    """
    forward, num_tokens = waiting.forward, waiting.num_tokens
    return (
        forward.graph_name,
        (num_tokens - 1).bit_length() if forward.graph_name == "ar" else num_tokens,
        forward.drafter_scale,
    )


def _stretches(
    group: Sequence[Waiting], num_tokens: int, length_of: Length, fits: Fits, free_tokens: int
) -> Iterator[list[Waiting]]:
    """Yield the members in ascending order, in stretches that run together.

    A stretch ends where the rows between two members cannot go along.
    """
    members: list[Waiting] = []
    for one in group:
        between = range(members[-1].row + 1, one.row) if members else range(0)
        if len(between) * num_tokens > free_tokens or not all(
            fits(length_of(row), num_tokens) for row in between
        ):
            yield members
            members = []
        members.append(one)
    yield members

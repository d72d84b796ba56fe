"""Forwards as requests, so that an algorithm is written for one text and runs alone or among others.

What needs a forward is a generator: it yields a :class:`Forward` and is sent its outputs. Whoever drives it decides when the forward runs, and with
what others. :func:`perform` runs each at once; :class:`~trimode.runtime.batch.Batch` collects those of several texts and runs them together. Plain
generators do this in the typed language itself, without a thread or a second stack for each text; the price is a ``yield from`` wherever a forward
may be needed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from trimode.graphs.contract import Role
from trimode.runtime.session import Ids

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """A forward that a text needs.

    Attributes:
        token_ids: ``(T,)``.
        past_length: tokens cached before them.
        drafter_scale: of ``draft``.
    """

    role: Role
    token_ids: Ids
    past_length: int
    drafter_scale: float = 0.0


Outputs = tuple[Any, ...]
"""Those of the role's contract for one text, without the batch dimension. They are good until the same text asks for another forward of the role,
those of ``verify`` only until it asks for any or commits tokens: in a batch they may lie where the next forward of another text writes its own."""

Effect = Generator[Forward, Outputs, T]
"""What needs forwards and returns a ``T``."""

Steps = Generator[Forward | list[int], Outputs, None]
"""An algorithm at work: it yields the forwards that it needs, and in between the tokens that it commits."""

Answer = Callable[[Forward], Outputs]


def perform(effect: Effect[T], answer: Answer) -> T:
    """Run an effect to its end, each forward at once."""
    try:
        forward = next(effect)
        while True:
            forward = effect.send(answer(forward))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def drive(steps: Steps, answer: Answer) -> Generator[list[int], None, None]:
    """Run an algorithm, each forward at once; yields what it commits."""
    for item in steps:
        while isinstance(item, Forward):
            try:
                item = steps.send(answer(item))
            except StopIteration:
                return
        yield item

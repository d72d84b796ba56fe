"""Lets algorithms ask for forwards as requests.

So an algorithm is written for one text and runs alone or among others.

What needs a forward is a generator: it yields a :class:`Forward` and is sent its outputs. Whoever
drives it decides when the forward runs, and with what others. :func:`perform` runs each at once;
:class:`~trimode.runtime.engine.batch.Batch` collects those of several texts and runs them together.
Plain generators do this in the typed language itself, without a thread or a second stack for each
text; the price is a ``yield from`` wherever a forward may be needed.

:func:`ask` looks at what comes back: numbers that are not finite are an error here, before any
token is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trimode.errors import BundleError
from trimode.formats.contract import GraphName, slots_written
from trimode.formats.finite import first_not_finite
from trimode.runtime.sessions.base import DeviceArray, Ids

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """Describes a forward that a text needs.

    Attributes:
        token_ids: Tokens ``(T,)``; a block of ``draft`` is filled in place once its outputs are
            there.
        past_length: Number of tokens cached before them.
        drafter_scale: Scale of the drafter's adapter, for ``draft``.
    """

    graph_name: GraphName
    token_ids: Ids
    past_length: int
    drafter_scale: float = 0.0

    @property
    def end(self) -> int:
        """Number of slots that the cache must have."""
        return self.past_length + slots_written(self.graph_name, len(self.token_ids))


Outputs = tuple[Any, ...]
"""Those of the graph's contract for one text, without the batch dimension. They are good until the
same text asks for another forward of the graph, those of ``verify`` only until it asks for any or
commits tokens: in a batch they may lie where the next forward of another text writes its own.
"""

Effect = Generator[Forward, Outputs, T]
"""What needs forwards and returns a ``T``."""

Steps = Generator[Forward | list[int], Outputs, None]
"""An algorithm at work: it yields the forwards that it needs, and in between the tokens that it
commits.
"""

Answer = Callable[[Forward], Outputs]

_FLOATS: dict[GraphName, dict[int, str]] = {
    "ar": {1: "logits"},
    "draft": {1: "probabilities"},
    "verify": {2: "logits"},
    "quadratic": {2: "logits", 4: "probabilities"},
}
"""Which outputs of a graph are no ids, and what they are called."""
_HINT = (
    "run `trimode verify` on the bundle; build it in bf16 or fp32 where fp16 is too narrow for it"
)


class NotFiniteError(BundleError):
    """Says that a graph has returned numbers that are not finite.

    They are NaN or infinite, and no token can be made of them.
    """


def ask(forward: Forward) -> Effect[Outputs]:
    """Ask for a forward, and look at the numbers that it returns.

    Logits on a GPU stay there: they are looked at after the first tokens of a text, and else when
    somebody reads them with :func:`read_logits`.

    Raises:
        NotFiniteError: one is NaN or infinite.
    """
    outputs = yield forward
    for index, what in _FLOATS[forward.graph_name].items():
        values = outputs[index]
        if not isinstance(values, DeviceArray):
            _check_finite(forward, what, values)
        elif forward.graph_name == "ar" and forward.past_length == 0:
            read_logits(forward, values)
    return outputs


def read_logits(forward: Forward, logits: Any, first_row: int | None = None) -> NDArray[np.float32]:
    """Read the logits of a forward, or of some of its rows.

    They are copied from a GPU where they are there.

    Args:
        forward: Forward that returned them.
        logits: Logits ``(V,)`` or ``(n, V)``.
        first_row: Token that the first row is about; None = the last one for ``(V,)``, else the
            first one.

    Raises:
        NotFiniteError: one is NaN or infinite.
    """
    if not isinstance(logits, DeviceArray):
        return np.asarray(logits)  # which `ask` has looked at
    values = np.asarray(logits)
    _check_finite(forward, "logits", values, first_row)
    return values


def _check_finite(
    forward: Forward, what: str, values: NDArray[np.float32], first_row: int | None = None
) -> None:
    found = first_not_finite(np.asarray(values, np.float32))
    if found is None:
        return
    if first_row is None:
        first_row = 0 if values.ndim > 1 else len(forward.token_ids) - 1
    position = forward.past_length + first_row + found.offset // values.shape[-1]
    raise NotFiniteError(
        f"graph {forward.graph_name}: expected finite {what}, "
        f"found {found.value} at position {position}",
        _HINT,
    )


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

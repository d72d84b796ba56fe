"""Declares what decoding needs from an inference engine.

That is forwards of its graphs over one K/V cache.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trimode.errors import UsageError
from trimode.formats.contract import GRAPH_NAMES, GraphName

Ids = NDArray[np.int64]
Array = NDArray[np.generic]

SMALLEST_BUCKET = 256


class Closable:
    """Can be closed once and for all.

    Attributes:
        is_closed: Whether it has been closed.
    """

    is_closed = False

    def check_open(self) -> None:
        """Raise :class:`UsageError` where it has been closed."""
        check_open(self)


def check_open(session: object) -> None:
    """Raise :class:`UsageError` for what has been closed.

    What cannot be closed is always open.
    """
    if getattr(session, "is_closed", False):
        raise UsageError(
            "expected an open model, found it closed",
            "open the bundle again with TriModeModel.from_pretrained",
        )


class KVCache(Protocol):
    """Keys and values of one sequence in slots of fixed capacity.

    What is valid is known by whoever holds the length, not here.
    """

    @property
    def capacity(self) -> int:
        """Number of slots."""
        ...

    def reserve(self, length: int) -> None:
        """Have at least ``length`` slots, keeping the contents. Never shrinks.

        Raises:
            UsageError: the graphs fix the capacity, and it is smaller.
        """
        ...


class Session(Protocol):
    """The graphs of a bundle, loaded once, with weights shared.

    One that can be closed is :class:`Closable`, and refuses to run afterwards.
    """

    @property
    def max_prefill_rows(self) -> int | None:
        """Most rows of one ``ar`` forward; None = any number."""
        ...

    def check_block_length(
        self, block_length: int, graph_names: tuple[GraphName, ...] = GRAPH_NAMES
    ) -> None:
        """Raise :class:`UsageError` unless all these graphs take blocks of this length."""
        ...

    def close(self) -> None:
        """Give memory back.

        No cache or array of the session may be used afterwards.
        """
        ...

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence."""
        ...

    def run(
        self,
        graph_name: GraphName,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        """Run one forward and write its keys and values into the cache.

        Those of ``input_ids (1, T)`` go into slots ``past_length ..``, and for ``quadratic`` those
        of its masked slots too. The cache grows where needed.

        Returns the outputs of the graph's contract as views that the next run of the same graph on
        this cache overwrites. A session on a GPU leaves ``logits`` there and returns a
        :class:`DeviceArray`: ``np.asarray`` copies it.
        """
        ...


class SessionView:
    """Stands on another session and does something about its forwards.

    Closing it leaves the other one open.

    Args:
        session: Session that it stands on.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def is_closed(self) -> bool:
        """Whether the other one is."""
        return getattr(self._session, "is_closed", False)

    @property
    def max_prefill_rows(self) -> int | None:
        return self._session.max_prefill_rows

    def check_block_length(
        self, block_length: int, graph_names: tuple[GraphName, ...] = GRAPH_NAMES
    ) -> None:
        self._session.check_block_length(block_length, graph_names)

    def close(self) -> None:
        """Closes nothing."""

    def new_cache(self) -> KVCache:
        return self._session.new_cache()

    def run(
        self,
        graph_name: GraphName,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        return self._session.run(graph_name, cache, input_ids, past_length, drafter_scale)


class BatchCache(KVCache, Protocol):
    """Holds keys and values of several texts, a row each.

    All rows have the same capacity.

    A prefix is the first slots of a row. Those that ``ar``, ``verify`` and ``quadratic`` wrote for
    accepted tokens are valid in every mode. What lies behind them (drafts, masked slots) is not.
    No copy changes other slots or rows than it names.
    """

    @property
    def num_rows(self) -> int:
        """Number of texts."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one slot of a row, in all layers together."""
        ...

    def move(self, source: int, destination: int, length: int | None = None) -> None:
        """Let a row have the contents of another one.

        Args:
            source: Row that is read.
            destination: Row that is written.
            length: Valid slots of the source; None = all of its slots.
        """
        ...

    def copy_prefix(self, source: int, destination: int, length: int) -> None:
        """Copy the first ``length`` slots of a row into another one.

        Raises:
            UsageError: there is no such row, or it has fewer slots.
        """
        ...

    def copy_from(self, other: BatchCache, source: int, destination: int, length: int) -> None:
        """Copy the first ``length`` slots of a row of another cache.

        Args:
            other: Cache of the same session, of any capacity.
            source: Row of the other cache.
            destination: Row of this cache.
            length: Slots that are copied; both caches have as many.

        Raises:
            UsageError: the cache is of another session, or a row or slot does not exist.
        """
        ...

    def export_prefix(self, row: int, start: int, length: int) -> list[Array]:
        """Copy ``length`` slots of a row, from ``start`` on, into host memory.

        Returns:
            For each layer keys, then values: ``(heads, length, head size)``, as stored; bfloat16
                as float16 with the same bytes.

        Raises:
            UsageError: there is no such row, or it has fewer slots.
        """
        ...

    def import_prefix(self, row: int, start: int, arrays: Seq[Array]) -> None:
        """Write what :meth:`export_prefix` returned into a row, from slot ``start`` on.

        Raises:
            UsageError: the row or its slots do not exist, or the arrays are of another target.
        """
        ...


@runtime_checkable
class BatchSession(Session, Protocol):
    """A session that also runs several texts in one forward."""

    @property
    def max_batch(self) -> int | None:
        """Most rows of one forward; None = any number."""
        ...

    @property
    def free_tokens(self) -> int:
        """Most tokens of idle rows that may go along with a forward.

        Idle rows have nothing to do. With more of their tokens a second forward is cheaper.
        """
        ...

    def new_batch_cache(self, num_rows: int) -> BatchCache:
        """An empty cache for so many texts."""
        ...

    def capacity_for(self, length: int) -> int:
        """Return the smallest capacity that holds ``length`` slots.

        A cache has so many slots once it has reserved ``length``.

        Raises:
            UsageError: no capacity holds them.
        """
        ...

    def run_rows(
        self,
        graph_name: GraphName,
        cache: KVCache,
        rows: range,
        input_ids: Ids,
        past_length: Ids,
        input_length: Ids,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        """Run one forward like :meth:`Session.run`, for ``rows`` of a batch's cache.

        Args:
            graph_name: Graph that runs.
            cache: Cache of the batch, with the capacity for all that is written.
            rows: Neighbouring rows, B of them.
            input_ids: Token ids, ``(B, T)``.
            past_length: Slots of each row before the first that is written, ``(B,)``.
            input_length: Tokens of each row that are real, ``(B,)``, for ``ar``. What follows in
                the row is padding.
            drafter_scale: Scale of the drafter's adapter, for ``draft``.

        Returns:
            The outputs of the graph's contract; the next run of the graph on this cache, for
                whichever rows, may overwrite them.
        """
        ...


@runtime_checkable
class ExpectsLength(Protocol):
    """Takes a text's length beforehand, which is cheaper than growing with it."""

    def expect(self, num_tokens: int) -> None:
        """Prepare for a text of so many tokens."""
        ...


def expect_length(cache: KVCache, num_tokens: int) -> None:
    """Tell a cache its text's length beforehand, where that matters to it."""
    if isinstance(cache, ExpectsLength):
        cache.expect(num_tokens)


class DeviceArray:
    """Stands for an array in GPU memory and copies it when read.

    The next forward into the same memory changes its values.

    Args:
        shape: Shape of the array, as numpy would say.
        dtype: Type of the values.
        fetch: Function that copies all of it to the host.
        fetch_part: Function that copies what lies at some first indices, ``fetch_part(1, 3)`` for
            ``[1, 3]``; None = a part comes only with all the rest.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        fetch: Callable[[], Array],
        fetch_part: Callable[..., Array] | None = None,
    ) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._fetch, self._fetch_part = fetch, fetch_part

    @property
    def reads_parts(self) -> bool:
        """Whether a part can be copied without the rest."""
        return self._fetch_part is not None

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(
                "expected a copy to be allowed, found copy=False for an array in GPU memory"
            )
        return np.asarray(self._fetch(), dtype)

    def __getitem__(self, index: Any) -> Any:
        return self.__array__()[index]

    def of_row(self, row: int) -> DeviceArray:
        """One entry of the first dimension, which stays on the GPU, too."""
        # not by way of self: in a cycle it would keep the memory until somebody looks for cycles
        fetch, part = self._fetch, self._fetch_part
        if part is None:
            return DeviceArray(self.shape[1:], self.dtype, lambda: fetch()[row])
        return DeviceArray(self.shape[1:], self.dtype, partial(part, row), partial(part, row))


def of_row(output: Any, row: int) -> Any:
    """What an output says of one row of the batch; a view."""
    return output.of_row(row) if isinstance(output, DeviceArray) else output[row]


def takes_block(session: Session, block_length: int) -> bool:
    """Whether the graphs were built for a block length."""
    try:
        session.check_block_length(block_length)
    except UsageError:
        return False
    return True


def bucket(length: int) -> int:
    """Return the smallest of 256, 512, 1024, ... that holds ``length`` slots."""
    capacity = SMALLEST_BUCKET
    while capacity < length:
        capacity *= 2
    return capacity

"""Declares who is told of requests: metrics, logs and traces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from trimode.server.records import RequestRecord


class Observer(Protocol):
    """Declares a listener that is told of requests, on the event loop.

    It should be quick.
    """

    def observe(self, record: RequestRecord) -> None:
        """Take note of a text that has ended; called once for each."""
        ...

    def reject(self, reason: str) -> None:
        """Take note of a request that was refused, by its error's code."""
        ...


def tell_rejected(observers: Iterable[Observer], reason: str | None) -> None:
    """Tell all observers of a request that was refused."""
    for observer in observers:
        observer.reject(reason or "other")

"""Watches the memory and processor time of a server on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import ipaddress
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from trimode.loadtest.options import Server

_PART_S = 60.0
_EVERY_S = 1.0


@dataclass(frozen=True)
class Usage:
    """Holds what a server used at some time.

    Attributes:
        at: Time of :func:`time.perf_counter`, in seconds.
        rss: Resident memory in bytes, of the process and the children that it had at the start.
        cpu: Processor seconds so far.
    """

    at: float
    rss: int
    cpu: float


@dataclass
class UsageLog:
    """Collects a server's usage during a run."""

    usages: list[Usage] = field(default_factory=list)

    def measured(self, since: float) -> dict[str, Any]:
        """Return fields of :class:`~trimode.formats.load.ServedRecord`; empty if unknown.

        Args:
            since: Time from which usage counts.
        """
        found = [one for one in self.usages if one.at >= since]
        if len(found) < 2:
            return {}
        first, last = found[0], found[-1]
        span = last.at - first.at
        part = min(_PART_S, span / 2)
        return {
            "cpu_share": (last.cpu - first.cpu) / span,
            "rss_first_bytes": _mean([one.rss for one in found if one.at <= first.at + part]),
            "rss_last_bytes": _mean([one.rss for one in found if one.at >= last.at - part]),
            "rss_part_s": part,
        }


@contextlib.asynccontextmanager
async def watched(server: Server) -> AsyncIterator[UsageLog]:
    """Note the server's usage each second while the block runs.

    Nothing is noted of a server that runs elsewhere.
    """
    log = UsageLog()
    family = _family_of(server)
    if not family:
        yield log
        return
    task = asyncio.create_task(_watch(family, log))
    try:
        yield log
    finally:
        task.cancel()


async def _watch(family: Sequence[Any], log: UsageLog) -> None:
    while (usage := _usage(family)) is not None:
        log.usages.append(usage)
        await asyncio.sleep(_EVERY_S)


def _usage(family: Sequence[Any]) -> Usage | None:
    psutil = importlib.import_module("psutil")
    try:
        cpu = [one.cpu_times() for one in family]
        rss = sum(one.memory_info().rss for one in family)
    except psutil.Error:
        return None
    return Usage(time.perf_counter(), rss, sum(one.user + one.system for one in cpu))


def _family_of(server: Server) -> list[Any]:
    """Find the server's process, and its children.

    It is the process that is named, or that listens at the address here.
    """
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        return []
    with contextlib.suppress(psutil.Error):
        pid = server.pid if server.pid is not None else _listener(psutil, server.base)
        if pid is not None:
            process = psutil.Process(pid)
            return [process, *process.children(recursive=True)]
    return []


def _listener(psutil: Any, address: str) -> int | None:
    place = urlsplit(address)
    if not _is_local(place.hostname or ""):
        return None
    port = place.port or (443 if place.scheme == "https" else 80)
    for connection in psutil.net_connections(kind="inet"):
        is_listening = connection.status == psutil.CONN_LISTEN
        if is_listening and connection.laddr.port == port and connection.pid:
            return int(connection.pid)
    return None


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _mean(values: list[int]) -> int:
    return round(sum(values) / len(values))

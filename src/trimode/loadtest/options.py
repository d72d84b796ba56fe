"""Holds what a user asks of a load test, and checks it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from trimode.errors import UsageError

LIMITED = ("ttft", "tpot", "e2el")
"""Times that goodput may limit, by vLLM's names."""


@dataclass(frozen=True)
class Load:
    """Says how requests arrive.

    In a closed loop each of ``concurrency`` clients begins a conversation when its last one has
    ended. In an open loop conversations begin at ``rate`` whatever the server does.

    Attributes:
        concurrency: Number of clients; None = an open loop.
        rate: Conversations begun per second; None = a closed loop.
        burstiness: Shape of the gamma distribution of the gaps; 1 = a Poisson process.
    """

    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: one is out of range.
        """
        if self.concurrency is not None and self.concurrency < 1:
            raise UsageError(
                f"expected `concurrency` of at least 1, found {self.concurrency}",
                "name numbers of clients like 1,4,16",
            )
        for name, value in (("rate", self.rate), ("burstiness", self.burstiness)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(
                    f"expected `{name}` above 0, found {value}", "pass a positive number"
                )

    @property
    def name(self) -> str:
        """Name for progress and tables."""
        if self.concurrency is None:
            return f"{self.rate:g}/s"
        return f"{self.concurrency} client{'s' if self.concurrency > 1 else ''}"


@dataclass(frozen=True)
class Span:
    """Says how long a run lasts.

    Attributes:
        warmup: Seconds under load before requests are measured.
        duration: Seconds in which measured conversations begin; None = ``num_prompts`` ends it.
        num_prompts: Measured conversations; None = ``duration`` ends it.
    """

    warmup: float = 0.0
    duration: float | None = None
    num_prompts: int | None = None

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: one is out of range, or none of two ends is given.
        """
        if (self.duration is None) == (self.num_prompts is None):
            found = "neither" if self.duration is None else "both"
            raise UsageError(
                f"expected `duration` or `num_prompts`, found {found}", "say when a run ends"
            )
        if not 0 <= self.warmup < math.inf:
            raise UsageError(f"expected `warmup` from 0, found {self.warmup}", "pass seconds")
        if self.duration is not None and not 0 < self.duration < math.inf:
            raise UsageError(f"expected `duration` above 0, found {self.duration}", "pass seconds")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise UsageError(
                f"expected `num_prompts` of at least 1, found {self.num_prompts}",
                "pass a number of conversations",
            )


@dataclass(frozen=True)
class Sampling:
    """Says what every request asks for.

    Attributes:
        max_tokens: Most tokens of an answer.
        min_tokens: Fewest tokens of an answer; None = not sent. vLLM and trimode know it.
        temperature: Temperature; 0 = greedy.
        seed: Seed of sampled requests; not sent with greedy ones.
    """

    max_tokens: int = 128
    min_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: one is out of range.
        """
        if self.max_tokens < 1:
            raise UsageError(
                f"expected `max_tokens` of at least 1, found {self.max_tokens}",
                "pass a number of tokens",
            )
        if not 0 <= self.temperature < math.inf:
            raise UsageError(
                f"expected `temperature` from 0, found {self.temperature}", "0 is greedy"
            )


@dataclass(frozen=True)
class Goodput:
    """Holds the limits that a good request keeps, in milliseconds by name."""

    limits: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Goodput:
        """Parse ``"ttft:500 tpot:50"``; commas separate, too.

        Raises:
            UsageError: a part is no limit, or a time comes twice.
        """
        limits: dict[str, float] = {}
        for part in re.split(r"[\s,]+", text.strip()):
            name, _, value = part.partition(":")
            try:
                limit = float(value)
            except ValueError:
                limit = math.nan
            if name not in LIMITED or name in limits or not 0 <= limit < math.inf:
                raise UsageError(
                    f"expected `goodput` like ttft:500 tpot:50, found {text!r}",
                    f"limit each of {', '.join(LIMITED)} at most once, in milliseconds",
                )
            limits[name] = limit
        return cls(limits)


@dataclass(frozen=True)
class Server:
    """Says where and what to ask.

    Attributes:
        url: Address of the server, with or without ``/v1``.
        model: Name of the model; None = the first that the server lists.
        api_key: Key sent as a bearer token; None = none is sent.
        timeout: Seconds without a byte after which a request has failed.
        pid: Process whose memory is watched; None = the one that listens, if it runs here.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    timeout: float = 600.0
    pid: int | None = None

    @property
    def base(self) -> str:
        """Address without ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1")

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: the address is none, or the time is out of range.
        """
        if not re.match(r"https?://[^/\s]+", self.url):
            raise UsageError(
                f"expected an address like http://127.0.0.1:8000, found {self.url!r}",
                "begin it with http:// or https://",
            )
        if not self.timeout > 0:
            raise UsageError(f"expected `timeout` above 0, found {self.timeout}", "pass seconds")

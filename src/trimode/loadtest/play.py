"""Plays conversations, in a closed or an open loop."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trimode.loadtest.arrivals import arrivals
from trimode.loadtest.bodies import Composer
from trimode.loadtest.client import Connections, Exchange, exchange
from trimode.loadtest.options import Load
from trimode.loadtest.questions import Message, Question
from trimode.loadtest.window import Window

_PAUSE = 0.1
"""Seconds that a client of a closed loop waits after a failure."""


@dataclass(frozen=True)
class Played:
    """Holds one turn that was played.

    Attributes:
        is_measured: Whether the request counts.
    """

    question: Question
    turn: int
    exchange: Exchange
    is_measured: bool


@dataclass(frozen=True)
class Player:
    """Plays conversations against one server.

    Attributes:
        connections: Lender of clients.
        base: Address of the server.
        composer: Composer of the requests.
        sink: Function that takes every turn when it has ended.
    """

    connections: Connections
    base: str
    composer: Composer
    sink: Callable[[Played], None]

    async def play(self, question: Question, window: Window, *, is_measured: bool) -> bool:
        """Play a conversation until its end, a failure, or the window's end.

        Returns:
            Whether no request failed.
        """
        messages: list[Message] = []
        for turn in range(question.num_turns):
            if turn and window.is_over:
                break
            messages.extend(question.turns[turn] if question.turns else ())
            done = await self.ask(question, messages)
            window.note(succeeded=done.succeeded)
            counts = window.counts(done.sent, is_measured=is_measured)
            self.sink(Played(question, turn, done, counts))
            if not done.succeeded:
                return False
            messages.append({"role": "assistant", "content": done.content})
        return True

    async def ask(self, question: Question, messages: Sequence[Message]) -> Exchange:
        """Send one request."""
        request = self.composer.compose(question, messages)
        return await exchange(self.connections, self.base + request.path, request.body)


def endless(questions: Sequence[Question], seed: int) -> Iterator[Question]:
    """Yield the questions in one random order after another, without end."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(questions, len(questions))


async def run_loop(
    player: Player, source: Iterator[Question], window: Window, load: Load, *, seed: int
) -> None:
    """Put the load on the server until all answers have come.

    No conversation begins once the window has closed.
    """
    if load.rate is None:
        await _closed_loop(player, source, window, load.concurrency or 1)
    else:
        await _open_loop(player, source, window, arrivals(load.rate, load.burstiness, seed))


async def _closed_loop(
    player: Player, source: Iterator[Question], window: Window, num_clients: int
) -> None:
    async def converse() -> None:
        while (is_measured := window.begin()) is not None:
            if not await player.play(next(source), window, is_measured=is_measured):
                await asyncio.sleep(_PAUSE)

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(converse())


async def _open_loop(
    player: Player, source: Iterator[Question], window: Window, due: Iterator[float]
) -> None:
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for after in due:
            await asyncio.sleep(max(0.0, start + after - time.perf_counter()))
            is_measured = window.begin()
            if is_measured is None:
                return
            group.create_task(player.play(next(source), window, is_measured=is_measured))

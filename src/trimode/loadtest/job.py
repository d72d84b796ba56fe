"""Runs a load test: each mode at each load, in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from trimode.errors import EngineError
from trimode.formats.load import CheckRecord, RequestRecord, RunRecord, ServerRecord
from trimode.loadtest.bodies import Composer
from trimode.loadtest.check import Key, Reference, compare, references
from trimode.loadtest.client import Connections
from trimode.loadtest.options import Load, Span
from trimode.loadtest.plan import LoadTest, Mode
from trimode.loadtest.play import Played, Player
from trimode.loadtest.probe import probe
from trimode.loadtest.questions import Question, Questions
from trimode.loadtest.random_questions import RandomLengths, draw_questions, with_shared_prefix
from trimode.loadtest.requests import request_record
from trimode.loadtest.run import Run, measure
from trimode.loadtest.served import describe, ordinary_ids
from trimode.loadtest.window import Window
from trimode.progress import Progress, Silent


@dataclass
class Measured:
    """Collects what a load test finds, as it finds it.

    Attributes:
        is_interrupted: Whether the user interrupted the test.
    """

    server: ServerRecord | None = None
    questions: Questions | None = None
    runs: list[RunRecord] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)
    check: CheckRecord | None = None
    is_interrupted: bool = False

    @property
    def is_partial(self) -> bool:
        """Whether the test was interrupted, or given up."""
        return self.is_interrupted or any(run.partial for run in self.runs)


def run_load_test(test: LoadTest, progress: Progress | None = None) -> Measured:
    """Measure every mode at every load.

    Where the user interrupts, what was measured so far is returned, marked as partial.

    Raises:
        UsageError: a value is out of range.
        EngineError: the server does not answer a first request, or a reference.
    """
    test.check()
    job = _Job(test, progress or Silent())
    try:
        asyncio.run(job.run())
    except KeyboardInterrupt:
        job.measured.is_interrupted = True
    job.compare()
    return job.measured


class _Job:
    """Runs a load test in an event loop.

    Attributes:
        measured: Findings so far.
    """

    def __init__(self, test: LoadTest, progress: Progress) -> None:
        self._test, self._progress = test, progress
        self._known: dict[Key, Reference] = {}
        self.measured = Measured()

    async def run(self) -> None:
        """Measure until the end, or until the server is gone."""
        async with Connections(self._test.server) as client:
            server = self.measured.server = await describe(client, self._test.server)
            found = self.measured.questions = await self._questions(client, server)
            for mode in self._test.modes:
                composer = Composer(server.model, self._test.sampling, mode)
                player = Player(client, server.url, composer, _ignore)
                composer = await probe(player, found.questions[0])
                if self._test.checks:
                    await self._collect(client, composer, found.questions)
                for load in self._test.loads:
                    await self._measure(client, composer, load)
                    if self.measured.is_partial:
                        return

    def compare(self) -> None:
        """Compare what was answered with its references, if asked."""
        if self._test.checks:
            modes = {index: one.mode for index, one in enumerate(self.measured.runs)}
            self.measured.check = compare(self._known, modes, self.measured.requests)

    async def _questions(self, client: Connections, server: ServerRecord) -> Questions:
        data = self._test.data
        if isinstance(data, RandomLengths):
            data = draw_questions(data, await ordinary_ids(client, server))
        return with_shared_prefix(data, self._test.shared_prefix, self._test.seed)

    async def _collect(
        self, client: Connections, composer: Composer, questions: Sequence[Question]
    ) -> None:
        """Play every conversation alone."""
        played: list[Played] = []
        player = Player(client, self._test.server.base, composer, played.append)
        advance = self._progress.stage(_name(composer.mode, "alone"), len(questions))
        window = Window(Span(num_prompts=len(questions)))
        for question in questions:
            if not await player.play(question, window, is_measured=True):
                raise EngineError(
                    f"expected an answer to {question.question_id} alone, found: "
                    f"{played[-1].exchange.error}",
                    "a check needs an answer to every conversation",
                )
            advance(1)
        self._known |= references(composer.mode, (request_record(one, 0, 0.0) for one in played))

    async def _measure(self, client: Connections, composer: Composer, load: Load) -> None:
        """Measure one run, and keep it even if it is interrupted."""
        assert self.measured.questions is not None
        run = Run(self._test, composer, load, self.measured.questions.questions)
        name = _name(composer.mode, load.name)
        try:
            await measure(run, client, self._progress, name)
        finally:
            records = run.requests(len(self.measured.runs))
            self.measured.requests += records
            self.measured.runs.append(run.record(records))


def _ignore(_: Played) -> None:
    """Take a turn that nobody asks for."""


def _name(mode: Mode, what: str) -> str:
    return what if mode is None else f"{mode}, {what}"

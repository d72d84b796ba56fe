"""Holds a whole load test as a user asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimode.errors import UsageError
from trimode.formats.load import WorkloadRecord
from trimode.loadtest.bodies import CHAT, COMPLETIONS
from trimode.loadtest.options import Goodput, Load, Sampling, Server, Span
from trimode.loadtest.questions import Questions
from trimode.loadtest.random_questions import RandomLengths

Mode = str | None


@dataclass(frozen=True)
class LoadTest:
    """Holds what a user asks of a load test.

    Attributes:
        server: Server to ask.
        data: Conversations, or lengths to draw them by.
        loads: Loads to put on the server.
        modes: Modes to ask for; None = the field is not sent.
        span: Length of each run.
        sampling: Values that every request asks for.
        goodput: Limits of a good request.
        shared_prefix: Words, or token ids, that begin every conversation.
        seed: Seed for the order of conversations and the gaps of an open loop.
        checks: Whether greedy answers are compared with those of single requests.
    """

    server: Server
    data: Questions | RandomLengths
    loads: tuple[Load, ...]
    modes: tuple[Mode, ...] = (None,)
    span: Span = field(default_factory=lambda: Span(num_prompts=100))
    sampling: Sampling = field(default_factory=Sampling)
    goodput: Goodput = field(default_factory=Goodput)
    shared_prefix: int = 0
    seed: int = 0
    checks: bool = False

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: one is out of range, or two contradict each other.
        """
        self.server.check()
        self.span.check()
        self.sampling.check()
        for load in self.loads:
            load.check()
        if isinstance(self.data, RandomLengths):
            self.data.check()
        if not self.loads or not self.modes:
            raise UsageError("expected a load and a mode, found none", "name at least one of each")
        if self.shared_prefix < 0:
            raise UsageError(
                f"expected `shared_prefix` from 0, found {self.shared_prefix}", "pass a number"
            )
        if self.checks and self.sampling.temperature:
            raise UsageError(
                f"expected `check` with greedy answers, found temperature "
                f"{self.sampling.temperature:g}",
                "leave out `temperature`",
            )


def workload(test: LoadTest, questions: Questions) -> WorkloadRecord:
    """Describe the requests of a load test."""
    is_ids = questions.questions[0].token_ids is not None
    return WorkloadRecord(
        data=questions.name,
        data_sha256=questions.sha256,
        num_questions=len(questions.questions),
        num_turns=sum(one.num_turns for one in questions.questions),
        endpoint=COMPLETIONS if is_ids else CHAT,
        shared_prefix=test.shared_prefix,
        max_tokens=test.sampling.max_tokens,
        min_tokens=test.sampling.min_tokens,
        temperature=test.sampling.temperature,
        seed=test.seed,
        warmup_s=test.span.warmup,
        duration_s=test.span.duration,
        num_prompts=test.span.num_prompts,
        goodput_ms=test.goodput.limits,
    )

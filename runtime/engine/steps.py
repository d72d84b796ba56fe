"""Runs the forwards of one step, and gives rows their outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import partial

from trimode.formats.contract import GraphName, ModelInfo
from trimode.runtime.decode.forward import Outputs
from trimode.runtime.engine.grouping import JointForward, join_forwards
from trimode.runtime.engine.joint_forward import has_room, run_joint
from trimode.runtime.engine.row import CacheGroup, EngineRow
from trimode.runtime.engine.stats import Counts
from trimode.runtime.engine.turns import StepPlan
from trimode.runtime.sessions.base import BatchSession, of_row

Observe = Callable[[GraphName, int, int, int, float], None]
"""Takes note of a forward: graph, rows, new tokens of each, most cached tokens, milliseconds."""


class Outcome(Enum):
    """Says how a step went.

    ``NOTHING``: no row waits for a forward. ``COMMITTED``: forwards ran. ``RETRYABLE``: they
    failed, and every row stands where it stood. ``FATAL``: the engine cannot go on.
    """

    NOTHING = "nothing"
    COMMITTED = "committed"
    RETRYABLE = "retryable"
    FATAL = "fatal"


class Steps:
    """Runs steps.

    Args:
        session: Loaded graphs.
        model: Facts about the model.
        counts: Counts that the steps are added to.
        committed: Function that lets a row go on with its outputs.
        failed: Function that takes note of rows whose forward has failed.

    Attributes:
        seconds: Time of the last step.
        clock: Function that gives the time in seconds.
        observe: Function told of each forward how long it took; None = nobody is.
    """

    def __init__(
        self,
        session: BatchSession,
        model: ModelInfo,
        counts: Counts,
        committed: Callable[[EngineRow, Outputs], None],
        failed: Callable[[Sequence[EngineRow], Exception], Outcome],
    ) -> None:
        self._session, self._model, self._counts = session, model, counts
        self._committed, self._failed = committed, failed
        self.seconds = 0.0
        self.clock: Callable[[], float] = time.perf_counter
        self.observe: Observe | None = None

    def run(self, plan: StepPlan) -> Outcome:
        """Run the forwards of a plan, up to one that fails."""
        start, group, before = self.clock(), plan.group, self._counts.forward_tokens
        group.num_steps += 1
        outcome = Outcome.COMMITTED
        for joint in self._joints(plan):
            outcome = self._run(group, joint)
            if outcome is not Outcome.COMMITTED:
                break
        self.seconds = self.clock() - start
        if outcome is Outcome.COMMITTED:
            num_tokens = self._counts.forward_tokens - before
            self._counts.took(self.seconds, num_tokens, is_prefill=plan.is_prefill)
        return outcome

    def _joints(self, plan: StepPlan) -> Iterable[JointForward]:
        group, first = plan.group, plan.waiting[0]
        graph_name, scale = first.forward.graph_name, first.forward.drafter_scale
        if len(plan.waiting) == 1:
            alone = range(first.row, first.row + 1)
            return (JointForward(graph_name, scale, first.num_tokens, alone, (first,)),)
        return join_forwards(
            plan.waiting,
            group.valid_length,
            partial(has_room, group.cache, self._model, graph_name),
            self._session.free_tokens,
        )

    def _run(self, group: CacheGroup, joint: JointForward) -> Outcome:
        """Run a forward, and let its members go on with the outputs."""
        members, start = [group.at(one.row) for one in joint.members], self.clock()
        try:
            outputs = self._outputs(group, joint)
        except Exception as error:
            return self._failed(members, error)
        tokens = [one.num_tokens for one in joint.members]
        self._counts.ran(joint.graph_name, tokens, len(joint.rows) * joint.num_tokens)
        cached = max(one.forward.past_length for one in joint.members)
        for row, one in zip(members, joint.members, strict=True):
            if row.read(one.num_tokens):
                place = one.row - joint.rows.start
                self._committed(row, tuple(of_row(output, place) for output in outputs))
        self._observe(joint, cached, 1000 * (self.clock() - start))
        return Outcome.COMMITTED

    def _observe(self, joint: JointForward, cached: int, ms: float) -> None:
        if self.observe is not None:
            self.observe(joint.graph_name, len(joint.rows), joint.num_tokens, cached, ms)

    def _outputs(self, group: CacheGroup, joint: JointForward) -> Outputs:
        return run_joint(self._session, group.cache, joint, group.valid_length)

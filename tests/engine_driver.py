"""An engine's core on the fake session, turned by hand, with every invariant checked each turn."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from fake_session import BLOCK, MODEL, FakeSession, alone

from trimode.runtime.decode.options import make_options
from trimode.runtime.decode.stream import Generation, Stream
from trimode.runtime.engine.core import EngineCore
from trimode.runtime.engine.handle import Handle
from trimode.runtime.engine.request import Request
from trimode.runtime.engine.settings import Settings
from trimode.runtime.engine.steps import Outcome


@dataclass
class Asked:
    """A request, and its tokens when it was first seen to have ended."""

    request: Request
    mode: Any
    options: dict[str, Any]
    at_end: list[int] | None = field(default=None)

    @property
    def handle(self) -> Handle:
        return self.request.handle

    def expected(self) -> Generation:
        return alone(self.request.ids, self.mode, **self.options)


class Driver:
    """Submits, turns and checks."""

    def __init__(self, session: FakeSession | None = None, **settings: Any) -> None:
        self.session = session or FakeSession()
        chosen = {
            "max_rows": 4,
            "kv_bytes": 8 * 400,
            "latency_target_s": 1e-9,
            "clock": lambda: self.session.now,
            **settings,
        }
        self.core = EngineCore(self.session, MODEL, self._open, Settings(**chosen))
        self.asked: list[Asked] = []

    def submit(self, ids: Seq[int], mode: Any = "ar", **given: Any) -> Asked:
        names = ("priority", "salt", "timeout_s", "fair_key", "system_length")
        chosen = {name: given.pop(name) for name in names if name in given}
        options = {"max_new_tokens": 8, "eos_token_ids": (), "block_length": BLOCK, **given}
        timeout = chosen.pop("timeout_s", None)
        request = Request(
            handle=Handle(list(ids), self.core.post),
            ids=list(ids),
            mode=mode,
            options=make_options(**options),
            namespace=("salt", chosen.pop("salt", "")),
            deadline=None if timeout is None else self.session.now + timeout,
            **chosen,
        )
        self.asked.append(Asked(request, mode, options))
        self.core.post(request)
        return self.asked[-1]

    def turn(self) -> Outcome:
        outcome = self.core.turn()
        self.check()
        return outcome

    def run(self, most: int = 20_000) -> None:
        """Turn until nothing is left to do."""
        for _ in range(most):
            if self.core.is_idle and not self.core.has_mail:
                return
            self.turn()
        raise AssertionError(f"not done after {most} turns")

    def check(self) -> None:
        """Slots are conserved, lengths agree, and nothing is delivered after the end."""
        placed = self.core.groups.rows
        assert sorted(map(id, placed)) == sorted(map(id, self.core.rows))
        assert len(placed) <= self.core.settings.max_rows
        for group in self.core.groups:
            assert len(group.rows) == group.cache.num_rows <= self.core.settings.max_rows
            for place, row in enumerate(group.rows):
                assert row is None or (row.group is group and row.place == place)
        for row in self.core.rows:
            assert row.sequence.cached_length <= len(row.sequence.tokens)
            assert row.stored_length <= row.valid_length <= row.group.capacity  # type: ignore[union-attr]
        for one in self.asked:
            if one.handle.done and one.at_end is None:
                one.at_end = list(one.handle.token_ids)

    def check_texts(self) -> None:
        """Every text is that of its cold single run, or its beginning where it was ended."""
        for one in self.asked:
            expected, found, usage = one.expected(), one.handle.token_ids, one.handle.usage
            assert usage.cached_tokens < usage.prompt_tokens
            assert found == one.at_end
            if one.handle.error is None:
                result = one.handle.result(0)
                assert found == result.token_ids == expected.token_ids
                assert result.finish_reason == expected.finish_reason
                assert self.core.settings.mode_policy or result.nfe == expected.nfe
            else:
                assert found == expected.token_ids[: len(found)]

    def scribble(self) -> None:
        """Write garbage wherever nothing valid lies."""
        for group in self.core.groups:
            for place, row in enumerate(group.rows):
                group.cache.slots[place, 0 if row is None else row.valid_length :] = -99  # type: ignore[attr-defined]

    @staticmethod
    def _open(sequence: Any, request: Request) -> Stream:
        return Stream(sequence, request.mode, request.options)

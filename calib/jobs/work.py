"""Keeps the work of a run on disk, to be resumed."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from trimode.errors import UsageError
from trimode.formats.disk import disk_errors

START_OVER = "leave out `resume` to start over"
Facts = Mapping[str, Any]
"""Facts that must be the same for a run to be resumed, as JSON values by name."""
Contents = Literal["nothing", "work", "something else"]


class Work(ABC):
    """Keeps the work of a run until its result is written.

    Args:
        path: File or folder of the work.

    Attributes:
        what: Name of the run in messages.
        is_replaced: Whether a run without ``resume`` deletes earlier work; otherwise it refuses.
    """

    what: ClassVar[str]
    is_replaced: ClassVar[bool]

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @abstractmethod
    def beside(cls, output: Path) -> Self:
        """Return the work of the runs that write ``output``."""

    @abstractmethod
    def contents(self) -> Contents:
        """Tell what lies at the path."""

    @abstractmethod
    def begin(self, facts: Facts) -> None:
        """Begin new work; delete earlier work."""

    @abstractmethod
    def take_up(self) -> dict[str, Any]:
        """Read the earlier work; return the facts of its run.

        Raises:
            UsageError: the work cannot be read.
        """

    @abstractmethod
    def discard(self) -> None:
        """Delete the work."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs away from the work, if it can be locked."""
        yield

    def check(self, *, resume: bool) -> None:
        """Check before anything is read that a run can begin, or resume.

        Raises:
            UsageError: there is nothing to resume, there is work that would be lost, or something
                else lies there.
        """
        with disk_errors(self.path):
            found = self.contents()
        if resume and found != "work":
            raise UsageError(
                f"{self.path}: expected the work of an interrupted {self.what}, found none",
                START_OVER,
            )
        if found == "something else":
            raise UsageError(
                f"{self.path}: expected nothing, or the work of an interrupted {self.what}, "
                "found something else",
                "name another output",
            )
        if found == "work" and not resume and not self.is_replaced:
            raise UsageError(
                f"{self.path}: expected no earlier {self.what}, found one that was interrupted",
                f"pass `resume` to continue it, or delete {self.path}",
            )

    @contextmanager
    def opened(self, facts: Facts, *, resume: bool) -> Iterator[Self]:
        """Begin the work, or with ``resume`` take it up.

        The work stays when the block ends.

        Args:
            facts: Facts of the run.
            resume: Whether to continue what an interrupted run left.

        Raises:
            UsageError: the work is missing, damaged, of another run, or in use.
        """
        self.check(resume=resume)
        plain = json.loads(json.dumps(facts))  # a tuple is a list there
        with self.locked():
            if resume:
                self._check_facts(plain, self.take_up())
            else:
                self.begin(plain)
            yield self

    def _check_facts(self, expected: Facts, found: Facts) -> None:
        for name, value in expected.items():
            if found.get(name) != value:
                raise UsageError(
                    f"{self.path}: expected the work of a {self.what} with {name} {value}, "
                    f"found one with {found.get(name)}",
                    f"repeat the interrupted run with `resume`, or {START_OVER}",
                )

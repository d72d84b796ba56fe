"""Groups of commands that have an unnamed one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from typer.core import TyperGroup

_SERVE, _GOODPUT = "--serve", "--goodput"
_LIMIT = re.compile(r"[a-z0-9]+:[\d.]+$")


class UnnamedGroup(TyperGroup):
    """Runs the command ``unnamed`` where none is named."""

    unnamed = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = [self.unnamed, *args]
        return list(super().parse_args(ctx, args))


class CalibrateGroup(UnnamedGroup):
    """Takes ``trimode calibrate CHECKPOINT`` as ``trimode calibrate scales CHECKPOINT``."""

    unnamed = "scales"


class BenchGroup(UnnamedGroup):
    """Takes ``trimode bench BUNDLE`` as ``trimode bench forwards BUNDLE``.

    ``trimode bench --serve URL`` is ``trimode bench serve URL``.
    """

    unnamed = "forwards"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(_separated(args))
        if _SERVE in words and words[0] not in self.commands:
            words.remove(_SERVE)
            words = ["serve", *words]
        if words[:1] == ["serve"]:
            words = _with_limits_joined(words)
        return super().parse_args(ctx, words)


def _separated(args: Sequence[str]) -> Iterator[str]:
    """Yield ``--serve=URL`` as two words."""
    for word in args:
        name, equals, value = word.partition("=")
        yield from (name, value) if equals and name == _SERVE else (word,)


def _with_limits_joined(words: Sequence[str]) -> list[str]:
    """Join the limits after ``--goodput`` in one word.

    vLLM's users write them as words of their own.
    """
    joined: list[str] = []
    for word in words:
        if _LIMIT.match(word) and joined[-2:-1] == [_GOODPUT]:
            joined[-1] += f" {word}"
        else:
            joined.append(word)
    return joined

"""Reads the options for the form of prompts.

They are ``--raw``, ``--system`` and ``--enable-thinking``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trimode.errors import UsageError

if TYPE_CHECKING:
    from trimode.runtime.text.prompts import PromptStyle


class PromptsFile(NamedTuple):
    """Names a file of prompts, and the form they take."""

    file: Path | None
    style: PromptStyle


def check_prompt_options(prompts_file: Path | None, style: PromptStyle) -> None:
    """Raise :class:`UsageError` if the options contradict each other or lack a file."""
    style.check()
    if style.chosen and prompts_file is None:
        name = style.chosen[0]
        raise UsageError(
            f"expected {name} together with --prompts-file, found it alone",
            f"leave {name} out, or add --prompts-file",
        )


def prompt_style(raw: bool, system: str | None, enable_thinking: bool | None) -> PromptStyle:
    """Return the style that the options describe."""
    from trimode.runtime.text.prompts import PromptStyle

    return PromptStyle(is_raw=raw, system=system, enable_thinking=enable_thinking)

"""Checks of the options that say how prompts reach the model: ``--raw``, ``--system``,
``--enable-thinking``.
"""

from __future__ import annotations

from pathlib import Path

from trimode.errors import UsageError
from trimode.runtime.text.prompts import PromptStyle


def check_prompt_options(prompts_file: Path | None, style: PromptStyle) -> None:
    """Raise :class:`UsageError` where the options contradict each other, or no file is given that
    they are about.
    """
    style.check()
    if style.options and prompts_file is None:
        name = style.options[0]
        raise UsageError(
            f"expected {name} together with --prompts-file, found it alone",
            f"leave {name} out, or add --prompts-file",
        )

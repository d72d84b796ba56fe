"""Fills the tables of pages in docs/results with recorded figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path


def fill(path: Path, parts: Mapping[str, str]) -> None:
    """Put each part between its two marks, ``<!-- name -->`` and ``<!-- end -->``."""
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        found = re.split(pattern, text, flags=re.DOTALL)
        if len(found) != 4:
            raise RuntimeError(f"expected one place for {name} in {path}, found {len(found) // 3}")
        before, begin, end, after = found
        text = f"{before}{begin}{part}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown; the first row is the header."""
    head, *rest = rows
    lines = [head, ("---",) * len(head), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Hold the packages to a budget of sizes.

`python .ci/sizes.py` prints where they stand, and fails where they do not keep the budget.
Code is counted as the formatter writes it: from the `def`, without decorators, to the last line.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("graphs", "compiler", "runtime", "calib", "src/trimode")
FUNCTION_LINES = {50: 8, 90: 26, 99: 60, 100: 80}
"""Percentile -> most lines."""
FILE_LINES = {90: 320, 100: 450}
MOST_POSITIONAL = 7


class Function(NamedTuple):
    """A function of the packages."""

    where: str
    lines: int
    num_positional: int
    is_public: bool


def sources(root: Path) -> Iterator[Path]:
    """Every module once: links to the packages are not followed."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path


def functions(path: Path, root: Path) -> Iterator[Function]:
    """The functions of a module, nested ones and methods too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            count = len([name for name in names if name not in ("self", "cls")])
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            where = f"{path.relative_to(root)}:{node.lineno} {node.name}"
            yield Function(where, lines, count, not node.name.startswith("_"))


def percentile(values: Sequence[int], percent: int) -> int:
    """The least value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def over_budget(what: str, sizes: dict[str, int], budget: dict[int, int]) -> list[str]:
    """Print where these stand; one line for each bound that is not kept."""
    found = {percent: percentile(list(sizes.values()), percent) for percent in budget}
    sys.stdout.write(
        f"{what}: " + ", ".join(f"p{p} {n} (at most {budget[p]})" for p, n in found.items()) + "\n"
    )
    wrong = [f"{what}: p{p} is {n}, at most {budget[p]}" for p, n in found.items() if n > budget[p]]
    longest = sorted(((n, where) for where, n in sizes.items() if n > budget[100]), reverse=True)
    return wrong + [f"  {n} lines: {where}" for n, where in longest]


def main() -> int:
    """Check the tree that this script belongs to."""
    root = Path(__file__).parents[1]
    paths = list(sources(root))
    found = [function for path in paths for function in functions(path, root)]
    files = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in paths}
    wrong = over_budget(
        "lines of functions", {one.where: one.lines for one in found}, FUNCTION_LINES
    )
    wrong += over_budget("lines of files", files, FILE_LINES)
    crowded = [one for one in found if one.is_public and one.num_positional > MOST_POSITIONAL]
    wrong += [f"  {one.num_positional} positional parameters: {one.where}" for one in crowded]
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

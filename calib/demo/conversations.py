"""Writes conversations from the demo's tasks, in the shape of SPEED-Bench's files.

``python -m trimode.calib.demo.conversations -o DIR`` writes ``single_turn.jsonl`` and
``multi_turn.jsonl``: a line has ``question_id``, ``category`` and ``messages``, all of them the
user's. ``answers`` has all right answers to each message, which no load test reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from trimode.calib.demo.tasks import FAMILIES, Example, examples
from trimode.formats.files import replace_text


class Size(NamedTuple):
    """Gives the size of a file, in conversations and turns.

    ``num_conversations`` counts those of each category.
    """

    num_conversations: int
    num_turns: int
    seed: int


FILES = {"single_turn.jsonl": Size(12, 1, 11), "multi_turn.jsonl": Size(4, 3, 12)}
"""Files, with what is in them."""


def conversations(name: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of one of :data:`FILES`.

    No question comes twice in a category.
    """
    size = FILES[name]
    prefix = name.split("_", maxsplit=1)[0]
    for category in FAMILIES:
        drawn = _distinct(category, size.seed)
        for number in range(size.num_conversations):
            turns = list(islice(drawn, size.num_turns))
            yield {
                "question_id": f"{prefix}-{category}-{number + 1}",
                "category": category,
                "messages": [{"role": "user", "content": one.prompt} for one in turns],
                "answers": [one.answers for one in turns],
            }


def _distinct(category: str, seed: int) -> Iterator[Example]:
    seen: set[str] = set()
    for example in examples(seed, "held-out", [category]):
        if example.prompt not in seen:
            seen.add(example.prompt)
            yield example


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the two files.")],
) -> None:
    """Write the demo's conversations."""
    for name in FILES:
        replace_text(
            output / name, "".join(json.dumps(line) + "\n" for line in conversations(name))
        )


if __name__ == "__main__":
    from trimode.calib.demo.console import run_command

    run_command(main)

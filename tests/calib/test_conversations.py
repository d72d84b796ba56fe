"""The demo's conversations in SPEED-Bench's shape."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from trimode.calib.demo.conversations import FILES, conversations
from trimode.calib.demo.tasks import FAMILIES, examples
from trimode.loadtest.questions import read_questions

FOLDER = Path(__file__).parents[2] / "artifacts" / "speed-demo"


@pytest.mark.parametrize("name", FILES)
def test_files_are_those_of_the_command(name: str) -> None:
    lines = [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]
    assert lines == json.loads(json.dumps(list(conversations(name))))


def test_every_category_has_both_kinds() -> None:
    found = read_questions(FOLDER).questions
    assert len({one.question_id for one in found}) == len(found)
    counts = Counter((one.category, one.num_turns) for one in found)
    assert set(counts) == {(family, turns) for family in FAMILIES for turns in (1, 3)}
    assert set(counts.values()) == {12, 4}


def test_no_question_was_seen_in_training() -> None:
    """What training draws, family by family, has none of these questions."""
    asked = {
        str(turn[0]["content"]) for one in read_questions(FOLDER).questions for turn in one.turns
    }
    seen = examples(3, "train")
    assert asked.isdisjoint(next(seen).prompt for _ in range(20_000))


def test_right_answers_are_known() -> None:
    for name, size in FILES.items():
        for line in conversations(name):
            assert len(line["answers"]) == len(line["messages"]) == size.num_turns
            assert all(line["answers"])

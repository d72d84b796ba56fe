"""Conversations come from files of several forms, or are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimode.errors import UsageError
from trimode.loadtest.questions import Questions, read_questions, turns_of
from trimode.loadtest.random_questions import (
    WORDS,
    RandomLengths,
    draw_questions,
    with_shared_prefix,
)


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_forms_of_lines(tmp_path: Path) -> None:
    file = written(
        tmp_path / "set.jsonl",
        {"question_id": 81, "category": "math", "turns": ["one", "two"], "reference": ["x"]},
        {"question_id": "q", "category": "rag", "messages": [user("a"), user("b")], "src_id": 4},
        {"prompt": "plain"},
        {"token_ids": [5, 6]},
    )
    first, second, third, fourth = read_questions(file).questions
    assert (first.question_id, first.category, first.turns) == (
        "81",
        "math",
        ((user("one"),), (user("two"),)),
    )
    assert second.turns == ((user("a"),), (user("b"),))
    assert (third.question_id, third.turns) == ("set-3", ((user("plain"),),))
    assert (fourth.token_ids, fourth.num_turns) == ((5, 6), 1)


def test_answers_that_are_given_are_no_turns() -> None:
    system, answer = {"role": "system", "content": "s"}, {"role": "assistant", "content": "t"}
    assert turns_of([system, user("a"), answer, user("b")]) == (
        (system, user("a"), answer, user("b")),
    )
    assert turns_of([system, user("a"), user("b"), answer, user("c")]) == (
        (system, user("a")),
        (user("b"), answer, user("c")),
    )


def test_a_folder_is_read_whole(tmp_path: Path) -> None:
    written(tmp_path / "b.jsonl", {"prompt": "second"})
    written(tmp_path / "a.jsonl", {"prompt": "first"})
    (tmp_path / "notes.txt").write_text("no JSON")
    assert [one.question_id for one in read_questions(tmp_path).questions] == ["a-1", "b-1"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"turns": []}, "turns: List should have at least 1 item"),
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        ({"turns": ["a"], "prompt": "b"}, "it needs one and has turns, prompt"),
        ({"category": "x"}, "it needs one and has none"),
        ({"token_ids": ["5"]}, "token_ids.0: Input should be a valid integer"),
        ({"messages": [user("a"), {"role": "assistant"}]}, "the last of its messages is an answer"),
        ([1], "Input should be a valid dictionary"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: object, reason: str) -> None:
    file = written(tmp_path / "set.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(UsageError, match=r"set\.jsonl, line 2: expected a conversation") as caught:
        read_questions(file)
    assert reason in caught.value.message


def test_files_without_conversations(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"files that end in \.jsonl, found none"):
        read_questions(tmp_path)
    with pytest.raises(UsageError, match="at least one conversation, found none"):
        read_questions(written(tmp_path / "empty.jsonl"))
    twice = written(tmp_path / "twice.jsonl", *[{"question_id": 1, "prompt": "a"}] * 2)
    with pytest.raises(UsageError, match="each question_id once, found '1' twice"):
        read_questions(twice)


def test_random_lengths_are_drawn_within_bounds() -> None:
    lengths = RandomLengths(100, 20, range_ratio=0.5, count=300, seed=4)
    drawn = draw_questions(lengths, [7, 9, 11])
    sizes = [len(one.token_ids or ()) for one in drawn.questions]
    limits = [one.max_tokens or 0 for one in drawn.questions]
    assert (min(sizes), max(sizes)) == pytest.approx((50, 150), abs=3)
    assert (min(limits), max(limits)) == (10, 30)
    assert {token for one in drawn.questions for token in one.token_ids or ()} == {7, 9, 11}
    assert draw_questions(lengths, [7, 9, 11]) == drawn
    words = draw_questions(RandomLengths(30, 5, count=2), [])
    for question in words.questions:
        assert len(str(question.turns[0][0]["content"]).split()) == 30
        assert set(str(question.turns[0][0]["content"]).split()) <= set(WORDS)
    assert words.sha256 != drawn.sha256


def test_a_shared_prefix_begins_every_conversation(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    file = written(tmp_path / "set.jsonl", {"turns": ["a", "b"]}, {"messages": [system, user("c")]})
    first, second = with_shared_prefix(read_questions(file), 12, seed=1).questions
    prefix = str(first.turns[0][0]["content"])
    assert len(prefix.split()) == 12
    assert first.turns == (({"role": "system", "content": prefix}, user("a")), (user("b"),))
    assert second.turns[0][0]["content"] == f"{prefix} be brief"
    ids = draw_questions(RandomLengths(5, 5, count=3), [7, 9])
    starts = {one.token_ids[:4] for one in with_shared_prefix(ids, 4, 1).questions if one.token_ids}
    assert len(starts) == 1
    assert with_shared_prefix(ids, 0, 1) is ids
    assert isinstance(ids, Questions)

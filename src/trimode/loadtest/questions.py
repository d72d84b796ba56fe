"""Reads conversations to play from files of JSON lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimode.errors import UsageError
from trimode.formats.record import first_fault
from trimode.formats.texts import Unreadable, lines_of, parse_json, read_text

Message = dict[str, Any]
_HINT = (
    'write {"question_id": 1, "category": "math", "turns": ["..."]}, '
    '{"messages": [...]}, {"prompt": "..."} or {"token_ids": [1, 2]}'
)
_FORMS = ("turns", "messages", "prompt", "token_ids")


@dataclass(frozen=True)
class Question:
    """Holds a conversation to play, turn by turn.

    Attributes:
        question_id: Name of the conversation, unique in a data set.
        category: Category; may be empty.
        turns: Messages that each turn adds before the model answers; empty if ``token_ids`` is
            given.
        token_ids: Prompt for the completions endpoint instead of a conversation.
        max_tokens: Most tokens of each answer; None = the workload's.
    """

    question_id: str
    category: str = ""
    turns: tuple[tuple[Message, ...], ...] = ()
    token_ids: tuple[int, ...] | None = None
    max_tokens: int | None = None

    @property
    def num_turns(self) -> int:
        """Number of answers."""
        return 1 if self.token_ids is not None else len(self.turns)


@dataclass(frozen=True)
class Questions:
    """Holds a data set of conversations.

    Attributes:
        name: Name of the file, or of what was drawn.
        sha256: Digest of what was read or drawn.
        questions: Conversations, at least one.
    """

    name: str
    sha256: str
    questions: tuple[Question, ...]


class _Line(BaseModel):
    """Declares a line; SPEED-Bench and others have fields beside these."""

    model_config = ConfigDict(extra="ignore", strict=True)

    question_id: str | int | None = None
    category: str = ""
    turns: list[str] | None = Field(default=None, min_length=1)
    messages: list[Message] | None = Field(default=None, min_length=1)
    prompt: str | None = Field(default=None, min_length=1)
    token_ids: list[int] | None = Field(default=None, min_length=1)


def read_questions(place: Path) -> Questions:
    """Read a file of conversations, or all ``.jsonl`` files of a folder.

    Raises:
        UsageError: nothing is there, or a line is not of the form.
    """
    texts = {path: _text_of(path) for path in _files(place)}
    found = [question for path, text in texts.items() for question in _read(path, text)]
    if not found:
        raise UsageError(f"{place}: expected at least one conversation, found none", _HINT)
    _check_unique(place, found)
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    return Questions(place.resolve().name, digest, tuple(found))


def turns_of(messages: Sequence[Message]) -> tuple[tuple[Message, ...], ...]:
    """Split messages into turns.

    A user's message that another one follows is answered by the model; answers that are given stay
    as they are.
    """
    turns: list[tuple[Message, ...]] = []
    current: list[Message] = []
    for message in messages:
        if message.get("role") == "user" and current and current[-1].get("role") == "user":
            turns.append(tuple(current))
            current = []
        current.append(message)
    return (*turns, tuple(current))


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    found = sorted(place.glob("*.jsonl"))
    if not found:
        raise UsageError(
            f"{place}: expected files that end in .jsonl, found none", "name a file of JSON lines"
        )
    return found


def _text_of(path: Path) -> str:
    try:
        return read_text(path)
    except Unreadable as error:
        raise UsageError(
            f"{path}: expected a readable UTF-8 file, found: {error.reason}",
            "check the path and the permissions",
        ) from error


def _read(path: Path, text: str) -> Iterator[Question]:
    for number, line in lines_of(text):
        try:
            yield _question(_Line.model_validate(parse_json(line)), f"{path.stem}-{number}")
        except (Unreadable, ValidationError) as error:
            reason = error.reason if isinstance(error, Unreadable) else first_fault(error)
            raise UsageError(
                f"{path}, line {number}: expected a conversation, found: {reason}", _HINT
            ) from error


def _question(line: _Line, usual_id: str) -> Question:
    given = [name for name in _FORMS if getattr(line, name) is not None]
    if len(given) != 1:
        found = ", ".join(given) or "none"
        raise Unreadable(f"of {', '.join(_FORMS)} it needs one and has {found}")
    name = usual_id if line.question_id is None else str(line.question_id)
    if line.token_ids is not None:
        return Question(name, line.category, token_ids=tuple(line.token_ids))
    if line.messages is not None:
        if line.messages[-1].get("role") == "assistant":
            raise Unreadable("the last of its messages is an answer")
        return Question(name, line.category, turns_of(line.messages))
    texts = line.turns if line.turns is not None else [line.prompt]
    return Question(name, line.category, tuple(({"role": "user", "content": t},) for t in texts))


def _check_unique(place: Path, questions: Iterable[Question]) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise UsageError(
                f"{place}: expected each question_id once, found {question.question_id!r} twice",
                "number the conversations, or leave the ids out",
            )
        seen.add(question.question_id)

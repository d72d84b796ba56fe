"""Draws questions of random lengths."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimode.errors import UsageError
from trimode.loadtest.questions import Message, Question, Questions

WORDS = tuple(
    re.findall(
        r"\w+",
        """
        river stone amber cloud maple signal window copper garden paper bridge winter lemon harbor
        velvet engine marble candle forest needle orange pocket rocket silver tunnel violin walnut
        yellow zipper anchor basket carbon
        """,
    )
)
"""Words of random prompts; common ones, so that few are more than one or two tokens."""


@dataclass(frozen=True)
class RandomLengths:
    """Says how long random prompts and answers are.

    Attributes:
        input_len: Tokens of a prompt, or words where the server takes no token ids.
        output_len: Tokens of an answer.
        range_ratio: Spread: lengths are drawn from ``(1 - ratio)`` to ``(1 + ratio)`` times these.
        count: Number of prompts.
        seed: Seed for the draws.
    """

    input_len: int
    output_len: int
    range_ratio: float = 0.0
    count: int = 256
    seed: int = 0

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: one is out of range.
        """
        for name, value in (
            ("random_input_len", self.input_len),
            ("random_output_len", self.output_len),
        ):
            if value < 1:
                raise UsageError(
                    f"expected `{name}` of at least 1, found {value}", "pass a number of tokens"
                )
        if not 0 <= self.range_ratio < 1:
            raise UsageError(
                f"expected `random_range_ratio` from 0 to below 1, found {self.range_ratio}",
                "0 gives equal lengths",
            )


def draw_questions(lengths: RandomLengths, token_ids: Sequence[int]) -> Questions:
    """Draw prompts of token ids, or of words if there are none.

    Args:
        lengths: Lengths, number and seed.
        token_ids: Ids of ordinary tokens; empty = words.
    """
    lengths.check()
    rng = random.Random(lengths.seed)
    drawn = [_draw(rng, number, lengths, token_ids) for number in range(lengths.count)]
    content = json.dumps([[one.turns, one.token_ids, one.max_tokens] for one in drawn])
    kind = "token ids" if token_ids else "words"
    return Questions(
        f"random {kind}, {lengths.input_len} in, {lengths.output_len} out",
        hashlib.sha256(content.encode()).hexdigest(),
        tuple(drawn),
    )


def with_shared_prefix(questions: Questions, length: int, seed: int) -> Questions:
    """Put the same beginning before every conversation.

    Args:
        questions: Data set to change.
        length: Words of the beginning, or token ids where prompts are ids; 0 = none.
        seed: Seed for the words.
    """
    if not length:
        return questions
    rng = random.Random(f"{seed} prefix")
    words = " ".join(rng.choice(WORDS) for _ in range(length))
    ids: list[int] = []
    pool = sorted({token for one in questions.questions for token in one.token_ids or ()})
    if pool:
        ids = [rng.choice(pool) for _ in range(length)]
    changed = tuple(_prefixed(one, words, ids) for one in questions.questions)
    return replace(questions, questions=changed)


def _draw(
    rng: random.Random, number: int, lengths: RandomLengths, token_ids: Sequence[int]
) -> Question:
    size, max_tokens = (
        max(1, round(length * rng.uniform(1 - lengths.range_ratio, 1 + lengths.range_ratio)))
        for length in (lengths.input_len, lengths.output_len)
    )
    name = f"random-{number}"
    if token_ids:
        ids = tuple(rng.choice(token_ids) for _ in range(size))
        return Question(name, "random", token_ids=ids, max_tokens=max_tokens)
    text = " ".join(rng.choice(WORDS) for _ in range(size))
    message: Message = {"role": "user", "content": text}
    return Question(name, "random", ((message,),), max_tokens=max_tokens)


def _prefixed(question: Question, words: str, ids: list[int]) -> Question:
    if question.token_ids is not None:
        return replace(question, token_ids=(*ids, *question.token_ids))
    (first, *messages), *rest = question.turns
    if first["role"] == "system":
        first = {**first, "content": f"{words} {first['content']}"}
        return replace(question, turns=((first, *messages), *rest))
    system: Message = {"role": "system", "content": words}
    return replace(question, turns=((system, first, *messages), *rest))

"""Splits prompts into those to train on and the others."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from trimode.calib.data.draw import draw_texts
from trimode.errors import UsageError
from trimode.formats.contract import ModelInfo
from trimode.runtime.text.prompts import Text

DEFAULT_HELD_OUT, DEFAULT_VALIDATION = 64, 128


@dataclass(frozen=True)
class Prompts:
    """Holds the prompts of a job.

    Attributes:
        texts: Token ids of the prompts.
        sha256: Digest of the file that they came from.
        answers: Texts of all right answers, by the prompt's token ids, where they are known.
        to_text: Decoder of the tokenizer; None if no answer is known.
    """

    texts: Sequence[Text]
    sha256: str
    answers: Mapping[tuple[int, ...], tuple[str, ...]] = field(default_factory=dict)
    to_text: Callable[[Text], str] | None = None

    def is_right(self, prompt: Text, answer: Text) -> bool | None:
        """Tell whether an answer is right, character by character.

        Returns:
            None if no answer to the prompt is known.
        """
        right = self.answers.get(tuple(prompt))
        return None if not right or self.to_text is None else self.to_text(answer) in right


@dataclass(frozen=True)
class Split:
    """Holds prompts, each in one part only.

    Attributes:
        train: Prompts to train on.
        validation: Prompts to decide by.
        held_out: Prompts to measure with; neither trained on nor decided by.
    """

    train: list[Text]
    validation: list[Text]
    held_out: list[Text]

    @property
    def texts(self) -> list[Text]:
        """All of them."""
        return self.train + self.validation + self.held_out


def split_texts(
    texts: Sequence[Text],
    num_samples: int | None,
    num_held_out: int | None,
    seed: int,
    model: ModelInfo,
) -> Split:
    """Draw the parts by the seed, from prompts that differ.

    A prompt that occurs twice must not be trained on and held out.

    Args:
        texts: Token ids of the prompts.
        num_samples: Number of prompts to train on and to decide by together; None = all that are
            not held out.
        num_held_out: Number of held-out prompts; None = a quarter, at most
            :data:`DEFAULT_HELD_OUT`.
        seed: Seed of the draw.
        model: Model that the ids are for.

    Raises:
        UsageError: too few prompts; an empty one, one without room for an answer, or ids that the
            model does not have.
    """
    unique = [
        list(key)
        for key in dict.fromkeys(tuple(text) for text in draw_texts(texts, None, seed, model))
    ]
    held_out = (
        min(DEFAULT_HELD_OUT, max(1, len(unique) // 4)) if num_held_out is None else num_held_out
    )
    needed = held_out + (2 if num_samples is None else num_samples)
    if len(unique) < needed:
        raise UsageError(
            f"expected at least {needed} different prompts, {held_out} of them held out, "
            f"found {len(unique)}",
            "add prompts, or pass a smaller `num_held_out` or `num_samples`",
        )
    random.Random(seed).shuffle(unique)
    rest = unique[held_out:][:num_samples]
    validation = min(DEFAULT_VALIDATION, max(1, len(rest) // 8))
    return Split(train=rest[validation:], validation=rest[:validation], held_out=unique[:held_out])

"""Reads questions, and holds the choices of how to answer them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from trimode.calib.data.checks import check_at_least, check_device_name
from trimode.calib.data.draw import draw_texts
from trimode.errors import UsageError
from trimode.formats.contract import GraphName, Mode, ModelInfo
from trimode.runtime.decode.options import DEFAULT_THRESHOLDS
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.prompts import PromptStyle, Text, encode_prompts, read_prompts_file

ToText = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Question:
    """Holds a prompt's token ids, and all right answers if known."""

    token_ids: Text
    answers: tuple[str, ...] = ()


class Decoding(NamedTuple):
    """Chooses a mode, with or without the drafter's adapter.

    Only self-speculation uses the adapter.
    """

    mode: Mode
    use_drafter: bool = False

    @property
    def threshold(self) -> float:
        """Default threshold of the mode."""
        return DEFAULT_THRESHOLDS[self.mode]


MODES: tuple[Mode, ...] = ("ar", "diffusion", "linear_spec")
"""Modes that are measured. Quadratic self-speculation is not: its tokens are those of ar, and no
calibration has rows of it.
"""


@dataclass(frozen=True)
class QualitySettings:
    """Holds the choices of a caller.

    Attributes:
        modes: Modes that answer the questions.
        num_samples: Number of questions to draw; None = all of them.
        max_new_tokens: Longest answer, in tokens.
        seed: Seed for drawing prompts.
        device: Device of the trunk, ``cpu`` or ``cuda``.
    """

    modes: tuple[Mode, ...] = MODES
    num_samples: int | None = None
    max_new_tokens: int = 128
    seed: int = 0
    device: str = "cpu"

    def check(self) -> None:
        """Raise :class:`UsageError` for a value that cannot be used."""
        known = [mode.replace("_", "-") for mode in MODES]
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown or not self.modes:
            found = unknown[0].replace("_", "-") if unknown else "none"
            raise UsageError(
                f"expected `modes` among {','.join(known)}, found {found}",
                "separate them by commas",
            )
        if len(set(self.modes)) < len(self.modes):
            raise UsageError(
                f"expected each of `modes` once, found {','.join(self.modes).replace('_', '-')}",
                "leave out what is there twice",
            )
        check_at_least(self, num_samples=1, max_new_tokens=1, seed=0)
        check_device_name(self.device)


def decodings_for(modes: Sequence[Mode], *, has_drafter: bool) -> tuple[Decoding, ...]:
    """List what is run for these modes.

    Self-speculation is run with the drafter, where there is one, and without.
    """
    chosen: list[Decoding] = []
    for mode in modes:
        if mode == "linear_spec" and has_drafter:
            chosen.append(Decoding(mode, use_drafter=True))
        chosen.append(Decoding(mode))
    return tuple(chosen)


def graphs_for(modes: Sequence[Mode]) -> tuple[GraphName, ...]:
    """Return the graphs that these modes run."""
    graph_names: list[GraphName] = ["ar"]
    if "diffusion" in modes or "linear_spec" in modes:
        graph_names.append("draft")
    if "linear_spec" in modes:
        graph_names.append("verify")
    return tuple(graph_names)


def draw_questions(
    questions: Sequence[Question], num_samples: int | None, seed: int, model: ModelInfo
) -> list[Question]:
    """Draw some questions without repetition, in order; None draws all.

    Raises:
        UsageError: too few; a prompt that is empty, has no room for an answer, or has ids that the
            model does not have.
    """
    # checks them
    draw_texts([question.token_ids for question in questions], num_samples, seed, model)
    if num_samples is None:
        return list(questions)
    return [
        questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), num_samples))
    ]


def read_questions(
    data: Path, style: PromptStyle, checkpoint_path: Path, model: ModelInfo
) -> tuple[list[Question], ToText | None]:
    """Read the prompts of a file.

    Returns:
        The questions, and the tokenizer's decoder if an answer is known.

    Raises:
        UsageError: the file cannot be read or is empty, or has lines that the checkpoint's
            tokenizer and template, or the model, do not take.
    """
    prompts, codec = read_prompts_file(data, style), cache(partial(TextCodec, checkpoint_path))
    texts = encode_prompts(data, prompts, codec, model)
    to_text = codec().decode if any(prompt.answers for prompt in prompts) else None
    return [
        Question(text, prompt.answers) for text, prompt in zip(texts, prompts, strict=True)
    ], to_text

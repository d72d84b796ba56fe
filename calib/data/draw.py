"""Draws texts after a check that the model can read them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from trimode.errors import UsageError
from trimode.formats.contract import ModelInfo
from trimode.runtime.text.prompts import Text, check_token_ids


def draw_texts(
    texts: Sequence[Text], num_samples: int | None, seed: int, model: ModelInfo
) -> list[Text]:
    """Draw some texts without repetition, in their order.

    Args:
        texts: Token ids of each prompt.
        num_samples: Number of texts to draw; None = all of them.
        seed: Seed of the draw.
        model: Model that the ids are for.

    Raises:
        UsageError: too few texts; an empty one, one without room for an answer, or ids that the
            model does not have.
    """
    wanted = 1 if num_samples is None else num_samples
    if len(texts) < wanted:
        raise UsageError(
            f"expected at least {wanted} prompts, found {len(texts)}",
            "add prompts, or pass a smaller `num_samples`",
        )
    for number, text in enumerate(texts, 1):
        _check(text, f"prompt {number}", model)
    if num_samples is None:
        return [list(text) for text in texts]
    return [
        list(texts[i]) for i in sorted(random.Random(seed).sample(range(len(texts)), num_samples))
    ]


def _check(text: Text, name: str, model: ModelInfo) -> None:
    try:
        check_token_ids(text, model)
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}", error.hint) from error

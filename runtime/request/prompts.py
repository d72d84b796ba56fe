"""Checks token ids that callers pass as array-likes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.errors import UsageError
from trimode.formats.contract import ModelInfo
from trimode.formats.texts import reason_of


def check_single(ids: Any, model: ModelInfo) -> list[int]:
    """Read one prompt ``(1, n)``.

    Raises:
        UsageError: the model does not take it.
    """
    hint = "pass one sequence a call, as [[...]]; generate_batch takes several"
    array = _as_array(ids, "(1, n)", hint)
    if array.ndim != 2 or array.shape[0] != 1:
        raise UsageError(f"expected token ids of shape (1, n), found {array.shape}", hint)
    return _check_tokens(array[0], model)


def check_row(ids: Any, model: ModelInfo) -> list[int]:
    """Read one prompt ``(n,)``.

    Raises:
        UsageError: the model does not take it.
    """
    hint = "pass one list of token ids a row, as [1, 2]"
    array = _as_array(ids, "(n,)", hint)
    if array.ndim != 1:
        raise UsageError(f"expected token ids of shape (n,), found {array.shape}", hint)
    return _check_tokens(array, model)


def check_rows(prompts: Any, model: ModelInfo) -> list[list[int]]:
    """Read prompts, each ``(n,)``.

    Raises:
        UsageError: they are no list of prompts.
    """
    if isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping):
        return [check_row(ids, model) for ids in prompts]
    raise UsageError(
        f"prompts: expected a list of prompts, found {type(prompts).__name__}",
        "pass token ids, as [[1, 2], [3]]",
    )


def _check_tokens(array: NDArray[Any], model: ModelInfo) -> list[int]:
    if array.size == 0:
        raise UsageError(
            "expected at least one token, found an empty prompt",
            "start a text from the bos token if there is nothing to say",
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise UsageError(
            f"expected whole numbers as token ids, found {array.dtype}", "pass int64 ids"
        )
    wrong = array[(array < 0) | (array >= model.vocab_size)]
    if wrong.size:
        found = f"expected token ids from 0 to {model.vocab_size - 1}, found {wrong[0]}"
        raise UsageError(found, "check that the ids come from this model's tokenizer")
    if array.size >= model.max_length:
        raise UsageError(
            f"expected a prompt shorter than {model.max_length} tokens, found {array.size}",
            "shorten the prompt, or build with a larger `max_length`",
        )
    return array.tolist()  # type: ignore[no-any-return]


def _holds_bool(values: Any) -> bool:
    """Tell whether True or False is among nested lists of numbers.

    Numpy would make it 1 or 0.
    """
    if not isinstance(values, list | tuple):
        return False
    kinds = set(map(type, values))
    return not kinds.isdisjoint((bool, np.bool_)) or (
        not kinds.isdisjoint((list, tuple)) and any(map(_holds_bool, values))
    )


def _as_array(ids: Any, shape: str, hint: str) -> NDArray[Any]:
    if _holds_bool(ids):
        raise UsageError("expected whole numbers as token ids, found True or False", hint)
    try:
        return np.asarray(ids)
    except ValueError as error:
        found = f"expected token ids of shape {shape}, found rows of different length"
        raise UsageError(found, hint) from error
    except (TypeError, RuntimeError) as error:
        # Arrays of other libraries raise these: they lie on a GPU, or numpy lacks their type
        found = f"{type(ids).__name__}: {reason_of(error)}"
        raise UsageError(f"expected token ids of shape {shape}, found {found}", hint) from error

"""Checks the types of what callers pass, by argument name.

One table serves all methods.

A method marked with :func:`checks_arguments` gets values of plain Python types: whole numbers and
numbers may also be numpy's, and arrive as ``int`` and ``float``. Ranges are checked where they are
known (:mod:`trimode.runtime.decode.options`).
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from trimode.errors import UsageError

P = ParamSpec("P")
T = TypeVar("T")

_LONGEST_SHOWN = 60


class WrongType(Exception):  # noqa: N818  (worded by :func:`checked`, which knows the name)
    """Says that a value is not what an argument takes."""


class Kind(NamedTuple):
    """Says what an argument takes.

    Attributes:
        words: Description of it, in words.
        read: Function that gives the value in a plain type; raises :class:`WrongType` for any other
            value.
    """

    words: str
    read: Callable[[Any], Any]

    def or_none(self) -> Kind:
        """Return the same kind, or None."""
        return Kind(
            f"{self.words} or None", lambda value: None if value is None else self.read(value)
        )


def _whole(value: Any) -> int:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise WrongType


def _number(value: Any) -> float:
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise WrongType from None
        if math.isfinite(number):
            return number
    raise WrongType


def _flag(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise WrongType


def _text(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    raise WrongType


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(_text, _several(value)))


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, int | np.integer):
        return (_whole(value),)
    return tuple(map(_whole, _several(value)))


def _several(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple | set | frozenset) or (
        isinstance(value, np.ndarray) and value.ndim == 1
    ):
        return value
    raise WrongType


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    # a tuple of pairs is what has been read before
    if isinstance(value, Mapping | tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 for pair in pairs
    ):
        return tuple(sorted((_whole(token), _number(bias)) for token, bias in pairs))
    raise WrongType


def _path(value: Any) -> Path:
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise WrongType


WHOLE = Kind("a whole number", _whole)
NUMBER = Kind("a finite number", _number)
FLAG = Kind("True or False", _flag)
TEXT = Kind("a string", _text)
TEXTS = Kind("a string or several", _texts)
TOKEN_IDS = Kind("one token id or several", _token_ids)
BIASES = Kind("a mapping of token ids to finite numbers", _biases)
PATH = Kind("a path", _path)


def instance_of(cls: type, words: str) -> Kind:
    """Return the kind of the values of a class."""

    def read(value: Any) -> Any:
        if isinstance(value, cls):
            return value
        raise WrongType

    return Kind(words, read)


Kinds = Mapping[str, Kind]


def checked(given: Mapping[str, Any], kinds: Kinds) -> dict[str, Any]:
    """Return the values in plain types.

    Those whose names are not among ``kinds`` stay as they are.

    Raises:
        UsageError: one is of another type; names the argument.
    """
    return {
        name: _checked(name, value, kinds[name]) if name in kinds else value
        for name, value in given.items()
    }


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse keywords that ``what`` does not take.

    Raises:
        UsageError: there is one; proposes the nearest that there is.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise UsageError(f"{what}: expected a keyword that it takes, found {name}", hint)


def checks_arguments(
    kinds: Kinds, *, options: Iterable[str] = ()
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a method refuse arguments that it does not take.

    They are of the wrong type, or unknown keywords.

    Args:
        kinds: Kinds of its arguments; any that are not named here are not looked at.
        options: Keywords that its ``**`` parameter takes, which it checks itself.
    """
    more = frozenset(options)

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(method)
        named = [
            p.name
            for p in signature.parameters.values()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        known = {*named[1:], *more}

        @wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            check_names(kwargs, known, method.__name__)
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise UsageError(
                    f"{method.__name__}: expected its arguments, found: {error}",
                    f"it takes {', '.join(sorted(known))}",
                ) from error
            bound.arguments.update(
                checked(
                    {name: bound.arguments[name] for name in named if name in bound.arguments},
                    kinds,
                )
            )
            return method(*bound.args, **bound.kwargs)

        return call

    return decorate


def _checked(name: str, value: Any, kind: Kind) -> Any:
    try:
        return kind.read(value)
    except WrongType:
        raise UsageError(
            f"{name}: expected {kind.words}, found {_shown(value)}", f"pass {kind.words}"
        ) from None


def _shown(value: Any) -> str:
    """Show a value and its type, in one short line."""
    text = " ".join(repr(value).split())
    short = text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"
    return (
        short if value is None or isinstance(value, bool) else f"{short} ({type(value).__name__})"
    )

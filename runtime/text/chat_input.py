"""Makes a conversation into plain values that a chat template may see."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from trimode.errors import UsageError

REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


def plain_messages(messages: Iterable[Any]) -> list[dict[str, Any]]:
    """Copy messages with each name of the reasoning, without None.

    Raises:
        UsageError: there is no message, or one is no mapping.
    """
    try:
        values = [plain(message) for message in messages]
    except (TypeError, RecursionError) as error:
        raise _not_messages(type(messages).__name__) from error
    if wrong := [value for value in values if not isinstance(value, dict)]:
        raise _not_messages(repr(wrong[0]))
    if not values:
        raise _not_messages("none")
    return [_with_reasoning(_without_none(value)) for value in values]


def plain_tools(tools: Seq[Any] | None) -> list[Any] | None:
    """Copy the schemas of tools.

    Raises:
        UsageError: a tool is no schema.
    """
    return _plain_dicts(
        tools, "tools as JSON schemas", "write the schema of each function as a dict"
    )


def plain_documents(documents: Seq[Any] | None) -> list[Any] | None:
    """Copy documents.

    Raises:
        UsageError: a document is no dict.
    """
    return _plain_dicts(documents, "documents as dicts", "give each a title and a text")


def plain(value: Any) -> Any:
    """Copy a value into JSON's types.

    Anything else becomes a text that names its type: templates are code of others, and a rich
    object may have methods that do harm.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for base in (str, int, float):
        if isinstance(value, base):  # an enum's member, a subclass of float, ...
            return base.__str__(value) if base is str else base(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, tuple):
        return tuple(plain(one) for one in value)
    return _plain_object(value)


def _plain_object(value: Any) -> Any:
    if isinstance(value, np.generic):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [one.name for one in dataclasses.fields(value)]
        return {name: plain(getattr(value, name)) for name in names}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


def _plain_dicts(values: Seq[Any] | None, what: str, hint: str) -> list[Any] | None:
    if values is None:
        return None
    for value in values:
        if not isinstance(value, dict):
            raise UsageError(f"expected {what}, found {value!r}", hint)
    return [plain(value) for value in values]


def _without_none(message: dict[str, Any]) -> dict[str, Any]:
    # Some interfaces write `tool_calls: None`; a template takes what is there for something.
    return {key: value for key, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    given = next((message[name] for name in REASONING_NAMES if name in message), None)
    if given is None:
        return message
    return {"thinking": given, **message, "reasoning_content": given}


def _not_messages(found: str) -> UsageError:
    return UsageError(
        f"expected a list of messages, found {found}",
        'give each message as a dict: {"role": "user", "content": "..."}',
    )

"""Renders a conversation whose last message is to be continued, not answered.

A mark is put behind the message, and the rendered text is cut where the mark is, as transformers
does it.
"""

from __future__ import annotations

from typing import Any

from trimode.errors import UsageError
from trimode.runtime.text.chat_input import REASONING_NAMES

_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_HINT = "end the messages with the assistant's, as far as it goes"


def mark_end(messages: list[dict[str, Any]], field: str, template: str) -> str:
    """Put the mark behind the last message.

    Args:
        messages: Plain messages, changed in place.
        field: Name of the message's field, such as ``content``.
        template: Template that will render them.

    Returns:
        The text that is to be continued.

    Raises:
        UsageError: the last message has no such text, or the template does not render it.
    """
    last = messages[-1]
    text = last.get(field)
    if text is None:
        raise UsageError(f"expected {field} in the last message, found none", _HINT)
    fields = [field]
    if field in REASONING_NAMES:
        fields = [name for name in REASONING_NAMES if last.get(name) == text]
    if not any(name in template for name in fields):
        raise UsageError(f"expected a chat template that renders {field}, found one without", _HINT)
    if isinstance(text, list | tuple):
        return _mark_part(text, field)
    if not isinstance(text, str):
        raise UsageError(f"expected {field} of the last message as text, found {text!r}", _HINT)
    last.update(dict.fromkeys(fields, text + _MARK))
    return text


def cut_at_mark(rendered: str, text: str) -> str:
    """Cut a rendered text where the message to continue ends.

    Raises:
        UsageError: the template changed the text.
    """
    mark = _MARK.strip()
    if text.strip() not in rendered or mark not in rendered:
        raise UsageError(
            "expected a chat template that keeps the last message whole, found one that changes it",
            "leave out what the template drops, such as reasoning of an earlier turn",
        )
    end = rendered.rindex(mark)
    # Without the blank behind it, the template has trimmed the message.
    is_kept = rendered[end:].startswith(_MARK)
    return rendered[:end] if is_kept else rendered[:end].rstrip()


def _mark_part(parts: Any, field: str) -> str:
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _MARK
            return text
    raise UsageError(f"expected text in {field} of the last message, found none", _HINT)

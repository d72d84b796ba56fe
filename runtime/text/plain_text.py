"""Keeps texts of messages from becoming control tokens.

A chat template writes control tokens such as ``<|im_end|>`` between the messages. The same
characters inside a message are text. Rendering mixes both, so texts are marked first: each such
occurrence gets a random mark behind its first character. What is found without a mark afterwards,
the template has written.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

_BRACKETS = {"<": ">", "[": "]"}


class ControlTokens:
    """Knows the control tokens of a tokenizer.

    They are special ones, and added ones in brackets. Other added tokens are words that the model
    has learned as one token; they mean no more than their text.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._source = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.ids = {token.content: number for number, token in added.items() if _is_control(token)}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _plain(self) -> Tokenizer:
        """Tokenizer that knows no control token."""
        plain = Tokenizer.from_str(self._source.to_str())
        plain.add_special_tokens([AddedToken(text, special=True) for text in self.ids])
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        return plain

    def marked(self, value: Any, mark: str, allowed: Iterable[str] = ()) -> Any:
        """Mark control tokens in all texts of a plain value.

        Args:
            value: Text, or lists and mappings with texts in them.
            mark: Characters to put behind the first one of each.
            allowed: Control tokens that stay as they are.
        """
        if isinstance(value, str):
            return self._pattern.sub(
                lambda found: found[0] if found[0] in allowed else _marked(found[0], mark), value
            )
        if isinstance(value, Mapping):
            return {
                self.marked(key, mark, allowed): self.marked(one, mark, allowed)
                for key, one in value.items()
            }
        if isinstance(value, list | tuple):
            return type(value)(self.marked(one, mark, allowed) for one in value)
        return value

    def encode(self, rendered: str, mark: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Encode a rendered text with marks in it.

        Args:
            rendered: Text from the template.
            mark: Characters that mark what is text.
            encode: Encodes texts with control tokens.

        Returns:
            Token ids. What stands between two control tokens with a mark in it is encoded by a
            tokenizer that knows none.
        """
        if mark not in rendered:
            return encode(rendered)
        ids: list[int] = []
        for piece, is_marked in self._pieces(rendered, mark):
            ids += self._encode_plain(piece.replace(mark, "")) if is_marked else encode(piece)
        return ids

    def _pieces(self, rendered: str, mark: str) -> Iterable[tuple[str, bool]]:
        """Cut a text at control tokens; neighbours without a mark stay together."""
        pending, last = "", 0
        for found in [*self._pattern.finditer(rendered), None]:
            text = rendered[last : found.start() if found else len(rendered)]
            control = found[0] if found else ""
            last = found.end() if found else last
            if mark in text:
                if pending:
                    yield pending, False
                yield text, True
                pending = control
            else:
                pending += text + control
        if pending:
            yield pending, False

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._plain.encode(text, add_special_tokens=False).ids)


def new_mark() -> str:
    """Make a mark that no client can guess.

    It has letters and digits, which templates keep.
    """
    return f"x{secrets.token_hex(12)}x"


def _marked(token: str, mark: str) -> str:
    return token[0] + mark + token[1:]


def _is_control(token: AddedToken) -> bool:
    text = token.content
    return bool(token.special) or (len(text) > 2 and _BRACKETS.get(text[0]) == text[-1])

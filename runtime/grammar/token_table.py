"""Says which bytes each token writes, and tokenizes forced text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer

_ANCHOR = "a"
"""Text before a token, for decoders that treat the first token of a text unlike the others."""


class TokenTable:
    """Holds the bytes of each token.

    It has the attributes that ``llguidance.TokenizerWrapper`` asks for.

    Args:
        tokenizer: Tokenizer of the model.
        vocab_size: Rows of the model's head, V.
        eos_token_id: Token that ends a text, for the library; None = the model has none.

    Attributes:
        tokens: Bytes of each token, V of them. Names of control tokens are for messages alone.
        ids: Bytes -> a token that writes them.
        special_token_ids: Tokens that write no text: control tokens, and ids without a token.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int | None) -> None:
        self._tokenizer = tokenizer
        self._controls = frozenset(_control_tokens(tokenizer))
        written = _byte_reader(tokenizer)
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for token in range(vocab_size):
            name = tokenizer.id_to_token(token)
            text = b"" if name is None or token in self._controls else written(token, name)
            self.tokens.append(text or (name or f"<|unused {token}|>").encode())
            if not text:
                self.special_token_ids.append(token)
        ends = [eos_token_id] if eos_token_id is not None else self.special_token_ids
        self.eos_token_id = ends[0] if ends else 0
        self._silent = frozenset(self.special_token_ids)
        self.ids = {text: i for i, text in enumerate(self.tokens) if i not in self._silent}
        self._longest = max(map(len, self.ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokenize text as the tokenizer does, without control tokens.

        Where it would write a control token, or other text, the longest token comes first.
        """
        if isinstance(text, bytes):
            raise TypeError("text")  # so that the library hands over strings
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        data = text.encode()
        is_faithful = self._silent.isdisjoint(ids) and self._joined(ids) == data
        return ids if is_faithful else self._longest_first(data)

    def _joined(self, ids: Sequence[int]) -> bytes:
        known = len(self.tokens)
        return b"".join(self.tokens[token] if token < known else b"\xff" for token in ids)

    def _longest_first(self, data: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self.ids), None)
            if end is None:  # no token writes this byte; the grammar's mask will say so
                return ids
            ids.append(self.ids[data[start:end]])
            start = end
        return ids


def _control_tokens(tokenizer: Tokenizer) -> list[int]:
    """List added tokens that are special, or named like tags: ``<think>``."""
    return [
        token
        for token, added in tokenizer.get_added_tokens_decoder().items()
        if added.special or (added.content[:1] == "<" and added.content[-1:] == ">")
    ]


def _byte_reader(tokenizer: Tokenizer) -> Callable[[int, str], bytes]:
    """Make what gives the bytes that a token writes inside texts."""
    kinds = repr(tokenizer.decoder)
    added = {token for token, one in tokenizer.get_added_tokens_decoder().items()}
    if "ByteLevel" in kinds:
        values = _byte_level_values()

        def by_level(token: int, name: str) -> bytes:
            if token in added or any(character not in values for character in name):
                return name.encode()
            return bytes(values[character] for character in name)

        return by_level
    return _by_decoding(tokenizer, has_fallback="ByteFallback" in kinds)


def _by_decoding(tokenizer: Tokenizer, *, has_fallback: bool) -> Callable[[int, str], bytes]:
    anchor: Any = tokenizer.token_to_id(_ANCHOR)
    before = [] if anchor is None else [anchor]
    start = len(tokenizer.decode(before, skip_special_tokens=False))

    def by_decoding(token: int, name: str) -> bytes:
        if has_fallback and len(name) == 6 and name.startswith("<0x"):
            return bytes.fromhex(name[3:5])
        return tokenizer.decode([*before, token], skip_special_tokens=False)[start:].encode()

    return by_decoding


@cache
def _byte_level_values() -> dict[str, int]:
    """Map each character of byte-level vocabularies (GPT-2's) to its byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [value for value in range(256) if value not in shown]
    return {
        **{chr(value): value for value in shown},
        **{chr(256 + number): value for number, value in enumerate(hidden)},
    }

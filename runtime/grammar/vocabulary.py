"""Shows grammars a model's vocabulary, as the bytes of its tokens.

The library reads it, and forced text is written with it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trimode.formats.contract import ModelInfo
from trimode.runtime.grammar.library import load_llguidance
from trimode.runtime.grammar.token_table import TokenTable

_PROBES = (b"a", b"e", b"0", b"1", b" ", b'"')
_MOST_BEGINNINGS = 64
"""Words of a mask of which more than one text is expected."""
_LONGEST_LOOK = 32
"""Bytes from the end of a forced text in which a longer token may begin."""


class Vocabulary:
    """Holds the tokens of one model for all its grammars.

    Args:
        tokenizer: Tokenizer of the bundle.
        model: Facts about the model.

    Attributes:
        table: Bytes of each token.
        size: Rows of the model's head, V.
        mask_token_id: Token that no answer has.
        library: Tokenizer that llguidance compiles grammars for.
        probes: Tokens of one byte each, of which any free text allows two.

    Raises:
        DependencyError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelInfo) -> None:
        module = load_llguidance()
        ends = model.eos_token_ids
        self.table = TokenTable(tokenizer, model.vocab_size, ends[0] if ends else None)
        self.size, self.mask_token_id = model.vocab_size, model.mask_token_id
        self.library: Any = module.LLTokenizer(module.TokenizerWrapper(self.table))
        self._silent = frozenset(self.table.special_token_ids)
        self._sorted = sorted(self.table.ids)
        single = {text: i for i, text in enumerate(self.table.tokens) if len(text) == 1}
        self.probes = [single[text] for text in _PROBES if text in single]

    def read_mask(self, bitmask: bytes) -> NDArray[np.bool_]:
        """Read the library's mask as ``(V,)``; the caller may change it."""
        bits = np.unpackbits(np.frombuffer(bitmask, np.uint8), bitorder="little")
        return bits[: self.size].view(np.bool_)

    def common_beginning(self, bitmask: bytes, but: frozenset[int]) -> int | None:
        """Find the token that all tokens of the mask begin with.

        So its bytes are forced. The result is None where there is no such token.

        Args:
            bitmask: Mask of the library.
            but: Tokens of it that do not count.
        """
        words = np.frombuffer(bitmask, np.uint32)
        filled = np.flatnonzero(words)
        if filled.size > _MOST_BEGINNINGS:
            return None
        bits = np.unpackbits(words[filled].view(np.uint8), bitorder="little").reshape(-1, 32)
        rows, columns = np.nonzero(bits)
        ids = [token for token in (32 * filled[rows] + columns).tolist() if token not in but]
        if not ids or not self._silent.isdisjoint(ids):
            return None
        tokens = self.table.tokens
        shortest = min(ids, key=lambda token: len(tokens[token]))
        is_common = all(tokens[token].startswith(tokens[shortest]) for token in ids)
        return int(shortest) if is_common else None

    def tokenize(self, text: bytes, *, is_whole: bool) -> list[int]:
        """Tokenize a forced text, as the tokenizer writes it.

        Args:
            text: Bytes that are certain.
            is_whole: Whether nothing comes after them. Else tokens at the end that would become
                others with more text are left out.
        """
        shown = text.decode(errors="ignore")
        tokens = self.table(shown)
        if is_whole and shown.encode() == text:
            return tokens
        return tokens[: self._num_certain(tokens)]

    def _num_certain(self, tokens: list[int]) -> int:
        """Count the tokens that stay, whatever follows.

        Behind them no longer token can begin.
        """
        tail, certain = b"", len(tokens)
        for number in range(len(tokens) - 1, -1, -1):
            tail = self.table.tokens[tokens[number]] + tail
            if len(tail) > _LONGEST_LOOK:
                break
            if self._has_longer(tail):
                certain = number
        return certain

    def _has_longer(self, text: bytes) -> bool:
        """Whether a token begins with ``text`` and goes on."""
        place = bisect_right(self._sorted, text)
        return place < len(self._sorted) and self._sorted[place].startswith(text)

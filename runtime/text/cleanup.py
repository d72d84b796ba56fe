"""Takes out the blanks before punctuation, where ``clean_up_tokenization_spaces`` asks for it."""

from __future__ import annotations

_PAIRS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)  # in the order of transformers' `clean_up_tokenization`


def clean_up(text: str) -> str:
    """Remove blanks before punctuation."""
    for old, new in _PAIRS:
        text = text.replace(old, new)
    return text


class CleanUp:
    """Applies :func:`clean_up` to a text that comes in pieces.

    It holds back what may still change.
    """

    def __init__(self) -> None:
        self._held = [""] * len(_PAIRS)  # for each pair, text that may begin what it replaces

    def push(self, text: str) -> str:
        """Return the text that became certain with this piece."""
        for step, (old, new) in enumerate(_PAIRS):
            done, found, rest = (self._held[step] + text).rpartition(old)
            count = next(n for n in range(len(old) - 1, -1, -1) if rest.endswith(old[:n]))
            certain = len(rest) - count
            text = (done + found).replace(old, new) + rest[:certain]
            self._held[step] = rest[certain:]
        return text

    def finish(self) -> str:
        """Return what was still held back."""
        text = ""
        for step, (old, new) in enumerate(_PAIRS):
            text = (self._held[step] + text).replace(old, new)
        self._held = [""] * len(_PAIRS)
        return text

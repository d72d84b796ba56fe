"""Finds tags in a text that comes in pieces."""

from __future__ import annotations


def held_back(text: str, tag: str) -> int:
    """Count the last characters of a text that may begin a tag."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if tag.startswith(text[-n:])), 0)

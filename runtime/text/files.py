"""Reads the tokenizer's files, and words what is wrong with one."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trimode.errors import BundleError
from trimode.formats.texts import Unreadable, decode_text, parse_json, read_bytes, reason_of

T = TypeVar("T")
TEMPLATE_FOLDER = "additional_chat_templates"
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
COPY_AGAIN = "copy the file from the published checkpoint into the checkpoint, then build again"
_LFS_POINTER = "version https://git-lfs.github.com/spec/"


def text_files(folder: Path) -> list[str]:
    """List the files of a folder that turn text into tokens.

    Returns:
        Names that the folder has, a template of the folder of templates as ``folder/name``.
    """
    templates = sorted(one.name for one in (folder / TEMPLATE_FOLDER).glob("*.jinja"))
    names = (*_TEXT_FILES, *(f"{TEMPLATE_FOLDER}/{name}" for name in templates))
    return [name for name in names if (folder / name).is_file()]


def check_names(folder: Path) -> None:
    """Check that everything named like such a file is a file.

    Raises:
        BundleError: it is a folder, or a link that leads nowhere.
    """
    for path in (folder / name for name in _TEXT_FILES):
        if os.path.lexists(path) and not path.is_file():
            raise unusable(
                path, "a file", "a folder" if path.is_dir() else "a link that leads nowhere"
            )


def read_source(path: Path, what: str) -> str:
    """Read a text file with ``LF`` at the end of each line.

    A byte order mark is refused, as by transformers, to which it is part of the text.

    Args:
        path: Path of the file.
        what: Kind of the file, for the message.

    Raises:
        BundleError: the file is unreadable, not UTF-8, begins with a byte order mark, or is only a
            pointer to the file.
    """
    try:
        raw = read_bytes(path)
        text = decode_text(raw)
    except Unreadable as error:
        raise unusable(path, what, error.reason) from error
    if raw.startswith(codecs.BOM_UTF8):
        raise unusable(path, what, "a byte order mark before it")
    if text.startswith(_LFS_POINTER):
        raise BundleError(
            f"{path}: expected {what}, found a Git LFS pointer to it",
            "run `git lfs pull` in the checkpoint, then build again",
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file gives an empty one.

    Raises:
        BundleError: the file cannot be read, or is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = parse_json(read_source(path, "JSON"))
    except Unreadable as error:
        raise unusable(path, "JSON", error.reason) from error
    if not isinstance(value, dict):
        raise unusable(path, "a JSON object", f"a {type(value).__name__}")
    return value


def unusable(path: Path, what: str, reason: str) -> BundleError:
    """Make the error for a file that cannot be used."""
    return BundleError(f"{path}: expected {what}, found: {reason}", COPY_AGAIN)


def guarded(path: Path, what: str, call: Callable[[], T]) -> T:
    """Call the tokenizers library for a file.

    Raises:
        BundleError: the library failed; it raises bare ``Exception``, and ``PanicException`` where
            it panics.
    """
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise unusable(path, what, reason_of(error)) from error

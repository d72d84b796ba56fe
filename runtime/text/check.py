"""Checks at build time that the tokenizer's files fit the model."""

from __future__ import annotations

from pathlib import Path

from trimode.errors import BundleError
from trimode.runtime.text.chat_template import ConversationError
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.files import check_names

_PLAIN_TEXT = "Add 1 and 2. é漢🙂\n"
_CONVERSATION = ({"role": "user", "content": _PLAIN_TEXT},)


def check_text(folder: Path, vocab_size: int) -> None:
    """Use a folder's tokenizer and chat template once each.

    Does nothing if the folder has no ``tokenizer.json``.

    Args:
        folder: Folder of a checkpoint or a bundle.
        vocab_size: Number of tokens that the model has embeddings for.

    Raises:
        TrimodeError: a file cannot be read or used, or gives ids that the model does not have.
    """
    check_names(folder)
    if not (folder / "tokenizer.json").is_file():
        return
    codec = TextCodec(folder)
    ids = [*codec.encode(_PLAIN_TEXT), *_chat_ids(codec)]
    if max(ids, default=0) >= vocab_size:
        raise BundleError(
            f"{folder / 'tokenizer.json'}: expected token ids below {vocab_size}, found {max(ids)}",
            "copy the tokenizer files of the published checkpoint into the checkpoint, "
            "then build again",
        )


def _chat_ids(codec: TextCodec) -> list[int]:
    if not codec.has_chat_template:
        return []
    try:
        return codec.encode_chat(_CONVERSATION)
    except ConversationError:  # a template that works, for other conversations
        return []

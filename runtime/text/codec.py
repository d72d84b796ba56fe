"""Encodes and decodes text as transformers does.

It has the checkpoint's tokenizer and chat template.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from trimode.errors import UsageError
from trimode.runtime.text.chat_continue import cut_at_mark, mark_end
from trimode.runtime.text.chat_input import plain, plain_documents, plain_messages, plain_tools
from trimode.runtime.text.chat_template import ChatTemplates
from trimode.runtime.text.cleanup import clean_up
from trimode.runtime.text.files import guarded, read_object
from trimode.runtime.text.plain_text import ControlTokens, new_mark
from trimode.runtime.text.special_tokens import open_tokenizer
from trimode.runtime.text.stream import TextStream, first_stop
from trimode.runtime.text.token_window import Decoding

__all__ = ["Message", "TextCodec", "TextStream", "first_stop"]

Message = dict[str, Any]
_BLANK = "\u2581"
"""Stands for a blank in the vocabularies of SentencePiece."""
THINKING = ("<think>", "</think>")
_OF_TEMPLATES = ("chat_template", "continue_final_message")
_CLEANS_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


class TextCodec:
    """Opens a folder's tokenizer, equal to transformers' ``AutoTokenizer``.

    Args:
        folder: Folder with ``tokenizer.json``, and ``tokenizer_config.json``,
            ``special_tokens_map.json``, ``added_tokens.json``, ``chat_template.jinja`` and
            ``additional_chat_templates`` if it has them.

    Raises:
        UsageError: the folder has no tokenizer.
        BundleError: a file cannot be read or used.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "tokenizer.json"
        if not self._file.is_file():
            raise UsageError(
                f"{folder}: expected tokenizer.json, found none",
                "pass token ids, or build from a checkpoint that has its tokenizer",
            )
        config = read_object(folder / "tokenizer_config.json")
        self._tokenizer, tokens = open_tokenizer(folder, config)
        self._names = tokens.texts()
        self._templates = ChatTemplates(folder, config)
        self._cleans_up = _cleans_up(self._tokenizer, config)

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template; base checkpoints have none."""
        return len(self._templates) > 0

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Added tokens that :meth:`decode` leaves out."""
        # The library is asked: it goes by the texts that ever were special, not by the flags.
        added, decode = self._tokenizer.get_added_tokens_decoder(), self._decode_raw
        return frozenset(
            one for one in added if decode([one]) != decode([one], skip_special_tokens=False)
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer itself, with the special tokens of all files."""
        return self._tokenizer

    @property
    def cleans_up(self) -> bool:
        """Whether :meth:`decode` takes out blanks before punctuation."""
        return self._cleans_up

    @cached_property
    def decoding(self) -> Decoding:
        """Way in which :meth:`decode` works before it takes out blanks.

        A stream needs it.
        """
        return Decoding(self._decode_raw, self._is_silent, _byte_values(self._tokenizer))

    def encode(self, text: str) -> list[int]:
        """Encode plain text, with what the tokenizer adds by itself.

        A first token is added, for example.

        Raises:
            UsageError: the text has half a surrogate pair.
            BundleError: the tokenizer has no token for it, not even for unknown text.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Seq[Message], **options: Any) -> list[int]:
        """Encode a conversation that asks for the assistant's answer.

        Args:
            messages: Messages, as for :meth:`render_chat`.
            **options: Options, as for :meth:`render_chat`.

        Raises:
            UsageError: as for :meth:`render_chat`, or the text has half a surrogate pair.
            BundleError: as for :meth:`render_chat`.
        """
        return self.encode_rendered(self.render_chat(messages, **options))

    def render_chat(
        self,
        messages: Seq[Message],
        *,
        enable_thinking: bool | None = False,
        tools: Seq[dict[str, Any]] | None = None,
        documents: Seq[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str:
        """Render a conversation by the checkpoint's chat template.

        Args:
            messages: Messages, each with a ``role``, a ``content`` (text, or a list of parts) and
                what else the template knows, such as ``tool_calls``.
            enable_thinking: Value for the template; None = it is not given to it.
            tools: JSON schemas of tools; with any, a template called ``tool_use`` is used.
            documents: Documents, each with a ``title`` and a ``text``.
            add_generation_prompt: Whether the assistant's turn begins; None = unless the last
                message is continued.
            continue_final_message: Whether the last message stays open; a text names the field to
                continue.
            chat_template: Name of one of several templates, or a template itself.
            **template_kwargs: Other values that the template sees.

        Raises:
            UsageError: there is no template, or it does not take the conversation.
            BundleError: the template cannot be compiled.
        """
        if continue_final_message and add_generation_prompt:
            raise UsageError(
                "expected a message to continue or the beginning of an answer, "
                "found both asked for",
                "leave out add_generation_prompt, or continue_final_message",
            )
        source = self._templates.choose(chat_template, with_tools=tools is not None)
        chat = plain_messages(messages)
        field = "content" if continue_final_message is True else continue_final_message
        end = mark_end(chat, field, source.text) if field else ""
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        variables = self._names | plain(thinking | template_kwargs)
        variables |= {
            "messages": chat,
            "tools": plain_tools(tools),
            "documents": plain_documents(documents),
            "add_generation_prompt": plain(
                not field if add_generation_prompt is None else add_generation_prompt
            ),
        }
        rendered = self._templates.render(source, variables)
        return cut_at_mark(rendered, end) if field else rendered

    def token_id(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, such as ``</think>``.

        None if there is no such token.
        """
        return self._tokenizer.token_to_id(token)

    def token_text(self, token_id: int) -> str:
        """Decode one token, special tokens included; half a character becomes U+FFFD.

        A blank before it is kept.
        """
        text = self._decode_raw([token_id], skip_special_tokens=False)
        name = self._tokenizer.id_to_token(token_id) or ""
        lost = name.startswith(_BLANK) and not text.startswith(" ")  # at the beginning of a text
        return f" {text}" if lost else text

    def decode(self, token_ids: Seq[int]) -> str:
        """Decode tokens, without special tokens."""
        text = self._decode_raw(token_ids)
        return clean_up(text) if self._cleans_up else text

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """Control tokens, which texts of messages must not hold."""
        return ControlTokens(self._tokenizer)

    def encode_messages(self, messages: Seq[Message], **options: Any) -> tuple[str, list[int]]:
        """Encode a conversation of strangers.

        No text of it becomes a control token. An assistant's message may hold ``<think>`` and
        ``</think>``, which templates look for.

        Args:
            messages: Messages, as for :meth:`render_chat`.
            **options: Options, as for :meth:`render_chat`.

        Returns:
            Rendered text, and token ids.

        Raises:
            UsageError: as for :meth:`encode_chat`.
            BundleError: as for :meth:`encode_chat`.
        """
        tokens, mark = self.control_tokens, new_mark()
        marked = [
            tokens.marked(one, mark, THINKING if one.get("role") == "assistant" else ())
            for one in plain_messages(messages)
        ]
        given = {
            name: one if name in _OF_TEMPLATES else tokens.marked(plain(one), mark)
            for name, one in options.items()
        }
        rendered = self.render_chat(marked, **given)
        ids = tokens.encode(rendered, mark, self.encode_rendered)
        return rendered.replace(mark, ""), ids

    def encode_rendered(self, rendered: str) -> list[int]:
        """Encode what :meth:`render_chat` has rendered.

        Raises:
            UsageError: the text has half a surrogate pair.
            BundleError: the tokenizer has no token for it, not even for unknown text.
        """
        return self._encode(rendered, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise UsageError(
                "expected text that UTF-8 can write, "
                f"found half a surrogate pair {half!a} at character {error.start}",
                "take it out, or join both halves into one character",
            ) from error
        encode = self._tokenizer.encode
        return guarded(
            self._file,
            "a tokenizer that takes any text",
            lambda: encode(text, add_special_tokens=add_special_tokens).ids,
        )

    def _decode_raw(self, token_ids: Seq[int], *, skip_special_tokens: bool = True) -> str:
        ids, decode = list(token_ids), self._tokenizer.decode
        return guarded(
            self._file,
            "a tokenizer that takes any token ids",
            lambda: decode(ids, skip_special_tokens=skip_special_tokens),
        )

    def _is_silent(self, token: int) -> bool:
        return token in self.special_ids or self._tokenizer.id_to_token(token) is None


def _cleans_up(tokenizer: Tokenizer, config: dict[str, Any]) -> bool:
    # transformers leaves BPE alone: the blanks are the text's own there.
    is_bpe = isinstance(tokenizer.model, BPE)
    asked = bool(config.get("clean_up_tokenization_spaces"))
    return asked and (not is_bpe or bool(config.get(_CLEANS_BPE)))


def _byte_values(tokenizer: Tokenizer) -> dict[int, int]:
    """Return the tokens that a decoder with byte fallback takes for bytes."""
    if "ByteFallback" not in repr(tokenizer.decoder):
        return {}
    digits = "0123456789abcdefABCDEF"
    values = {
        f"<0x{first}{second}>": int(first + second, 16) for first in digits for second in digits
    }
    ids = ((tokenizer.token_to_id(name), value) for name, value in values.items())
    return {index: value for index, value in ids if index is not None}

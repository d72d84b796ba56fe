"""Text to tokens and back: the checkpoint's tokenizer and chat template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from trimode.errors import BundleError, UsageError

Message = dict[str, str]


class TextCodec:
    """The tokenizer of a bundle.

    Args:
        folder: where ``tokenizer.json`` lies, and ``chat_template.jinja`` or a template in ``tokenizer_config.json``.

    Raises:
        UsageError: the folder has no tokenizer.
        BundleError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UsageError(f"{folder}: expected tokenizer.json, found none", "pass token ids, or build from a checkpoint that has its tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{file}: expected a tokenizer, found one that cannot be read ({error})", "build the bundle again") from error
        config = folder / "tokenizer_config.json"
        self._config: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        template = folder / "chat_template.jinja"
        source = template.read_text(encoding="utf-8") if template.is_file() else self._config.get("chat_template")
        self._template = _environment().from_string(source) if isinstance(source, str) else None

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, with what the tokenizer adds by itself (such as a first token)."""
        return self._tokenizer.encode(text).ids

    def encode_chat(self, messages: Seq[Message], *, enable_thinking: bool = False) -> list[int]:
        """Tokens of a conversation that asks for the assistant's answer, through the checkpoint's chat template."""
        return self._tokenizer.encode(self.render_chat(messages, enable_thinking=enable_thinking), add_special_tokens=False).ids

    def render_chat(self, messages: Seq[Message], *, enable_thinking: bool = False) -> str:
        """The text that :meth:`encode_chat` tokenizes."""
        if self._template is None:
            raise UsageError("expected a chat template in the bundle, found none", "pass --raw to use the prompt as it is")
        tokens = {name: _content(self._config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, enable_thinking=enable_thinking, **tokens)
        except TemplateError as error:
            raise UsageError(f"expected a conversation that the chat template accepts, found: {error}", "check the order of roles") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether a conversation can be rendered; base checkpoints have no template."""
        return self._template is not None

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, such as ``</think>``; None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def decode(self, token_ids: Seq[int]) -> str:
        """Text of tokens, without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


class TextStream:
    """Turns tokens that arrive in pieces into text that arrives in pieces, and never takes text back.

    Held back are bytes of a character that is not complete, and text that may be the beginning of a stop string. Only a window of tokens is
    decoded at each step: those whose text came out last, for what a decoder does at a seam, and the new ones.

    Args:
        codec: the tokenizer.
        stop: the text ends before the first of these that is complete, wherever in it tokens begin and end.
        min_tokens: one that is complete before so many tokens ends nothing.

    Attributes:
        is_stopped: a stop string is complete; no more text will come.
    """

    def __init__(self, codec: TextCodec, stop: Seq[str] = (), min_tokens: int = 0) -> None:
        self._codec = codec
        self._shown: list[int] = []  # tokens of the last piece
        self._held: list[int] = []  # tokens whose text is not out yet
        self._stop, self._min_tokens, self._count = tuple(stop), min_tokens, 0
        self._tail = ""  # text that may be the beginning of a stop string
        self.is_stopped = False

    def push(self, token_ids: Seq[int]) -> str:
        """Text that became certain with these tokens."""
        if not self._stop:
            return self._complete(token_ids)
        return "".join(self._push_watched(token) for token in token_ids)  # one by one, to know the token that completes a stop string

    def finish(self) -> str:
        """What was still held back."""
        return "" if self.is_stopped else self._tail + self._new_text()

    def _push_watched(self, token: int) -> str:
        if self.is_stopped:
            return ""
        self._count += 1
        self._tail += self._complete([token])
        if self._count >= self._min_tokens:
            # An incomplete character may follow, in the same token, on what completes a stop string.
            text = self._tail + self._new_text().rstrip("\ufffd") if self._held else self._tail
            end = first_stop(text, self._stop)
            if end is not None:
                self.is_stopped = True
                return text[:end]
        certain = len(self._tail) - _beginning(self._tail, self._stop)
        out, self._tail = self._tail[:certain], self._tail[certain:]
        return out

    def _complete(self, token_ids: Seq[int]) -> str:
        self._held += token_ids
        new = self._new_text()
        if not new or new.endswith("\ufffd"):
            return ""
        self._shown, self._held = self._held, []
        return new

    def _new_text(self) -> str:
        before = self._codec.decode(self._shown)
        return self._codec.decode(self._shown + self._held)[len(before) :]


def first_stop(text: str, stop: Seq[str]) -> int | None:
    """Where the stop string begins that is complete first, the longest where several are; None if there is none."""
    found = [(begin + len(s), begin) for s in stop if (begin := text.find(s)) >= 0]
    return min(found)[1] if found else None


def _beginning(text: str, stop: Seq[str]) -> int:
    """How many of the last characters of ``text`` may be the beginning of a stop string."""
    longest = min(len(text), max(map(len, stop)) - 1)
    return next((n for n in range(longest, 0, -1) if any(len(s) > n and s.startswith(text[-n:]) for s in stop)), 0)


def _environment() -> ImmutableSandboxedEnvironment:
    # The settings and helpers that Hugging Face templates count on.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now(tz=datetime.UTC).strftime(pattern)
    return environment


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")

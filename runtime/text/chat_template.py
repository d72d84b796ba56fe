"""Finds, chooses and renders the chat templates of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, TemplateSyntaxError

from trimode.errors import BundleError, UsageError
from trimode.formats.texts import reason_of
from trimode.runtime.text.files import COPY_AGAIN, TEMPLATE_FOLDER, read_source, unusable
from trimode.runtime.text.template_environment import RefusalError, environment

MAX_CHARACTERS = 1 << 26
_DEFAULT, _WITH_TOOLS = "default", "tool_use"


class ConversationError(UsageError):
    """Reports that a template itself refuses a conversation."""


class Source(NamedTuple):
    """Holds the text of a template, and its file."""

    text: str
    file: Path


class ChatTemplates:
    """Holds the templates of a folder, by name.

    Files count before ``chat_template`` in ``tokenizer_config.json``: ``chat_template.jinja`` is
    the one called ``default``, those in ``additional_chat_templates`` have the names of their
    files.

    Args:
        folder: Folder with ``tokenizer.json``.
        config: Contents of ``tokenizer_config.json``.

    Raises:
        BundleError: a file cannot be read.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder = folder
        self._sources = _from_files(folder) or _from_config(folder, config)
        self._compiled: dict[Source, Template] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def choose(self, name: str | None = None, *, with_tools: bool = False) -> Source:
        """Choose a template.

        Args:
            name: Name of a template, or a template itself; None = the default one.
            with_tools: Whether the conversation comes with tools.

        Raises:
            UsageError: there is none, or none is the default one.
        """
        if name is not None:
            return self._sources.get(name) or Source(name, Path("chat_template"))
        names = (_WITH_TOOLS, _DEFAULT) if with_tools else (_DEFAULT,)
        found = next((self._sources[one] for one in names if one in self._sources), None)
        return found or self._none_found()

    def render(self, source: Source, variables: dict[str, Any]) -> str:
        """Render a conversation.

        Raises:
            BundleError: the template cannot be compiled.
            ConversationError: the template does not take the conversation.
            UsageError: the template fails on the conversation.
        """
        template = self._compile(source)
        try:
            return _render(template, variables)
        except RefusalError as error:
            raise ConversationError(*_wording(source, reason_of(error))) from error
        except TemplateError as error:
            raise UsageError(*_wording(source, reason_of(error))) from error
        except Exception as error:
            reason = f"{type(error).__name__}: {reason_of(error)}"
            raise UsageError(*_wording(source, reason)) from error

    def _compile(self, source: Source) -> Template:
        try:
            if source not in self._compiled:
                self._compiled[source] = environment().from_string(source.text)
        except TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {reason_of(error)}"
            raise unusable(source.file, "a chat template", reason) from error
        except Exception as error:  # Python's compiler has limits that Jinja does not know
            raise unusable(source.file, "a chat template", reason_of(error)) from error
        return self._compiled[source]

    def _none_found(self) -> Source:
        if not self._sources:
            raise UsageError(
                f"{self._folder}: expected a chat template, found none",
                "encode the text with TextCodec.encode, "
                "or put a chat_template.jinja beside tokenizer.json",
            )
        raise UsageError(
            f"{self._folder}: expected a chat template called {_DEFAULT}, "
            f"found only {', '.join(sorted(self._sources))}",
            "put the one to use into chat_template.jinja beside tokenizer.json",
        )


def _from_files(folder: Path) -> dict[str, Source]:
    file = folder / "chat_template.jinja"
    files = {_DEFAULT: file} if file.is_file() else {}
    files |= {
        one.name.removesuffix(".jinja"): one for one in (folder / TEMPLATE_FOLDER).glob("*.jinja")
    }
    return {name: Source(read_source(one, "a chat template"), one) for name, one in files.items()}


def _from_config(folder: Path, config: dict[str, Any]) -> dict[str, Source]:
    file, value = folder / "tokenizer_config.json", config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        value = {_DEFAULT: value}
    try:
        named = value if isinstance(value, dict) else {t["name"]: t["template"] for t in value}
    except (KeyError, TypeError) as error:
        raise _no_templates(file) from error
    if not all(isinstance(text, str) for one in named.items() for text in one):
        raise _no_templates(file)
    return {name: Source(text, file) for name, text in named.items()}


def _no_templates(file: Path) -> BundleError:
    return BundleError(
        f"{file}: expected chat_template to be a text, or a list of names and templates", COPY_AGAIN
    )


def _render(template: Template, variables: dict[str, Any]) -> str:
    pieces: list[str] = []
    count = 0
    for piece in template.generate(variables):
        pieces.append(piece)
        count += len(piece)
        if count > MAX_CHARACTERS:  # loops within loops would fill the memory
            raise OverflowError(f"more than {MAX_CHARACTERS} characters")
    return "".join(pieces)


def _wording(source: Source, reason: str) -> tuple[str, str]:
    return (
        f"{source.file}: expected a conversation that the chat template accepts, found: {reason}",
        "check the roles, their order and the content of the messages",
    )

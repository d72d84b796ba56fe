"""Reads prompts from files and turns them into token ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from trimode.errors import UsageError
from trimode.formats.contract import ModelInfo
from trimode.formats.texts import Unreadable, is_whole_text, lines_of, parse_json, read_text
from trimode.runtime.text.codec import TextCodec

logger = logging.getLogger("trimode.runtime")
Codec = Callable[[], TextCodec]
"""Gives the tokenizer, when one is needed; :class:`UsageError` where there is none."""
_LINE_HINT = 'write {"prompt": "..."}, {"messages": [...]} or {"token_ids": [1, 2]}'
_MESSAGES_HINT = 'write {"messages": [{"role": "user", "content": "..."}]}'
_BASE_HINT = (
    'a base model takes plain text: write {"prompt": "..."}, '
    "and leave out `system` and `enable_thinking`"
)
_OWN_KEYS = ("self", "messages", "tools", "documents", "add_generation_prompt")
"""What ``chat_template_kwargs`` may not hold: it has a key of its own, or follows from what is
asked.
"""
_MOST_NAMED = 5
"""Bad lines that a message describes; of the rest it has the numbers."""
_MOST_NUMBERS = 20

Text = list[int]


@dataclass(frozen=True)
class Prompt:
    """Holds one text, conversation or list of token ids to answer.

    Attributes:
        answers: All right answers, where these are known.
        is_raw: Whether the text is taken as it is, without the chat template.
        template: Other values for the chat template, by the names of :meth:`TextCodec.encode_chat`.
        line: Line of the file that it came from, counted from 1; None = from no file.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    answers: tuple[str, ...] = ()
    is_raw: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = None


@dataclass(frozen=True)
class PromptStyle:
    """Says how texts and conversations reach the model.

    Token ids always are as they are.

    Attributes:
        is_raw: Whether texts are taken as they are, without the chat template.
        system: System message that begins a conversation.
        enable_thinking: Value for the chat template; a line's own value wins. None = it is not
            given to it.
    """

    is_raw: bool = False
    system: str | None = None
    enable_thinking: bool | None = None

    @property
    def chosen(self) -> list[str]:
        """Name the parameters that were chosen."""
        is_chosen = {
            "is_raw": self.is_raw,
            "system": self.system is not None,
            "enable_thinking": self.enable_thinking is not None,
        }
        return [f"`{name}`" for name, given in is_chosen.items() if given]

    def check(self) -> None:
        """Check that the choices agree, and that the text is one.

        Raises:
            UsageError: they contradict each other, or the text is none.
        """
        others = self.chosen[1:] if self.is_raw else []
        if others:
            found = f"expected `is_raw` without {others[0]}, found both"
            raise UsageError(
                found,
                f"leave out one of them: {others[0]} is for the chat template, "
                "which `is_raw` goes without",
            )
        if self.system is not None:
            check_text(self.system, "`system`")


USUAL_STYLE = PromptStyle()
"""The chat template's own ways."""


class BadLine(NamedTuple):
    """Holds a line of a file that cannot be answered, and why."""

    line: int
    error: UsageError


def check_text(text: str, name: str) -> None:
    """Check a text of the command line.

    Raises:
        UsageError: it is empty or not UTF-8.
    """
    if not text:
        raise UsageError(
            f"expected a text with {name}, found an empty one",
            f"leave {name} out, or pass some text",
        )
    if not is_whole_text(text):
        raise UsageError(
            f"expected {name} to be UTF-8, found other bytes", "pass the text in UTF-8"
        )


def read_prompt_lines(path: Path, style: PromptStyle = USUAL_STYLE) -> list[Prompt | BadLine]:
    """Read a file of prompts, line by line; blank lines are skipped.

    Raises:
        UsageError: the file cannot be read or has no prompts.
    """
    try:
        text = read_text(path)
    except Unreadable as error:
        raise UsageError(
            f"{path}: expected a readable UTF-8 file, found: {error.reason}",
            "check the path and the permissions",
        ) from error
    found = [_read_line(number, line, style) for number, line in lines_of(text)]
    if not found:
        raise UsageError(
            f"{path}: expected at least one prompt, found none",
            'write one JSON object a line: {"prompt": "..."}',
        )
    return found


def read_prompts_file(path: Path, style: PromptStyle = USUAL_STYLE) -> list[Prompt]:
    """Read a file of prompts of which every one is needed.

    Raises:
        UsageError: the file cannot be read or has no prompts; or lines are bad, which are all
            named.
    """
    found = read_prompt_lines(path, style)
    refuse_bad_lines(path, (one for one in found if isinstance(one, BadLine)))
    return [one for one in found if isinstance(one, Prompt)]


def encode_prompts(
    path: Path, prompts: Sequence[Prompt], codec: Codec, model: ModelInfo
) -> list[list[int]]:
    """Encode the prompts of a file, all of which are needed.

    Raises:
        UsageError: the model does not take some, whose lines are all named.
    """
    encoded: list[list[int]] = []
    bad: list[BadLine] = []
    for number, prompt in enumerate(prompts, 1):
        try:
            encoded.append(encode_checked(prompt, codec, model))
        except UsageError as error:
            named = UsageError(f"prompt {number}: {error.message}", error.hint)
            bad.append(BadLine(prompt.line or number, named))
    refuse_bad_lines(path, bad)
    warn_of_plain_text(prompts, codec)
    return encoded


def encode_checked(prompt: Prompt, codec: Codec, model: ModelInfo) -> list[int]:
    """Encode a prompt, and check that the model takes it.

    Raises:
        UsageError: it has no token, or the model does not take it.
    """
    token_ids = encode_prompt(prompt, codec)
    check_token_ids(token_ids, model)
    return token_ids


def encode_prompt(prompt: Prompt, codec: Codec) -> list[int]:
    """Encode a prompt.

    A text goes through the chat template, unless there is none or it is to be taken as it is.

    Raises:
        UsageError: there is no tokenizer, no chat template for a conversation, or the template
            refuses it.
    """
    if prompt.token_ids is not None:
        return prompt.token_ids
    tokenizer = codec()
    if tokenizer.has_chat_template and not prompt.is_raw:
        messages = prompt.messages or [{"role": "user", "content": prompt.text or ""}]
        return tokenizer.encode_chat(messages, **prompt.template)
    if prompt.text is None:
        raise UsageError("expected a chat template for a conversation, found none", _BASE_HINT)
    asked = [name for name, value in prompt.template.items() if value not in (None, False)]
    if asked:
        raise UsageError(f"expected a chat template for {asked[0]}, found none", _BASE_HINT)
    return tokenizer.encode(prompt.text)


def check_token_ids(token_ids: Sequence[int], model: ModelInfo) -> None:
    """Check that the model takes a prompt.

    Raises:
        UsageError: it is empty, leaves no room for an answer, or has ids that the model does not
            have.
    """
    if not 1 <= len(token_ids) < model.max_length:
        hint = "an answer has to fit behind it; leave out prompts that are longer"
        raise UsageError(
            f"expected from 1 to {model.max_length - 1} tokens, found {len(token_ids)}", hint
        )
    for token in token_ids:
        if isinstance(token, bool) or not 0 <= token < model.vocab_size:
            found = f"expected token ids from 0 to {model.vocab_size - 1}, found {_shown(token)}"
            raise UsageError(found, "check that the ids come from this model's tokenizer")


def warn_of_plain_text(prompts: Iterable[Prompt], codec: Codec) -> None:
    """Warn once that texts are read without a chat template.

    Only a folder without a template gives reason to.
    """
    if (
        any(prompt.text is not None and not prompt.is_raw for prompt in prompts)
        and not codec().has_chat_template
    ):
        logger.warning("there is no chat template, as in a base model: texts are taken as they are")


def refuse_bad_lines(path: Path, bad: Iterable[BadLine]) -> None:
    """Raise :class:`UsageError` where there are bad lines, naming them all."""
    bad = list(bad)
    if not bad:
        return
    described = "; ".join(f"line {line}: {error.message}" for line, error in bad[:_MOST_NAMED])
    rest = [str(line) for line, _ in bad[_MOST_NAMED:]]
    if rest:
        numbers = ", ".join(rest[:_MOST_NUMBERS]) + (", ..." if len(rest) > _MOST_NUMBERS else "")
        described += f"; and {len(rest)} more bad lines: {numbers}"
    raise UsageError(f"{path}, {described}", bad[0].error.hint)


def parse_prompt_line(line: str) -> Prompt:
    """Read one line of a file.

    Raises:
        UsageError: it is not of the form.
    """
    try:
        value = parse_json(line)
    except Unreadable as error:
        raise UsageError(
            f"expected a JSON object, found {_shown(line)} ({error.reason})", _LINE_HINT
        ) from error
    values = (
        {key: one for key, one in value.items() if one is not None}
        if isinstance(value, dict)
        else {}
    )
    text, ids, messages = (values.get(key) for key in ("prompt", "token_ids", "messages"))
    is_text = isinstance(text, str) and bool(text)
    is_ids = isinstance(ids, list) and all(isinstance(one, int) for one in ids)
    if (
        is_text + is_ids + isinstance(messages, list) != 1
        or sum(key in values for key in ("prompt", "token_ids", "messages")) != 1
    ):
        found = (
            "expected either `prompt` (a text), "
            f"`messages` (a list) or `token_ids` (a list of whole numbers), found {_shown(line)}"
        )
        raise UsageError(found, _LINE_HINT)
    if isinstance(messages, list):
        _check_messages(messages)
    template = _template_of(values)
    if is_ids and template:
        raise UsageError(
            f"expected `token_ids` without `{next(iter(template))}`, found both",
            "token ids go through no template: leave it out",
        )
    answers = _answers_of(values)
    if not is_whole_text(json.dumps([text, messages, template, answers], ensure_ascii=False)):
        raise UsageError(
            "expected whole characters, found half a surrogate pair (\\ud800 to \\udfff)",
            "write both halves, or leave it out",
        )
    return Prompt(text, ids, messages, answers, template=template)


def apply_style(prompt: Prompt, style: PromptStyle) -> Prompt:
    """Return the prompt as the command line wants it.

    Raises:
        UsageError: the prompt says otherwise itself.
    """
    if prompt.token_ids is not None:
        return prompt
    if style.is_raw:
        return _taken_raw(prompt)
    thinking = {} if style.enable_thinking is None else {"enable_thinking": style.enable_thinking}
    prompt = replace(prompt, template={**thinking, **prompt.template})
    if style.system is None:
        return prompt
    messages = prompt.messages or [{"role": "user", "content": prompt.text}]
    if messages[0]["role"] in ("system", "developer"):
        found = (
            f"expected `system` or a conversation that has a {messages[0]['role']} "
            "message, found both"
        )
        raise UsageError(found, "leave out `system`, or the message")
    return replace(
        prompt, text=None, messages=[{"role": "system", "content": style.system}, *messages]
    )


def _read_line(number: int, line: str, style: PromptStyle) -> Prompt | BadLine:
    try:
        return apply_style(replace(parse_prompt_line(line), line=number), style)
    except UsageError as error:
        return BadLine(number, error)
    except RecursionError:
        return BadLine(
            number,
            UsageError("expected a JSON object, found one that is nested too deep", _LINE_HINT),
        )


def _taken_raw(prompt: Prompt) -> Prompt:
    found = "messages" if prompt.messages is not None else next(iter(prompt.template), None)
    if found is not None:
        raise UsageError(
            f"expected a `prompt` alone with `is_raw`, found `{found}`",
            f"leave out `is_raw`, or `{found}`, which is for the chat template",
        )
    return replace(prompt, is_raw=True)


def _check_messages(messages: list[Any]) -> None:
    if not messages:
        raise UsageError("expected at least one message in `messages`, found none", _MESSAGES_HINT)
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not role:
            raise UsageError(
                f"message {number}: expected an object with `role` and `content`, "
                f"found {_shown(message)}",
                _MESSAGES_HINT,
            )
        content = message.get("content")
        if not (
            isinstance(content, str)
            or _is_text_parts(content)
            or (content is None and message.get("tool_calls"))
        ):
            raise UsageError(
                f"message {number}: expected `content` to be a text, found {_shown(content)}",
                _MESSAGES_HINT,
            )


def _is_text_parts(content: Any) -> bool:
    parts = content if isinstance(content, list) else []
    return bool(parts) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in parts
    )


def _template_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Take from a line what the chat template gets besides messages."""
    template: dict[str, Any] = {}
    for key, kind, words in (
        ("enable_thinking", bool, "true or false"),
        ("tools", list, "a list"),
        ("documents", list, "a list"),
    ):
        if key in values:
            if not isinstance(values[key], kind):
                raise UsageError(
                    f"expected `{key}` to be {words}, found {_shown(values[key])}",
                    f"correct it, or leave `{key}` out",
                )
            template[key] = values[key]
    more = values.get("chat_template_kwargs", {})
    if not isinstance(more, dict):
        raise UsageError(
            f"expected `chat_template_kwargs` to be an object, found {_shown(more)}",
            'write {"enable_thinking": true}, for example',
        )
    for key, value in more.items():
        if key in _OWN_KEYS:
            raise UsageError(
                f"expected `chat_template_kwargs` without `{key}`, found it",
                "what it says is said elsewhere: leave it out",
            )
        if template.setdefault(key, value) != value:
            raise UsageError(
                f'expected "{key}" once, or twice the same, found `chat_template_kwargs` to differ',
                "leave out one of the two",
            )
    if not isinstance(template.get("enable_thinking"), bool | None):
        raise UsageError(
            'expected "enable_thinking" to be true or false, '
            f"found {_shown(template['enable_thinking'])}",
            "correct it, or leave it out",
        )
    return template


def _answers_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    answer = values.get("answer")
    answers = [] if answer is None else answer if isinstance(answer, list) else [answer]
    if answer == [] or not all(isinstance(one, str) for one in answers):
        raise UsageError(
            f"expected `answer` to be a text or a list of texts, found {_shown(answer)}",
            "leave it out where it is not known",
        )
    return tuple(answers)


def _shown(value: Any) -> str:
    """Show a value in a message, a long one in part."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

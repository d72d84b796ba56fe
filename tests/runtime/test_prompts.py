"""Prompts of files and of the command line: what is taken, what is refused, and how it is said."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from trimode.errors import UsageError
from trimode.formats.contract import ModelInfo
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.prompts import (
    USUAL_STYLE,
    BadLine,
    Prompt,
    PromptStyle,
    apply_style,
    check_token_ids,
    encode_prompt,
    encode_prompts,
    parse_prompt_line,
    read_prompt_lines,
    read_prompts_file,
)

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"
USER = {"role": "user", "content": "Add 1 and 2."}


@pytest.fixture(scope="module")
def chat() -> TextCodec:
    return TextCodec(DEMO)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """The tokenizer of a base model: no template."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copy(DEMO / "tokenizer.json", folder)
    return TextCodec(folder)


def info(**changes: Any) -> ModelInfo:
    values = {name: field.default for name, field in ModelInfo.model_fields.items()}
    return ModelInfo.model_construct(**{**values, "vocab_size": 100, "max_length": 10, **changes})


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\x85", "\\u000b", "\\f", "\\u001c", "\\r"]
)
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(f'\ufeff{{"prompt": "a{separator}b"}}\r\n\r\n{{"token_ids": [1]}}'.encode())
    first, second = read_prompts_file(file)
    assert first.text == "a" + json.loads(f'"{separator}"') + "b"
    assert (first.line, second.line, second.token_ids) == (1, 3, [1])


BAD_LINES = [
    "hello",
    "{",
    "[1]",
    "null",
    "3",
    '"text"',
    "{}",
    '{"prompt": ""}',
    '{"prompt": 5}',
    '{"prompt": ["a"]}',
    '{"text": "a"}',
    '{"prompt": "a", "token_ids": [1]}',
    '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}',
    '{"prompt": "a", "token_ids": "x"}',
    '{"token_ids": ["a"]}',
    '{"token_ids": [1.0]}',
    '{"token_ids": [NaN]}',
    '{"token_ids": [Infinity]}',
    '{"token_ids": "1,2"}',
    '{"token_ids": [[1]]}',
    '{"token_ids": [' + "9" * 5000 + "]}",
    "[" * 100000,
    '{"a":' * 100000,
    '{"prompt": "half \\ud83d"}',
    '{"prompt": "half \\udc00"}',
    '{"prompt": "a", "answer": "\\ud83d"}',
    '{"prompt": "a", "answer": 5}',
    '{"prompt": "a", "answer": []}',
    '{"prompt": "a", "answer": ["a", null]}',
    '{"messages": []}',
    '{"messages": {}}',
    '{"messages": ["a"]}',
    '{"messages": [{}]}',
    '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": "", "content": "a"}]}',
    '{"messages": [{"role": 1, "content": "a"}]}',
    '{"messages": [{"role": "user", "content": 1}]}',
    '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    '{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}',
    '{"prompt": "a", "enable_thinking": 1}',
    '{"prompt": "a", "enable_thinking": "yes"}',
    '{"prompt": "a", "tools": {}}',
    '{"prompt": "a", "chat_template_kwargs": []}',
    '{"prompt": "a", "chat_template_kwargs": {"messages": []}}',
    '{"prompt": "a", "chat_template_kwargs": {"self": 1}}',
    '{"prompt": "a", "chat_template_kwargs": {"enable_thinking": 1}}',
    '{"token_ids": [1], "enable_thinking": true}',
    '{"prompt": "a", "enable_thinking": true, "chat_template_kwargs": {"enable_thinking": false}}',
    '{"prompt": "a"} {"prompt": "b"}',
]


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:30])
def test_bad_lines_are_refused_in_one_line(line: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_prompt_line(line)
    assert len(raised.value.message) < 400
    assert "\n" not in raised.value.message
    assert raised.value.hint


def test_a_line_that_is_just_not_too_deep_for_the_parser(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    for depth in range(850, 1000, 10):
        file.write_text('{"token_ids": [1]}\n{"prompt": ' + "[" * depth + "]" * depth + "}\n")
        good, bad = read_prompt_lines(file)
        assert isinstance(good, Prompt)
        assert isinstance(bad, BadLine)


def test_good_lines_and_keys_of_data_sets() -> None:
    prompt = parse_prompt_line(
        '{"prompt": "a", "token_ids": null, "id": 7, "source": "\\ud83d", "answer": ["b", "c"]}'
    )
    assert (prompt.text, prompt.token_ids, prompt.answers) == ("a", None, ("b", "c"))
    tools = [{"type": "function", "function": {"name": "f"}}]
    prompt = parse_prompt_line(
        json.dumps(
            {
                "messages": [USER],
                "tools": tools,
                "chat_template_kwargs": {"enable_thinking": True, "x": 1},
            }
        )
    )
    assert prompt.messages == [USER]
    assert prompt.template == {"tools": tools, "enable_thinking": True, "x": 1}


def test_every_bad_line_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\nx\n\n{"prompt": "b"}\n' + "y\n" * 30)
    found = read_prompt_lines(file)
    assert [one.line for one in found] == [1, 2, 4, *range(5, 35)]
    assert [isinstance(one, BadLine) for one in found] == [False, True, False, *[True] * 30]
    with pytest.raises(
        UsageError,
        match=r"p\.jsonl, line 2: .*line 5: .*line 8: .*and 26 more bad lines: 9, 10, .*28, \.\.\.",
    ):
        read_prompts_file(file)


def test_what_the_model_refuses_is_named_by_its_line(tmp_path: Path, base: TextCodec) -> None:
    file = tmp_path / "p.jsonl"
    lines = [[1], [1, 100], [], [True], [-1], [1] * 10, [10**30], [2]]
    file.write_text("\n\n".join(json.dumps({"token_ids": ids}) for ids in lines))
    with pytest.raises(UsageError) as raised:
        encode_prompts(file, read_prompts_file(file), lambda: base, info())
    for text in (
        "line 3: prompt 2: expected token ids from 0 to 99, found 100",
        "line 5",
        "line 7",
        "found True",
        "found -1",
        "and 1 more bad lines: 13",
    ):
        assert text in raised.value.message
    for ids in lines[1:-1]:
        with pytest.raises(UsageError):
            check_token_ids(ids, info())
    check_token_ids([0, 99], info())


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe4"}')
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "blank").write_bytes(b"\xef\xbb\xbf\n \r\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name in ("latin", "empty", "blank", "binary", "nothing", "empty/in/a/file", "n" * 300, "."):
        with pytest.raises(UsageError, match="expected") as raised:
            read_prompt_lines(tmp_path / name)
        assert str(tmp_path) in raised.value.message


def test_texts_go_through_the_template_or_not(chat: TextCodec, base: TextCodec) -> None:
    text = "Add 1 and 2."
    plain = base.encode(text)
    wrapped = chat.encode_chat([{"role": "user", "content": text}])
    assert plain != wrapped
    prompt = Prompt(text=text)
    assert encode_prompt(prompt, lambda: chat) == wrapped
    assert encode_prompt(prompt, lambda: base) == plain
    raw = apply_style(prompt, PromptStyle(is_raw=True))
    assert encode_prompt(raw, lambda: chat) == encode_prompt(raw, lambda: base) == plain
    assert (
        encode_prompt(Prompt(messages=[{"role": "user", "content": text}]), lambda: chat) == wrapped
    )
    assert encode_prompt(Prompt(token_ids=[1, 2]), no_codec) == [1, 2]


def no_codec() -> TextCodec:
    raise AssertionError("token ids need no tokenizer")


def test_a_base_model_takes_no_conversation(base: TextCodec) -> None:
    for prompt in (
        Prompt(messages=[USER]),
        apply_style(Prompt(text="a"), PromptStyle(system="Be brief.")),
        apply_style(Prompt(text="a"), PromptStyle(enable_thinking=True)),
        Prompt(text="a", template={"tools": [{}]}),
    ):
        with pytest.raises(UsageError, match="expected a chat template") as raised:
            encode_prompt(prompt, lambda: base)
        assert "plain text" in raised.value.hint
    assert encode_prompt(
        apply_style(Prompt(text="a"), PromptStyle(enable_thinking=False)), lambda: base
    ) == base.encode("a")


def test_it_is_said_once_that_texts_are_plain(
    tmp_path: Path, base: TextCodec, chat: TextCodec, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n' * 3)
    model = info(vocab_size=10**6, max_length=100)
    encode_prompts(file, read_prompts_file(file), lambda: chat, model)
    encode_prompts(file, read_prompts_file(file, PromptStyle(is_raw=True)), lambda: base, model)
    assert caplog.records == []
    with caplog.at_level(logging.WARNING, "trimode.runtime"):
        encode_prompts(file, read_prompts_file(file), lambda: base, model)
    assert [record.getMessage() for record in caplog.records] == [
        "there is no chat template, as in a base model: texts are taken as they are"
    ]


def test_styles() -> None:
    system = PromptStyle(system="Be brief.", enable_thinking=True)
    message = {"role": "system", "content": "Be brief."}
    found = apply_style(Prompt(text="Add 1 and 2.", answers=("3",)), system)
    assert (found.text, found.messages, found.answers, found.template) == (
        None,
        [message, USER],
        ("3",),
        {"enable_thinking": True},
    )
    assert apply_style(Prompt(messages=[USER]), system).messages == [message, USER]
    own = parse_prompt_line('{"prompt": "a", "enable_thinking": false}')
    assert apply_style(own, system).template == {"enable_thinking": False}
    assert apply_style(Prompt(token_ids=[1]), system) == Prompt(token_ids=[1])
    assert apply_style(own, USUAL_STYLE) == own


@pytest.mark.parametrize(
    ("prompt", "style"),
    [
        (Prompt(messages=[USER]), PromptStyle(is_raw=True)),
        (Prompt(text="a", template={"enable_thinking": True}), PromptStyle(is_raw=True)),
        (Prompt(messages=[{"role": "system", "content": "x"}, USER]), PromptStyle(system="y")),
    ],
)
def test_contradictions(prompt: Prompt, style: PromptStyle) -> None:
    with pytest.raises(UsageError, match="expected") as raised:
        apply_style(prompt, style)
    assert "leave out" in raised.value.hint


@pytest.mark.parametrize(
    "style",
    [
        PromptStyle(is_raw=True, system="a"),
        PromptStyle(is_raw=True, enable_thinking=False),
        PromptStyle(system=""),
        PromptStyle(system="\udcff"),
    ],
)
def test_styles_that_cannot_be(style: PromptStyle) -> None:
    with pytest.raises(UsageError):
        style.check()

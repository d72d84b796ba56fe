from __future__ import annotations

import json
import time
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Fuse, Sequence, Strip
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from trimode.errors import BundleError, TrimodeError, UsageError
from trimode.runtime.text import chat_template
from trimode.runtime.text.check import check_text
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.stream import TextStream

TEMPLATE = """{% for m in messages %}
<|{{ m.role }}|>{{ m.content }}{% if m.role == 'bad' %}\
{{ raise_exception('no such role') }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>{% endif %}{% endif %}"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer, so that one character can be several tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)} | {"<s>": 256}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_chat_and_plain_text(folder: Path) -> None:
    codec = TextCodec(folder)
    assert codec.render_chat([{"role": "user", "content": "hi"}]) == "<|user|>hi<|assistant|>"
    assert codec.render_chat([{"role": "user", "content": "hi"}], enable_thinking=True).endswith(
        "<think>"
    )
    assert (
        codec.decode(codec.encode_chat([{"role": "user", "content": "hé"}]))
        == "<|user|>hé<|assistant|>"
    )
    assert codec.decode([256, *codec.encode("plain")]) == "plain"


def test_stream_holds_back_incomplete_characters(folder: Path) -> None:
    codec, text = TextCodec(folder), "aé漢🙂z"
    stream = TextStream(codec)
    pieces = [stream.push([token]) for token in codec.encode(text)]
    assert "".join([*pieces, stream.finish()]) == text
    assert not any("\ufffd" in piece for piece in pieces)
    cut = TextStream(codec)
    cut.push(codec.encode("é")[:1])
    assert cut.finish() == "\ufffd"


def test_template_in_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "chat_template": "{{ bos_token }}{{ messages[0].content }}",
                "bos_token": {"content": "<s>"},
            }
        )
    )
    assert TextCodec(folder).encode_chat([{"role": "user", "content": "a"}])[0] == 256


def test_what_goes_wrong(folder: Path) -> None:
    codec = TextCodec(folder)
    with pytest.raises(UsageError, match="no such role"):
        codec.render_chat([{"role": "bad", "content": ""}])
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="chat template"):
        TextCodec(folder).encode_chat([{"role": "user", "content": "a"}])
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="tokenizer"):
        TextCodec(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"expected tokenizer\.json"):
        TextCodec(folder)


def test_templates_run_in_a_sandbox(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UsageError):
        TextCodec(folder).render_chat([{"role": "user", "content": "a"}])


USER = [{"role": "user", "content": "a"}]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 17078037\n"
DEEP = "[" * 100_000
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [b"{", b"\xe9", LFS.encode(), DEEP.encode(), b"[]", b'"a"', b"9" * 5000, b""],
    ids=range(8),
)
def test_a_file_that_cannot_be_read_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=name) as raised:
        TextCodec(folder)
    assert "checkpoint" in raised.value.hint
    assert "\n" not in raised.value.message
    with pytest.raises(BundleError, match=name):
        check_text(folder, 1000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {}),
        ("tokenizer_config.json", {"bos_token": 3}),
        ("tokenizer_config.json", {"bos_token": {"lstrip": True, "content": 3}}),
        ("tokenizer_config.json", {"extra_special_tokens": "<x>"}),
        ("tokenizer_config.json", {"extra_special_tokens": [3]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": 3}}),
        ("tokenizer_config.json", {"added_tokens_decoder": []}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": 3}}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"1": {"content": "a", "lstrip": "no"}}},
        ),
        ("added_tokens.json", {"<x>": "1"}),
        ("added_tokens.json", {"<x>": -1}),
    ],
)
def test_tokens_of_another_form_are_refused(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="expected"):
        TextCodec(folder)


@pytest.mark.parametrize(
    "value", [3, ["a"], [{"name": "default"}], {"default": 3}, [{"name": 1, "template": "a"}]]
)
def test_templates_of_another_form_are_refused(folder: Path, value: Any) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(BundleError, match="chat_template"):
        TextCodec(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_byte_order_mark_is_refused(folder: Path, name: str) -> None:
    """As by transformers, to which it is no JSON, or a character of the template."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    with pytest.raises(BundleError, match=f"{name}.*byte order mark"):
        TextCodec(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{",
        "{% generation %}",
        "{% for %}",
        "{{ '" + "(" * 3 + " }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "".join("{% if a %}" for _ in range(150)) + "{% endif %}" * 150,
        "{% include 'a' %}{% unknown %}",
        "{{ a | nofilter }}",
    ],
    ids=range(9),
)
def test_a_template_that_does_not_compile_is_named(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    codec = TextCodec(folder)
    assert codec.encode("a")
    for run in (lambda: codec.render_chat(USER), lambda: check_text(folder, 1000)):
        with pytest.raises(BundleError, match=r"chat_template\.jinja") as raised:
            run()
        assert "published checkpoint" in raised.value.hint


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ messages[0].content + 3 }}", "TypeError"),
        ("{{ messages[0].nothing.at_all }}", "nothing"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ [1].sort(key=messages) }}", ""),
        ("{% set ns = namespace(__x=1) %}", "__x"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "_x"),
        ("{{ undefined_function() }}", "undefined"),
        ("{% include 'a' %}", ""),
        ("{{ messages | tojson(indent=messages) }}", "TypeError"),
        ("{{ dict(3) }}", "Error"),
        ("{{ '%d' % 'a' }}", "TypeError"),
        ("{{ [] | first | tojson }}", "TypeError"),
        ("{{ messages | map(attribute='content') | sum }}", "TypeError"),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}12345678{% endfor %}"
            "{% endfor %}",
            "OverflowError",
        ),
    ],
)
def test_a_template_that_fails_is_one_clean_error(
    folder: Path, template: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 100_000)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match=r"chat_template\.jinja.*" + found) as raised:
        TextCodec(folder).render_chat(USER)
    assert raised.value.hint
    with pytest.raises(TrimodeError):
        check_text(folder, 1000)


def test_templates_without_a_default_are_listed(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": name, "template": name} for name in ("tool_use", "rag")]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    codec = TextCodec(folder)
    assert codec.has_chat_template
    with pytest.raises(UsageError, match=r"default.*rag, tool_use"):
        codec.render_chat(USER)
    assert codec.render_chat(USER, tools=[]) == "tool_use"
    assert codec.render_chat(USER, chat_template="rag") == "rag"
    assert codec.render_chat(USER, chat_template="{{ messages[0].role }}") == "user"


@pytest.mark.parametrize(
    "messages",
    [[], None, 3, "a", [3], ["a"], [None], [["a"]], [{"role": "user", "content": "\ud83d"}]],
    ids=range(9),
)
def test_what_is_no_conversation_is_refused(folder: Path, messages: Any) -> None:
    with pytest.raises(UsageError) as raised:
        TextCodec(folder).encode_chat(messages)
    assert raised.value.hint


def test_half_a_surrogate_pair_is_named(folder: Path) -> None:
    codec = TextCodec(folder)
    with pytest.raises(UsageError, match=r"'\\ud83d' at character 2"):
        codec.encode("ab\ud83d")
    with pytest.raises(UsageError, match=r"'\\udc00'"):
        codec.encode_chat([{"role": "user", "content": "\udc00"}])


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [print]},
        {"documents": ["a"]},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": "reasoning"},
        {"continue_final_message": "no_such_field"},
    ],
)
def test_options_that_cannot_be_used(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as raised:
        TextCodec(folder).render_chat(USER, **options)
    assert raised.value.hint


def test_a_template_sees_plain_values_only(folder: Path) -> None:
    class Role(StrEnum):
        USER = "user"

    (folder / "chat_template.jinja").write_text("{{ messages | tojson }}{{ more | tojson }}")
    codec = TextCodec(folder)
    text = codec.render_chat(
        [{"role": Role.USER, "content": ("a", np.int64(3), folder)}], more={"x": np.float64(0.5)}
    )
    assert text == '[{"role": "user", "content": ["a", 3, "<PosixPath>"]}]{"x": 0.5}'


def test_the_time_is_local(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d %H:%M') }}")
    codec, shown = TextCodec(folder), []
    try:
        for zone in ("UTC", "Asia/Tokyo"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            shown.append(datetime.fromisoformat(codec.render_chat(USER)))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert timedelta(hours=8, minutes=59) <= shown[1] - shown[0] <= timedelta(hours=9, minutes=1)


def test_a_tokenizer_that_gives_a_text_up_is_named(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0, " ": 1}, unk_token="none"))
    tokenizer.decoder = Sequence([Fuse(), Strip(" ", 0, 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    codec = TextCodec(folder)
    assert codec.encode("a") == [0]
    for run in (lambda: codec.encode("b"), lambda: codec.decode([]), lambda: check_text(folder, 9)):
        with pytest.raises(BundleError, match=r"tokenizer\.json"):
            run()


def test_a_build_is_checked(folder: Path) -> None:
    check_text(folder / "nothing", 0)
    check_text(folder, 257)
    with pytest.raises(BundleError, match="below 200"):
        check_text(folder, 200)
    (folder / "chat_template.jinja").write_text(
        "{{ raise_exception('only with a system message') }}"
    )
    check_text(folder, 257)
    (folder / "chat_template.jinja").write_text("<s>")
    with pytest.raises(BundleError, match="found 256"):
        check_text(folder, 256)
    (folder / "chat_template.jinja").unlink()
    check_text(folder, 256)
    assert not TextCodec(folder).has_chat_template

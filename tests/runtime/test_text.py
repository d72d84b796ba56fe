from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from trimode.errors import BundleError, UsageError
from trimode.runtime.text import TextCodec, TextStream

TEMPLATE = """{% for m in messages %}
<|{{ m.role }}|>{{ m.content }}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}
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
    assert codec.render_chat([{"role": "user", "content": "hi"}], enable_thinking=True).endswith("<think>")
    assert codec.decode(codec.encode_chat([{"role": "user", "content": "hé"}])) == "<|user|>hé<|assistant|>"
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
        json.dumps({"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": {"content": "<s>"}})
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

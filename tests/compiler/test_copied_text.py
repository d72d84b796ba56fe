"""A bundle turns text into the tokens that its checkpoint does."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints import config_of, write_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.runtime.bundle.open import open_bundle
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.files import text_files

TEMPLATES = {"default": "<s>{{ messages[0].content }}", "tool_use": "<s>tools"}


def test_a_bundle_has_every_file_that_makes_text(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config_of(num_hidden_layers=1))
    Tokenizer(WordLevel({"a": 0, "tools": 1}, unk_token="a")).save(
        str(checkpoint / "tokenizer.json")
    )
    (checkpoint / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    (checkpoint / "added_tokens.json").write_text(json.dumps({"</s>": 2, "<s>": 3}))
    (checkpoint / "additional_chat_templates").mkdir()
    for name, template in TEMPLATES.items():
        (checkpoint / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    build_bundle(checkpoint, tmp_path / "bundle", BuildOptions())
    bundle = open_bundle(tmp_path / "bundle")
    assert text_files(bundle.path) == text_files(checkpoint)
    assert set(text_files(checkpoint)) <= bundle.manifest.files.keys()
    for codec in (TextCodec(checkpoint), TextCodec(bundle.path)):
        assert codec.encode_chat([{"role": "user", "content": "a"}]) == [3, 0]
        assert codec.encode_chat([{"role": "user", "content": "a"}], tools=[]) == [3, 1]

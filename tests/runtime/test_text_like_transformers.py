"""Ids, rendered conversations and decoded text are those of transformers, folder by folder.

Each case is a folder: a kind of tokenizer, and what lies beside ``tokenizer.json``.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from trimode.errors import UsageError
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.stream import TextStream

DEMO = Path(__file__).parents[2] / "artifacts/nld-tiny"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? Yes!",
    "user assistant system tool hello world 1 2 3",
] * 3
TEXTS = [
    "",
    "Hello world",
    "  two  blanks, and\na line.\n",
    "é漢字🙂 naïve",
    "<s>a</s> <mask> b<ent>c <x> <pad>",
    "It 's , isn't . it ?",
    "<|user|>\nhi<|im_end|> <tool> <image> xent <new>",
    "THE Quick",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def _train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet),
    ).to_str()


@cache
def _byte_level_with_first_token() -> str:
    tokenizer = Tokenizer.from_str(_byte_level())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer.to_str()


@cache
def _byte_fallback() -> str:
    """As Llama 2 has it."""
    vocab = {
        name: i
        for i, name in enumerate(
            [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdefghilnorstuwxy"]
        )
    }
    merges = [("\u2581", "a"), ("h", "e"), ("l", "l"), ("he", "ll")]
    vocab |= {first + second: len(vocab) + i for i, (first, second) in enumerate(merges)}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(one, normalized=False) for one in SPECIAL])
    return tokenizer.to_str()


@cache
def _unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _train(
        tokenizer, trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>")
    ).to_str()


@cache
def _words() -> str:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _train(tokenizer, trainers.WordLevelTrainer(special_tokens=["<unk>"])).to_str()


@cache
def _word_piece() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _train(
        tokenizer, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>", "<pad>"])
    ).to_str()


KINDS = {
    "byte level": _byte_level,
    "byte level, first and last token": _byte_level_with_first_token,
    "byte fallback": _byte_fallback,
    "unigram": _unigram,
    "words": _words,
    "word piece": _word_piece,
}

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NAMES = (
    "{{ [bos_token, eos_token, unk_token, pad_token, sep_token, cls_token, mask_token, "
    "image_token, tool_token] | join('|') }}"
)
DEFINED = (
    "{{ [bos_token is defined, pad_token is defined, tools is none, documents is none, "
    "enable_thinking is defined,"
    " add_generation_prompt, more is defined, tools is defined and tools, messages is mapping] }}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}\n"
    "{% else %}{{- m.content -}}{%- generation -%} x {%- endgeneration -%}{% endif %}{% endfor %}"
)
LOOPS = "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
LOOPS += "{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
JSON = (
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ messages | "
    "tojson(ensure_ascii=True) }}"
    "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}{{ messages[0] | tojson(false, "
    "1) }}{{ '<é>' | tojson }}"
)
HELPERS = (
    "{% set ns = namespace(x=1, y='a') %}{% for m in messages %}{% set ns.x = ns.x + 1 %}"
    "{% endfor %}{{ ns.x }}{{ ns.y }}"
    "{{ dict(a=1) | tojson }}{{ dict.fromkeys('ab', 2) | tojson }}{{ strftime_now('%d %b %Y') "
    "}}{{ range(3) | list }}"
    "{% macro part(m) %}[{{ m.role }}]{% endmacro %}{{ part(messages[0]) }}"
    "{{ messages[0].content | trim | upper }}"
)
BLANKS = (
    "  {% if true %}\n   a {%- if true %}\n b\n{% endif %}{% endif %}\r\n  {#- note -#}\n "
    "{{ messages[0].content }}\n\n"
)
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content or [] %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}<image>{% endif %}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ m.reasoning_content }}"
    "{{ m.thinking }}{{ 'name' in m }}\n{% endfor %}"
)
TOOLS = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for d in documents or [] %}{{ d.title }}{% endfor %}{{ more }}"
)
THINKING = (
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>"
    "{% elif enable_thinking %}<think>{% endif %}" + PLAIN
)
QWEN = (
    "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages[::-1] %}"
    "{%- set i = (messages|length - 1) - loop.index0 %}"
    "{%- if m.role == 'user' %}{%- set ns.last = i %}{%- break %}{%- endif %}{%- endfor %}"
    "{{ ns.last }}{{ messages[ns.last].content }}"
)


def _added(text: str, **flags: bool) -> dict[str, Any]:
    return {
        "__type": "AddedToken",
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    } | flags


def _bare(text: str, **flags: bool) -> dict[str, Any]:
    token = _added(text, **flags)
    del token["__type"]
    return token


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TWO = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}]
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 40},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
DECODER = {
    "3": _bare("<x>", special=True),
    "40": _bare("<ent>", lstrip=True, rstrip=True, special=False),
}
FLAGS = {
    "0": _bare("<unk>", lstrip=True, special=True),
    "60": _bare("ent", single_word=True, special=False),
}


class Case(NamedTuple):
    """A folder: edits of tokenizer.json, tokenizer_config.json, and other files by name."""

    kind: str
    config: dict[str, Any] | None = None
    files: dict[str, Any] = {}  # noqa: RUF012
    tokenizer: dict[str, Any] = {}  # noqa: RUF012


CASES = {f"{kind}, alone": Case(kind) for kind in KINDS}
CASES |= {f"{kind}, named tokens": Case(kind, NAMED | {"chat_template": PLAIN}) for kind in KINDS}
CASES |= {
    f"{kind}, truncation": Case(
        kind, None, {"chat_template.jinja": PLAIN}, {"truncation": TRUNCATION}
    )
    for kind in KINDS
}
CASES |= {
    f"{kind}, padding": Case(kind, NAMED | {"chat_template": NAMES}, {}, {"padding": PADDING})
    for kind in KINDS
}
CASES |= {
    f"{kind}, cleaned up": Case(kind, {"clean_up_tokenization_spaces": True})
    for kind in ("byte level", "unigram", "words", "word piece")
}
_SOME = ("byte level", "byte fallback", "words")
CASES |= {
    f"{kind}, added tokens by id": Case(
        kind, NAMED | {"added_tokens_decoder": DECODER, "chat_template": PLAIN}
    )
    for kind in _SOME
}
CASES |= {
    f"{kind}, other flags": Case(
        kind, NAMED | {"added_tokens_decoder": FLAGS, "chat_template": PLAIN}
    )
    for kind in _SOME
}
CASES |= {
    f"{kind}, {name}": case._replace(kind=kind)
    for kind in _SOME
    for name, case in {
        "first and last token asked for": Case(
            "", NAMED | {"add_bos_token": True, "add_eos_token": True}
        ),
        "tokens as objects": Case(
            "",
            {
                "bos_token": _added("<s>"),
                "mask_token": _added("<mask>", lstrip=True),
                "eos_token": None,
                "chat_template": NAMES,
            },
        ),
        "map of special tokens": Case(
            "",
            {"chat_template": NAMES, "bos_token": "</s>"},
            {
                "special_tokens_map.json": NAMED
                | {"mask_token": _bare("<mask>", lstrip=True), "sep_token": "<x>"}
            },
        ),
        "map beside added tokens": Case(
            "",
            {"chat_template": NAMES, "added_tokens_decoder": DECODER},
            {"special_tokens_map.json": NAMED | {"sep_token": "<new>"}},
        ),
        "map with extra tokens": Case(
            "",
            {"extra_special_tokens": ["<ent>"], "chat_template": NAMES},
            {
                "special_tokens_map.json": NAMED
                | {"extra_special_tokens": ["<new>", _bare("<x>", rstrip=True)]}
            },
        ),
        "older extra tokens": Case(
            "", NAMED | {"additional_special_tokens": ["<ent>", _added("<x>", lstrip=True)]}
        ),
        "older extra tokens in the map": Case(
            "", NAMED, {"special_tokens_map.json": {"additional_special_tokens": ["<ent>", "<x>"]}}
        ),
        "extra tokens": Case(
            "",
            NAMED
            | {"extra_special_tokens": ["<ent>", "<new>"], "additional_special_tokens": ["<x>"]},
        ),
        "extra tokens with names": Case(
            "",
            NAMED
            | {
                "extra_special_tokens": {"image_token": "<image>", "tool_token": "<tool>"},
                "chat_template": NAMES,
            },
        ),
        "tokens of the model's own": Case(
            "",
            NAMED
            | {"image_token": "<image>", "tool_token": _added("<tool>"), "chat_template": NAMES},
        ),
        "added_tokens.json": Case(
            "",
            {"pad_token": "<pad>", "chat_template": PLAIN},
            {"added_tokens.json": {"<ent>": 400, "<pad>": 401, "<|im_end|>": 402}},
        ),
        "special tokens split": Case(
            "", NAMED | {"split_special_tokens": True, "chat_template": PLAIN}
        ),
    }.items()
}
_TEMPLATES = {
    "names": NAMES,
    "defined": DEFINED,
    "generation": MARKED,
    "loops": LOOPS,
    "json": JSON,
    "helpers": HELPERS,
    "blanks": BLANKS,
    "parts": PARTS,
    "tools": TOOLS,
    "thinking": THINKING,
    "qwen": QWEN,
    "empty": "",
}
CASES |= {
    f"template: {name}": Case("byte level", NAMED, {"chat_template.jinja": text})
    for name, text in _TEMPLATES.items()
}
CASES |= {
    "templates: named": Case("byte level", {"chat_template": TWO}),
    "templates: as an object": Case(
        "byte level", {"chat_template": {"default": PLAIN, "tool_use": TOOLS}}
    ),
    "templates: a file before the configuration": Case(
        "byte level", {"chat_template": TWO}, {"chat_template.jinja": NAMES}
    ),
    "templates: files": Case(
        "byte level",
        {"chat_template": JSON},
        {"chat_template.jinja": PLAIN, "additional_chat_templates/tool_use.jinja": TOOLS},
    ),
    "templates: default in the folder": Case(
        "words", None, {"additional_chat_templates/default.jinja": PLAIN}
    ),
    "templates: default in both": Case(
        "words",
        None,
        {"chat_template.jinja": NAMES, "additional_chat_templates/default.jinja": PLAIN},
    ),
    "templates: of a processor": Case(
        "words", {"chat_template": PLAIN}, {"chat_template.json": {"chat_template": TOOLS}}
    ),
    "a special token that is added anew as another": Case(
        "byte level", None, {"added_tokens.json": {"<s>": 401, "<pad>": 31}}
    ),
    "ids given twice": Case(
        "byte fallback",
        {"cls_token": _added("a")},
        {"added_tokens.json": {"<unk>": 31, "a": 2, "Hello": 2}},
    ),
    "a special token that is normalized": Case(
        "byte fallback", {"pad_token": _added("Hello", normalized=True)}
    ),
    "the demo": Case("demo"),
}

CONVERSATIONS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([{"role": "user", "content": " Hello é漢 <s> "}], {}),
    (
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "<think>x</think>a"},
        ],
        {},
    ),
    (
        [
            {"role": "user", "content": "u", "name": None},
            {"role": "assistant", "content": "a ", "reasoning": "because"},
        ],
        {"more": "<x>"},
    ),
    ([{"role": "user", "content": "u"}], {"enable_thinking": True, "add_generation_prompt": False}),
    (
        [{"role": "user", "content": "u"}],
        {
            "enable_thinking": None,
            "tools": [{"type": "function", "function": {"name": "f", "é": 1}}],
        },
    ),
    (
        [{"role": "user", "content": "u"}],
        {"tools": [], "documents": [{"title": "t", "text": "x"}], "bos_token": "<mine>"},
    ),
    (
        [{"role": "user", "content": "u"}, {"role": "assistant", "content": "so far "}],
        {"continue_final_message": True},
    ),
]
RICH: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    (
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "look"}, {"type": "image", "url": "x"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1.5}}}],
                "thinking": "hm",
            },
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ],
        {},
    ),
    (
        [{"role": "assistant", "content": [{"type": "text", "text": "so far"}]}],
        {"continue_final_message": True},
    ),
    (
        [{"role": "assistant", "content": "a", "reasoning_content": "so far"}],
        {"continue_final_message": "reasoning_content"},
    ),
]


@pytest.fixture(scope="module")
def open_theirs() -> Callable[[Path], Any]:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    def open_(folder: Path) -> Any:
        auto = AutoTokenizer.from_pretrained(folder)
        assert type(auto) is PreTrainedTokenizerFast
        return auto

    return open_


def _folder(root: Path, case: Case) -> Path:
    if case.kind == "demo":
        return Path(
            shutil.copytree(DEMO, root / "demo", ignore=shutil.ignore_patterns("*.safetensors"))
        )
    _write(root / "tokenizer.json", json.loads(KINDS[case.kind]()) | case.tokenizer)
    # Without a configuration of the model transformers takes the class from here.
    _write(root / "config.json", {"model_type": "", "tokenizer_class": "PreTrainedTokenizerFast"})
    if case.config is not None:
        _write(
            root / "tokenizer_config.json",
            case.config | {"tokenizer_class": "PreTrainedTokenizerFast"},
        )
    for name, content in case.files.items():
        _write(root / name, content)
    return root


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_text_is_as_in_transformers(
    name: str, tmp_path: Path, open_theirs: Callable[[Path], Any]
) -> None:
    folder = _folder(tmp_path, CASES[name])
    ours, theirs = TextCodec(folder), open_theirs(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
    _same_decoding(ours, theirs)
    assert ours.has_chat_template == (theirs.chat_template is not None)
    if ours.has_chat_template:
        for messages, options in CONVERSATIONS + (RICH if "parts" in name else []):
            _same_chat(ours, theirs, messages, options)


def _same_decoding(ours: TextCodec, theirs: Any) -> None:
    assert ours.special_ids == {
        i for i in theirs.added_tokens_decoder if theirs.decode([i], skip_special_tokens=True) == ""
    }
    draw = random.Random(0)
    drawn = [
        [draw.randrange(len(theirs) + 2) for _ in range(draw.randrange(12))] for _ in range(30)
    ]
    for ids in [theirs.encode(text) for text in TEXTS] + drawn:
        text = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == text, ids
        stream = TextStream(ours)
        assert "".join([*(stream.push([one]) for one in ids), stream.finish()]) == text, ids


def _same_chat(
    ours: TextCodec, theirs: Any, messages: Sequence[Any], options: dict[str, Any]
) -> None:
    same = {
        "add_generation_prompt": "continue_final_message" not in options,
        "enable_thinking": False,
    } | options
    if same["enable_thinking"] is None:
        del same["enable_thinking"]
    try:
        rendered = theirs.apply_chat_template(messages, tokenize=False, **same)
    except ValueError as error:  # of `continue_final_message`, where the template has no use for it
        with pytest.raises(UsageError):
            ours.render_chat(messages, **options)
        assert "continue_final_message" in str(error)  # noqa: PT017
        return
    assert ours.render_chat(messages, **options) == rendered
    ids = theirs.apply_chat_template(messages, return_dict=False, **same)
    assert ours.encode_chat(messages, **options) == ids

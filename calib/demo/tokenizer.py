"""Makes the tokenizer and the chat template of the demo checkpoint.

Each printable character is one token; special tokens have the family's ids.

The words that name a role are single tokens, so a chat's frame costs 15 tokens.
"""

from __future__ import annotations

import string
from functools import cache
from typing import Any

from jinja2 import Environment
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE

VOCAB_SIZE = 120
UNK, BOS, END_OF_SEQUENCE, IM_START, IM_END, MASK = (
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|mask|>",
)
SPECIAL_IDS = {UNK: 0, BOS: 1, END_OF_SEQUENCE: 2, IM_START: 10, IM_END: 11, MASK: 100}
PLAIN_ADDED_IDS = {"<think>": 12, "</think>": 13, "system": 14, "user": 15, "assistant": 16}
CHARACTERS = "\n" + "".join(c for c in string.printable if c.isprintable())

CHAT_TEMPLATE = """\
{%- set enable_thinking = enable_thinking | default(false) -%}
{%- set truncate_history_thinking = truncate_history_thinking | default(true) -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' ~ (messages[0].content if has_system else '') ~ '<|im_end|>\\n' -}}
{%- for message in (messages[1:] if has_system else messages) -%}
{%- if message.role == 'assistant' -%}
{%- set content = message.content -%}
{%- if truncate_history_thinking and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if '</think>' not in content -%}
{%- set content = '<think></think>' ~ content -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' ~ content ~ '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if enable_thinking else '<think></think>') -}}
{%- endif -%}
"""


def build_tokenizer() -> Tokenizer:
    """Build a tokenizer of :data:`VOCAB_SIZE` ids that gives printable ASCII back exactly.

    Other characters become ``<unk>``.
    """
    vocab = {**SPECIAL_IDS, **PLAIN_ADDED_IDS}
    free = [i for i in range(VOCAB_SIZE) if i not in vocab.values() and i >= 20]
    vocab.update(zip(CHARACTERS, free, strict=False))
    reserved = {f"<|reserved_{i}|>": i for i in range(VOCAB_SIZE) if i not in vocab.values()}
    vocab.update(reserved)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token=UNK))
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in (*SPECIAL_IDS, *reserved)]
    )
    tokenizer.add_tokens(
        [AddedToken(name, special=False, normalized=False) for name in PLAIN_ADDED_IDS]
    )
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """Return the contents of ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": IM_END,
        "unk_token": UNK,
        "mask_token": MASK,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }


def render_chat(
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = True,
    enable_thinking: bool = False,
) -> str:
    """Render a chat as the checkpoint's own template does."""
    rendered: str = _template().render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=enable_thinking,
    )
    return rendered


def render_prompt(prompt: str) -> str:
    """Render a single user turn, ready for the answer."""
    return render_chat([{"role": "user", "content": prompt}])


@cache
def _template() -> Any:
    return Environment(autoescape=False).from_string(CHAT_TEMPLATE)  # noqa: S701

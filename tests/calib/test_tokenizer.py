from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Tokenizer

from trimode.calib.demo.save import demo_texts
from trimode.calib.demo.tokenizer import (
    CHARACTERS,
    CHAT_TEMPLATE,
    IM_END,
    MASK,
    PLAIN_ADDED_IDS,
    SPECIAL_IDS,
    VOCAB_SIZE,
    build_tokenizer,
    render_chat,
    render_prompt,
)

TOKENIZER = build_tokenizer()
FRAME = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=CHARACTERS, max_size=60))
def test_printable_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < VOCAB_SIZE for i in ids)


@given(st.text(alphabet=CHARACTERS.replace("<", ""), max_size=30))
def test_special_tokens_stay_whole_and_are_dropped_on_request(text: str) -> None:
    ids = TOKENIZER.encode(IM_END + text + MASK).ids
    assert (ids[0], ids[-1]) == (SPECIAL_IDS[IM_END], SPECIAL_IDS[MASK])
    assert TOKENIZER.decode(ids) == text


def test_ids_are_those_of_the_family() -> None:
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE
    for name, expected in {"<s>": 1, "<|im_end|>": 11, "<|mask|>": 100}.items():
        assert TOKENIZER.token_to_id(name) == expected
    for word, expected in PLAIN_ADDED_IDS.items():
        assert TOKENIZER.encode(word).ids == [expected]
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(VOCAB_SIZE))


def test_other_characters_become_unknown() -> None:
    assert TOKENIZER.encode("aéb").ids[1] == SPECIAL_IDS["<unk>"]


def test_the_saved_tokenizer_is_the_same() -> None:
    saved = Tokenizer.from_str(demo_texts()["tokenizer.json"])
    text = render_prompt('Sort 3 1 2? {"a": [1]}')
    assert saved.encode(text).ids == TOKENIZER.encode(text).ids
    assert saved.decode(saved.encode(text).ids, skip_special_tokens=False) == text


def test_a_question_is_framed_as_in_the_family() -> None:
    assert render_prompt("Hello?") == FRAME.format("Hello?") + "<think></think>"
    assert (
        render_chat([{"role": "user", "content": "Hello?"}], enable_thinking=True)
        == FRAME.format("Hello?") + "<think>\n"
    )
    assert len(TOKENIZER.encode(render_prompt("")).ids) == 15


def test_a_longer_chat() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "<think>hm</think>\nA"},
        {"role": "user", "content": "2?"},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>A<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n"
    )
    assert render_chat(messages, add_generation_prompt=False) == expected


def test_the_template_means_the_same_with_the_usual_block_trimming() -> None:
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    assert template.render(
        messages=[{"role": "user", "content": "a\nb"}], add_generation_prompt=True
    ) == render_prompt("a\nb")

"""Streamed text: certain, whole, and of bounded work, whatever the tokenizer and the tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from trimode.runtime.text.cleanup import CleanUp, clean_up
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.stream import TextStream, first_stop
from trimode.runtime.text.token_window import Decoding

BYTES = {f"<0x{value:02X}>": value for value in range(256)}
WORDS = [
    "a",
    "b",
    "\u2581",
    "\u2581a",
    "\u2581\u2581",
    " ",
    ".",
    " .",
    "##s",
    "x</w>",
    "\ufffd",
    "n't",
    "é",
    "</s>",
    "<pad>",
]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<pad>"])
    tokenizer.add_tokens(["é", "\ufffd", "a b"])
    return tokenizer


def _words(decoder: decoders.Decoder | None) -> Callable[[], Tokenizer]:
    def build() -> Tokenizer:
        tokenizer = Tokenizer(
            WordLevel(BYTES | {w: 256 + i for i, w in enumerate(WORDS)}, unk_token="a")
        )
        if decoder is not None:
            tokenizer.decoder = decoder
        tokenizer.add_special_tokens(["</s>", "<pad>"])
        return tokenizer

    return build


def _llama(*after: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )


TOKENIZERS = {
    "byte level": _byte_level,
    "byte fallback": _words(_llama()),
    "byte fallback, first blank stripped": _words(_llama(decoders.Strip(" ", 1, 0))),
    "metaspace": _words(decoders.Metaspace()),
    "metaspace, no first blank": _words(decoders.Metaspace(prepend_scheme="never")),
    "word piece": _words(decoders.WordPiece(cleanup=True)),
    "end of word": _words(decoders.BPEDecoder(suffix="</w>")),
    "ctc": _words(decoders.CTC(pad_token="b", word_delimiter_token=".")),
    "no decoder": _words(None),
}


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextCodec]:
    made = {}
    for name, build in TOKENIZERS.items():
        for cleans_up in (False, True):
            folder = tmp_path_factory.mktemp("tokenizer")
            build().save(str(folder / "tokenizer.json"))
            config = {"clean_up_tokenization_spaces": cleans_up}
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            made[name + ", cleaned up" * cleans_up] = TextCodec(folder)
    return made


# Bytes of characters, whole and cut, stray bytes, words, special tokens, and an id of no token.
def _tokens(codec: TextCodec) -> st.SearchStrategy[list[int]]:
    size = codec._tokenizer.get_vocab_size()
    ids = st.integers(0, size) | st.integers(max(0, size - len(WORDS)), size)
    if codec.decoding.byte_values or size > 256:
        spelled = st.text("aé漢🙂\ufffd ", min_size=1, max_size=3).map(
            lambda text: _spell(codec, text)
        )
        pieces = st.one_of(ids.map(lambda one: [one]), spelled, spelled.map(lambda all_: all_[:-1]))
        return st.lists(pieces, max_size=14).map(
            lambda lists: [one for ids in lists for one in ids]
        )
    return st.lists(ids, max_size=30)


def _spell(codec: TextCodec, text: str) -> list[int]:
    """A text, byte by byte."""
    names = dict(zip(range(256), _byte_characters(), strict=True))
    return [
        index
        for byte in text.encode()
        if (
            index := codec.token_id(
                f"<0x{byte:02X}>" if codec.token_id("<0x00>") is not None else names[byte]
            )
        )
        is not None
    ]


def _byte_characters() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.mark.parametrize(
    "name", [name + end for name in TOKENIZERS for end in ("", ", cleaned up")]
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_all_pieces_are_the_decoded_text(
    codecs: dict[str, TextCodec], name: str, data: st.DataObject
) -> None:
    codec = codecs[name]
    tokens = data.draw(_tokens(codec))
    stream, out, begin = TextStream(codec), "", 0
    while begin < len(tokens):
        end = begin + data.draw(st.integers(1, 12))
        out += stream.push(tokens[begin:end])
        begin = end
    assert out + stream.finish() == codec.decode(tokens)


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "metaspace", "no decoder"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_stop_string_ends_the_text_where_the_decoded_text_has_it(
    codecs: dict[str, TextCodec], name: str, data: st.DataObject
) -> None:
    """Against the slow, obvious way: all tokens are decoded anew at each step."""
    codec = codecs[name]
    tokens = data.draw(_tokens(codec))
    stop = data.draw(st.lists(st.text("abé漢 .", min_size=1, max_size=3), min_size=1, max_size=2))
    stream, pieces = TextStream(codec, stop), []
    for count, token in enumerate(tokens, 1):
        pieces.append(stream.push([token]))
        text = codec.decode(tokens[:count])
        end = first_stop(text, stop)
        assert stream.is_stopped == (end is not None)
        if end is not None:
            assert "".join(pieces) == text[:end]
            return
    assert "".join([*pieces, stream.finish()]) == codec.decode(tokens)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "shown_at_once"),
    [
        ("byte level", b"\xff", 0.99),
        ("byte level", b"\x80", 0.99),
        ("byte level", b"\xe6\xbc", 0.49),
        ("byte level", b"\xf0\x9f\x99", 0.33),
        ("byte level", "\ufffd".encode(), 0.33),
        ("byte fallback", b"\xff", 0.99),
        ("byte fallback", b"\xe6\xbc", 0.99),
        ("byte fallback", "漢".encode(), 0.0),
        ("byte fallback", b"a", 0.0),
    ],
)
def test_a_long_run_of_bytes_is_linear_and_shown(
    codecs: dict[str, TextCodec], name: str, text: bytes, shown_at_once: float, watched: bool
) -> None:
    codec = codecs[name]
    names = (
        [f"<0x{byte:02X}>" for byte in text]
        if name == "byte fallback"
        else [_byte_characters()[byte] for byte in text]
    )
    ids = [codec.token_id(one) for one in names]
    _count_work(
        codec, [one for one in ids if one is not None] * (1200 // len(ids)), shown_at_once, watched
    )


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("token", ["</s>", "a", "\u2581", None])
def test_a_long_run_of_one_token_is_linear(
    codecs: dict[str, TextCodec], name: str, token: str | None, watched: bool
) -> None:
    codec = codecs[name]
    index = 100_000 if token is None else codec.token_id(token)
    if index is not None:
        _count_work(codec, [index] * 1200, 0.0, watched)


class _Counted:
    """A codec that counts the tokens it decodes."""

    def __init__(self, codec: TextCodec) -> None:
        self.count, self._codec = 0, codec
        self.decoding = Decoding(self._decode, codec.decoding.is_silent, codec.decoding.byte_values)
        self.cleans_up = codec.cleans_up

    def _decode(self, tokens: Sequence[int]) -> str:
        self.count += len(tokens)
        return self._codec.decode(tokens)


def _count_work(codec: TextCodec, tokens: list[int], shown_at_once: float, watched: bool) -> None:
    counted = _Counted(codec)
    stream = TextStream(counted, ["no such text", "\u2581\u2581b"] if watched else ())
    pieces = [stream.push([token]) for token in tokens]
    assert counted.count <= 12 * len(tokens)
    assert len("".join(pieces)) >= shown_at_once * len(tokens)
    assert "".join([*pieces, stream.finish()]) == codec.decode(tokens)


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
def test_pieces_come_no_later_than_those_of_the_library(
    codecs: dict[str, TextCodec], name: str
) -> None:
    """For text of whole characters, against ``DecodeStream`` of tokenizers."""
    codec = codecs[name]
    tokens = (
        _spell(codec, "ab é漢🙂 b.") if name == "byte level" else [256, 259, 257, 258, 256, 262]
    )
    stream, library = TextStream(codec), DecodeStream(skip_special_tokens=True)
    for token in tokens:
        assert stream.push([token]) == (library.step(codec._tokenizer, token) or "")


def test_a_stop_string_before_the_least_length_ends_nothing(codecs: dict[str, TextCodec]) -> None:
    for name in ("byte level", "byte fallback"):
        codec = codecs[name]
        tokens = _spell(codec, "abxababz")
        stream = TextStream(codec, ["ab", "xababy"], min_tokens=4)
        pieces = [stream.push([token]) for token in tokens]
        assert "".join(pieces) == "abx"
        assert stream.is_stopped


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(" .?!,'ntmsver", max_size=6), max_size=12))
def test_blanks_are_taken_out_piece_by_piece_as_from_the_whole(pieces: list[str]) -> None:
    stream = CleanUp()
    out = ""
    whole = clean_up("".join(pieces))
    for piece in pieces:
        out += stream.push(piece)
        assert whole.startswith(out)
    assert out + stream.finish() == whole


def test_what_can_change_is_held_back(tmp_path: Path) -> None:
    _words(_llama())().save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path)
    broken, whole = TextStream(codec), TextStream(codec)
    # A byte that is not UTF-8 makes U+FFFD of the whole run, also of what was a character.
    assert [broken.push([token]) for token in (0xC3, 0xA9, 0xFF, 0x41)] == [
        "",
        "",
        "\ufffd" * 3,
        "\ufffd",
    ]
    assert [whole.push([token]) for token in (0xC3, 0xA9, 256)] == ["", "", "éa"]

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimode.formats.texts import (
    Unreadable,
    dump_json,
    is_whole_text,
    lines_of,
    name_of,
    parse_json,
    read_json,
    read_text,
    whole_text,
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deep"),
        ("9" * 5000, "too many digits"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ('{"a": 1', "line 1, column 8"),
        ("", "Expecting value"),
    ],
)
def test_what_is_not_json_is_one_kind_of_error(text: str, reason: str) -> None:
    with pytest.raises(Unreadable) as caught:
        parse_json(text)
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason


def test_a_name_twice_is_refused_where_names_have_to_be_unique() -> None:
    text = '{"a": [{"b": 1, "b": 2}]}'
    assert parse_json(text) == {"a": [{"b": 2}]}
    with pytest.raises(Unreadable, match='"b" twice'):
        parse_json(text, unique=True)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "ü"}).encode())
    assert read_json(tmp_path / "a.json") == {"a": "ü"}


def test_line_ends_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "a") == "a\r\nb\rc\n"


def test_only_a_line_feed_ends_a_line() -> None:
    text = "a\u2028b\x85c\x0bd\n\n  \r\ne\r\n"
    assert list(lines_of(text)) == [(1, "a\u2028b\x85c\x0bd"), (4, "e\r")]


def test_missing_is_told_from_unreadable(tmp_path: Path) -> None:
    for path, is_missing in (
        (tmp_path / "none", True),
        (tmp_path, False),
        (tmp_path / "a\0b", False),
        (tmp_path / ("n" * 300), False),
    ):
        with pytest.raises(Unreadable) as caught:
            read_text(path)
        assert caught.value.is_missing is is_missing
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(Unreadable, match="not UTF-8"):
        read_text(tmp_path / "latin")


def test_what_is_written_is_json_to_everyone() -> None:
    text = dump_json({"a": float("nan"), "b": [1.5, float("-inf")], "half \ud83d": ("\udcff", 2)})
    assert parse_json(text) == {"a": None, "b": [1.5, None], "half \ufffd": ["\ufffd", 2]}
    text.encode()


def test_half_a_surrogate_pair_becomes_one_replacement() -> None:
    assert whole_text("a\ud83d b\U0001f600") == "a\ufffd b\U0001f600"
    assert is_whole_text("\U0001f600")
    assert not is_whole_text("\ud83d")


def test_a_name_that_is_not_utf8_can_be_recorded(tmp_path: Path) -> None:
    assert name_of(tmp_path / "a\udcff\u00fc") == "a\ufffd\u00fc"

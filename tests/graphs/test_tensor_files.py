"""Safetensors headers: what the reference implementation reads is read alike, what it refuses is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save, save_file

from trimode.errors import CheckpointError
from trimode.formats.safetensors import read_safetensors_header

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "empty": torch.ones(0, 3),
}


def rewritten(change: Callable[[dict[str, Any]], object], extra: bytes = b"") -> bytes:
    """The file with another header."""
    raw = save(TENSORS, {"format": "pt"})
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    changed = change(header)
    return with_header(
        json.dumps(changed if isinstance(changed, dict | list) else header),
        raw[8 + length :] + extra,
    )


def with_header(text: str, data: bytes = b"") -> bytes:
    header = text.encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def at(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].update(changes)


def test_types_of_the_format_are_listed(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.ones(2, 4).to(dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.complex64,
            torch.uint16,
            torch.uint32,
            torch.uint64,
        )
    }
    save_file(tensors, tmp_path / "f")
    assert {
        name: entry.shape for name, entry in read_safetensors_header(tmp_path / "f").items()
    } == dict.fromkeys(tensors, (2, 4))


NAMES = [
    "BOOL",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
    "F31",
    "f32",
]


@pytest.mark.parametrize("dtype", NAMES)
def test_a_type_takes_the_bits_that_the_reference_gives_it(dtype: str, tmp_path: Path) -> None:
    """Eight numbers: as many bytes as a number has bits."""
    accepted = []
    for bits in (4, 6, 8, 16, 32, 64):
        (tmp_path / "f").write_bytes(
            with_header(
                json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}),
                bytes(bits),
            )
        )
        try:
            read_safetensors_header(tmp_path / "f")
        except CheckpointError:
            pass
        else:
            accepted.append(bits)
        assert (bits in accepted) == is_accepted((tmp_path / "f").read_bytes())
    assert len(accepted) == (dtype.upper() == dtype != "F31")


def is_accepted(raw: bytes) -> bool:
    try:
        deserialize(raw)
    except SafetensorError:
        return False
    return True


DAMAGES: dict[str, bytes] = {
    "an overlap": rewritten(at("b", data_offsets=[16, 24])),
    "a gap": rewritten(
        lambda h: h["a"].update(
            data_offsets=[h["a"]["data_offsets"][0] + 4, h["a"]["data_offsets"][1] + 4]
        ),
        bytes(4),
    ),
    "bytes at the end": rewritten(dict, bytes(4)),
    "places beyond the end": rewritten(lambda h: h["a"].update(data_offsets=[10**6, 10**6 + 24])),
    "places before the start": rewritten(at("a", data_offsets=[-24, 0])),
    "places the other way": rewritten(at("a", data_offsets=[32, 8])),
    "three places": rewritten(at("a", data_offsets=[8, 20, 32])),
    "places that are no numbers": rewritten(at("a", data_offsets=["8", "32"])),
    "places that are true": rewritten(at("empty", data_offsets=[False, False])),
    "an unknown type": rewritten(at("a", dtype="F31")),
    "a type that is a number": rewritten(at("a", dtype=32)),
    "a type that is a list": rewritten(at("a", dtype=["F32"])),
    "a shape below 0": rewritten(at("a", shape=[-2, -3])),
    "a shape of parts": rewritten(at("a", shape=[2.0, 3])),
    "a shape beyond 64 bits": rewritten(at("empty", shape=[2**63, 2**63])),
    "a shape that wraps around": rewritten(at("a", shape=[2**62 + 6, 4])),
    "no shape": rewritten(lambda h: h["a"].pop("shape")),
    "a tensor that is a list": rewritten(lambda h: h.update(a=[])),
    "a header that is a list": rewritten(lambda h: [h]),
    "a header that is not JSON": with_header("{"),
    "a name twice": with_header(
        '{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    ),
    "numbers that are none": with_header(
        '{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'
    ),
    "a deep header": with_header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "a number of many digits": with_header(
        '{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,0]}}'
    ),
    "a name in no UTF-8": with_header(
        '{"\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,4]}}'
    ),
    "a name in two lines": with_header(
        r'{"a\nb":{"dtype":"F32","shape":[0],"data_offsets":[0,4]}}'
    ),
    "a header longer than the file": (10**9).to_bytes(8, "little") + b"{}",
    "seven bytes": bytes(7),
    "nothing": b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGES[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as raised:
        read_safetensors_header(path)
    assert raised.value.hint
    assert "\n" not in raised.value.message
    assert raised.value.message.isprintable()


def test_what_lies_there_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, found in (
        ("folder", "a folder"),
        ("link", "a link to a file that is not there"),
        ("none", "none"),
        ("n" * 300, "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=found):
            read_safetensors_header(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_safetensors_header(Path("a\0b"))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_one_changed_byte_is_read_as_the_reference_reads_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(save(TENSORS, {"format": "pt"}))
    length = int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(raw)
    reference = shapes_of(path)
    try:
        ours = {name: list(entry.shape) for name, entry in read_safetensors_header(path).items()}
    except CheckpointError:
        return  # stricter in places, such as a name twice
    assert ours == reference


def shapes_of(path: Path) -> dict[str, list[int]] | None:
    """What the reference implementation reads, or None where it refuses the file."""
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None

"""The pack reader against safetensors and torch, and against files that are none."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trimode.errors import BundleError
from trimode.formats.safetensors import SAFETENSORS_NAMES, PackEntry, to_float32
from trimode.runtime.bundle.weights import WeightPack

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SPECIALS = (
    0.0,
    -0.0,
    1.0,
    -1.5,
    float("inf"),
    float("-inf"),
    float("nan"),
    65504.0,
    2.0**-24,
    2.0**-126,
    3.3e38,
    1e-40,
)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = ((), (1,), (3,), (0,), (5, 0, 2), (7, 3), (2, 3, 5), (1, 1, 129))
    tensors = {
        f"{name}.{i}": torch.randn(shape, generator=generator).to(dtype)
        for name, dtype in TYPES.items()
        for i, shape in enumerate(shapes)
    }
    save_file(tensors, tmp_path / "odd.safetensors", {"format": "pt"})
    return tmp_path / "odd.safetensors"


def test_odd_shapes(pack: Path) -> None:
    opened, expected = WeightPack(pack), load_file(pack)
    assert set(opened.entries) == set(expected)
    for name, tensor in expected.items():
        entry = opened.entries[name]
        assert (entry.dtype, entry.shape, entry.num_bytes) == (
            name.split(".")[0],
            tuple(tensor.shape),
            tensor.nbytes,
        )
        assert opened.raw(name).tobytes() == tensor.flatten().view(torch.uint8).numpy().tobytes()
        wide = opened.widened(name)
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(wide, tensor.float().numpy())


def test_float32_is_a_view_of_the_file(pack: Path) -> None:
    opened = WeightPack(pack)
    assert np.shares_memory(opened.widened("float32.5"), opened.raw("float32.5"))


@pytest.mark.parametrize("dtype", TYPES)
def test_specials(dtype: Any) -> None:
    tensor = torch.tensor(SPECIALS).to(TYPES[dtype])
    wide = to_float32(tensor.view(torch.uint8).numpy(), SAFETENSORS_NAMES[dtype])
    np.testing.assert_array_equal(wide, tensor.float().numpy())
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(tensor.float().numpy()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_bit_pattern(dtype: Any) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = to_float32(bits.view(torch.uint8).numpy(), SAFETENSORS_NAMES[dtype])
    np.testing.assert_array_equal(wide, bits.view(TYPES[dtype]).float().numpy())


@given(st.lists(st.floats(width=16), max_size=20))
def test_halves(values: list[float]) -> None:
    narrow = np.array(values, np.float16)
    np.testing.assert_array_equal(
        to_float32(narrow.view(np.uint8), "F16"), narrow.astype(np.float32)
    )


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": bytes(16),
    "header beyond the end": (1 << 40).to_bytes(8, "little") + b"{}",
    "header one byte short": header(a=entry())[:-1],
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "no text": (4).to_bytes(8, "little") + b"\xff\xff\xff\xff",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "an entry that is no object": header(a=3),
    "no type": header(a={"shape": [2], "data_offsets": [0, 8]}) + bytes(8),
    "a type of another kind": header(a=entry("F8_E5M2", (8,))) + bytes(8),
    "half a byte": header(a=entry("U8", ())) + bytes(8),
    "a type that is no text": header(a=entry(["F32"])) + bytes(8),
    "three offsets": header(a=entry(offsets=(0, 8, 9))) + bytes(8),
    "data cut off": header(a=entry()) + bytes(7),
    "too few bytes for the shape": header(a=entry(shape=(3,))) + bytes(8),
    "too many bytes for the shape": header(a=entry(shape=(1,))) + bytes(8),
    "bytes at the end": header(a=entry()) + bytes(9),
    "a gap": header(a=entry(), b=entry(offsets=(12, 20))) + bytes(20),
    "tensors that overlap": header(a=entry(), b=entry(offsets=(4, 12))) + bytes(12),
    "a packed type of another name": header(__metadata__={"U8": "int3"}, a=entry("U8", (8,)))
    + bytes(8),
    "a packed type that is no text": header(__metadata__={"U8": 4}, a=entry("U8", (8,))) + bytes(8),
    "before the data": header(a=entry(offsets=(-8, 0))) + bytes(8),
    "a negative shape": header(a=entry(shape=(-1, -2))) + bytes(8),
    "a shape that is no list": header(a=entry(shape=2)) + bytes(8),
    "a size that is no number": header(a=entry(shape=("2",))) + bytes(8),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "pack.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(
        BundleError,
        match=r"pack\.safetensors: expected a weight pack, found one that cannot be read",
    ) as raised:
        WeightPack(path)
    assert raised.value.hint


def test_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for somebody who writes
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "pipe"):
        with pytest.raises(BundleError, match="expected a weight pack"):
            WeightPack(path)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pack.safetensors"
    path.write_bytes(
        header(__metadata__={"format": "pt"}, a=entry()) + np.array([1, 2], "<f4").tobytes()
    )
    opened = WeightPack(path)
    assert opened.entries == {"a": PackEntry("float32", (2,), path.stat().st_size - 8)}
    assert opened.widened("a").tolist() == [1, 2]

"""Targets: names, architectures, and which precision they share."""

from __future__ import annotations

import pytest

from trimode.compiler.targets import TARGETS, choose_precision, find_target, resolve_targets
from trimode.errors import UsageError


def test_names_and_architectures() -> None:
    assert find_target("RTX-4090").compute_capability == "8.9"
    for spelling, expected in {
        "sm89": "8.9",
        "SM_120": "12.0",
        "sm75": "7.5",
        "sm121": "12.1",
    }.items():
        assert find_target(spelling).compute_capability == expected
    assert find_target("sm90").backend == "tensorrt"
    assert find_target("sm86").backend == "tensorrt_rtx"
    assert {t.backend for t in TARGETS.values() if t.compute_capability in ("9.0", "10.0")} == {
        "tensorrt"
    }


MEMORIES = {
    "rtx-pro-6000": (512, 28.0),
    "rtx-5090": (512, 28.0),
    "dgx-spark": (256, 8.533),
    "rtx-4090": (384, 21.0),
    "l4": (192, 12.5),
    "l40s": (384, 18.0),
    "rtx-3090": (384, 19.5),
    "a10": (384, 12.5),
    "a100": (5120, 2.43),
    "t4": (256, 10.0),
    "h100": (5120, 5.23),
    "h200": (6144, 6.25),
    "b200": (8192, 8.0),
    "gb200": (8192, 8.0),
}
"""Width of a GPU's memory bus in bits, and gigabits a second of each line."""


def test_bandwidths_are_those_of_the_memory_and_have_a_source() -> None:
    known = {name: target for name, target in TARGETS.items() if target.bandwidth_gb_s is not None}
    assert known.keys() == MEMORIES.keys()
    for name, (bits, gigabits) in MEMORIES.items():
        assert known[name].bandwidth_gb_s == pytest.approx(bits * gigabits / 8, rel=0.025)
        assert str(known[name].bandwidth_source).startswith("https://")
    assert all(
        target.bandwidth_source is None for name, target in TARGETS.items() if name not in known
    )


@pytest.mark.parametrize("name", ["", "rtx", "sm", "sm7", "sm61", "sm1234", "4090"])
def test_unknown_targets(name: str) -> None:
    with pytest.raises(UsageError, match=r"expected a (target|GPU architecture)"):
        find_target(name)


def test_a_target_named_twice_is_one() -> None:
    assert [t.name for t in resolve_targets(("t4", "cpu", "T4"))] == ["t4", "cpu"]
    with pytest.raises(UsageError, match="at least one target"):
        resolve_targets(())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cpu",), "fp32"),
        (("rtx-4090",), "bf16"),
        (("cpu", "rtx-4090"), "bf16"),
        (("rtx-4090", "t4", "cpu"), "fp16"),
        (("cuda", "a100"), "fp16"),
    ],
)
def test_the_precision_all_targets_share(names: tuple[str, ...], expected: str) -> None:
    assert choose_precision(None, resolve_targets(names)) == expected


@pytest.mark.parametrize(
    ("asked", "names", "message"),
    [
        (
            "bf16",
            ("rtx-4090", "t4"),
            r"t4 \(7.5\): expected a precision it can run \(fp16, int8\), found bf16",
        ),
        ("fp32", ("rtx-4090",), "found fp32"),
        ("fp8", ("a100",), r"a100 \(8.0\): expected a precision it can run .*, found fp8"),
        (
            "int4",
            ("t4",),
            r"t4 \(7.5\): expected a precision it can run \(fp16, int8\), found int4",
        ),
        (
            "int4",
            ("cuda",),
            r"cuda \(onnxruntime\): expected a precision it can run \(fp16, bf16\), found int4",
        ),
        (
            "nvfp4",
            ("rtx-5090", "l4"),
            r"l4 \(8\.9\): expected a precision it can run .*, found nvfp4; products of 4-bit "
            r"floats begin with",
        ),
        ("half", ("cpu",), "found 'half'"),
    ],
)
def test_precisions_that_cannot_be(asked: str, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_precision(asked, resolve_targets(names))

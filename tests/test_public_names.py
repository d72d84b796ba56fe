"""What `import trimode` promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

import trimode
import trimode.errors
import trimode.runtime

LIBRARIES = (
    "jinja2",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "pydantic",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "typer",
)


@pytest.mark.parametrize("name", trimode.__all__)
def test_name_resolves(name: str) -> None:
    assert getattr(trimode, name) is not None
    assert name in dir(trimode)


def test_names_are_those_of_their_modules() -> None:
    assert trimode.TriModeModel is trimode.runtime.TriModeModel
    assert trimode.Generation is trimode.runtime.Generation
    assert trimode.Chunk is trimode.runtime.Chunk


def test_every_error_is_public() -> None:
    errors = {
        name
        for name, value in vars(trimode.errors).items()
        if isinstance(value, type) and issubclass(value, trimode.TrimodeError)
    }
    assert errors <= set(trimode.__all__)


def test_names_are_sorted_and_listed_once() -> None:
    assert trimode.__all__ == sorted(
        set(trimode.__all__), key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"module 'trimode' has no attribute 'TriModel'"):
        _ = trimode.TriModel


def test_import_loads_no_library() -> None:
    code = f"import sys, trimode; print([name for name in {LIBRARIES} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_star_import_gives_all_names() -> None:
    code = (
        "import trimode; from trimode import *; assert set(trimode.__all__) <= set(globals()), "
        "trimode.__all__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

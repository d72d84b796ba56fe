"""What a user installs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import trimode.runtime

ROOT = Path(__file__).parents[2]


def test_wheel_contents(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("graphs", "compiler", "runtime", "calib"):
        for source in (ROOT / package).rglob("*.py"):
            assert f"trimode/{source.relative_to(ROOT).as_posix()}" in names
    assert {"trimode/__init__.py", "trimode/errors.py", "trimode/files.py", "trimode/py.typed"} <= names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "artifacts", "src", "graphs"))]


def test_public_names_exist() -> None:
    for name in trimode.runtime.__all__:
        assert hasattr(trimode.runtime, name)

"""What a user installs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import trimode.runtime

ROOT = Path(__file__).parents[2]
LINKED = ("calib", "compiler", "graphs", "runtime")
"""Folders at the top, which src/trimode links to."""


def test_wheel_contents(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == _sources()


def _sources() -> set[str]:
    """The package's files as git lists them, by their names in a wheel: a new folder that the
    wheel's list lacks shows here.
    """
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src", *LINKED],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    is_code = (".py", "py.typed")
    assert not [name for name in files if not (name.endswith(is_code) or "/static/" in name)]
    return {f"trimode/{name.removeprefix('src/trimode/')}" for name in files}


def test_every_folder_is_listed() -> None:
    folders = {
        path.name
        for path in (ROOT / "src" / "trimode").iterdir()
        if (path / "__init__.py").is_file()
    }
    assert folders == {*LINKED, "cli", "formats", "loadtest", "report", "server"}
    assert {path.name for path in (ROOT / "src" / "trimode").iterdir() if path.is_symlink()} == set(
        LINKED
    )


def test_public_names_exist() -> None:
    for name in trimode.runtime.__all__:
        assert hasattr(trimode.runtime, name)

"""A command that shares the imports of libraries ends as one that begins from nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_module, trimode


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["run", "--help"],
        ["targets"],
        ["run", "nowhere", "--prompt", "a"],
        ["run", "--no-such-option"],
        ["build", "nowhere", "-o", "out", "--json"],
    ],
    ids=" ".join,
)
def test_a_command_ends_as_on_its_own(words: list[str], tmp_path: Path) -> None:
    alone = subprocess.run(
        [sys.executable, "-m", "trimode.cli.main", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    shared = trimode(*words, cwd=tmp_path)
    assert (shared.returncode, shared.stdout, shared.stderr) == (
        alone.returncode,
        alone.stdout,
        alone.stderr,
    )


CHANGES = """
import os, sys
print(sys.argv[1:], os.environ.get("ONCE"), os.getcwd(), os.environ.pop("PATH", None) is None)
os.chdir("/")
sys.modules["json"] = None
sys.exit(len(sys.argv))
"""


def test_a_command_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "changes.py").write_text(CHANGES)
    first = run_module("changes", "a", cwd=tmp_path, env={"ONCE": "x"})
    again = run_module("changes", "a", "b", cwd=tmp_path)
    assert (first.returncode, first.stdout) == (2, f"['a'] x {tmp_path} False\n")
    assert (again.returncode, again.stdout) == (3, f"['a', 'b'] None {tmp_path} False\n")


def test_a_fault_is_told(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise ValueError('no')\n")
    failed = run_module("fails", cwd=tmp_path)
    assert failed.returncode == 1
    assert "ValueError: no" in failed.stderr

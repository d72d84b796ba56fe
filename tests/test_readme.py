"""Every command and every snippet of the README runs, in order, on the demo checkpoint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from commands import run_line

ROOT = Path(__file__).parents[1]


def test_readme_is_true(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "artifacts").symlink_to(ROOT / "artifacts")
    commands = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.startswith(("trimode ", "echo "))
    ]
    assert len(commands) >= 5
    for command in commands:
        done = run_line(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        subprocess.run(
            [sys.executable, "-W", "error", "-c", snippet],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile

"""The guide's requests are answered by a server that runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from serving import serving

from trimode import Engine, TriModeModel
from trimode.server.limits import Limits
from trimode.server.protocol.base import Sampling
from trimode.server.service import Service

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "guides" / "serve.md").read_text(encoding="utf-8")
REFERENCE = (DOCS / "reference" / "server.md").read_text(encoding="utf-8")
SHOWN = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def address(demo_model: TriModeModel) -> Iterator[str]:
    with Engine(demo_model) as engine, serving(Service(engine, "my-model")) as address:
        yield address


def test_each_curl_is_answered(address: str) -> None:
    lines = re.findall(
        r"^curl .*$", "".join(re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)), re.M
    )
    assert len(lines) >= 2
    for line in lines:
        command = [*shlex.split(line.replace(SHOWN, address)), "-sS", "--fail-with-body"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["usage"]["completion_tokens"] > 0


def test_each_python_example_runs(address: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert snippets
    for snippet in snippets:
        command = [sys.executable, "-W", "error", "-c", snippet.replace(SHOWN, address)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "total_tokens=" in done.stdout


def test_the_reference_lists_every_field_and_limit() -> None:
    named = set(re.findall(r"`(\w+)`", REFERENCE))
    assert set(Sampling.model_fields) <= named
    assert {one.name for one in fields(Limits)} <= named

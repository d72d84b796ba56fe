"""``trimode calibrate`` is a group of jobs, and a job by itself."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from trimode.cli.main import app


@pytest.mark.parametrize(
    "words",
    [
        ["calibrate", "CHECKPOINT"],
        ["calibrate", "--precision", "fp8"],
        ["calibrate", "scales", "CHECKPOINT"],
    ],
)
def test_a_checkpoint_alone_means_scales(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert "trimode calibrate scales" in result.output


def test_the_group_lists_its_jobs() -> None:
    result = CliRunner().invoke(app, ["calibrate", "--help"])
    assert result.exit_code == 0
    assert "scales" in result.output
    assert "sensitivity" in result.output
    assert "--precision" not in result.output

"""What an interrupted calibration left, damaged since."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimode.calib.scales.work_folder import RECORD, WorkFolder
from trimode.errors import UsageError

DAMAGED = [b"", b"{", b"[]", b"[" * 100_000, b"9" * 5000, b"\xff\xfe{}", b'{"a": NaN}']


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(UsageError, match="expected a JSON object"):
        WorkFolder(tmp_path).take_up()


@pytest.mark.parametrize("line", [b"{", b"[" * 100_000, b"[[" + b"9" * 5000 + b"]]", b"\xff", b"3"])
def test_damaged_episodes_are_one_error(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "episodes.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UsageError, match="found a file that cannot be read"):
        WorkFolder(tmp_path).episodes()

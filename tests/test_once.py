"""What the tests share stays as it was made."""

from __future__ import annotations

from pathlib import Path

from once import changed_since_made, made_once


def _make(folder: Path) -> None:
    (folder / "bundle").mkdir()
    for name in ("changed", "deleted", "kept"):
        (folder / "bundle" / name).write_text(name)


def test_changes_to_a_shared_folder_are_seen(tmp_path: Path) -> None:
    bundle = made_once(tmp_path / "demo", _make) / "bundle"
    made_once(tmp_path / "other", _make)
    assert changed_since_made(tmp_path) == []
    (bundle / "changed").write_text("CHANGED")
    (bundle / "deleted").unlink()
    (bundle / "added").touch()
    (bundle / ".bundle.lock").touch()
    names = ("added", "changed", "deleted")
    assert changed_since_made(tmp_path) == [f"demo/bundle/{name}" for name in names]
    assert made_once(tmp_path / "demo", _make) == tmp_path / "demo"


def test_a_folder_is_made_by_the_first_who_asks(tmp_path: Path) -> None:
    asked: list[Path] = []
    for _ in range(2):
        made_once(tmp_path / "demo", asked.append)
    assert len(asked) == 1

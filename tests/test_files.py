"""Outputs: replaced whole wherever they lie, refused before the work where they cannot be, and
nothing is left of a failure.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trimode.errors import BuildError, TrimodeError, UsageError
from trimode.formats.disk import mount_of
from trimode.formats.files import (
    check_apart,
    check_file_place,
    check_replaceable,
    replace_text,
    staged_replacement,
)
from trimode.formats.places import companion

MARKER = "it.json"


def write(output: Path, *names: str, text: str = "new") -> None:
    """As every command does: check, work, replace."""
    check_replaceable(output, MARKER, "an output")
    with staged_replacement(output, MARKER) as staged:
        for name in (MARKER, *names):
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def old(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MARKER, "stale", "sub/stale"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("old")
    return folder


OLD = {MARKER: "old", "stale": "old", "sub/stale": "old"}
NEW = {MARKER: "new", "sub/part": "new"}


def as_nobody(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run Python without the right of root to write everywhere."""
    drop = (
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--securebits=+noroot"]
        if os.geteuid() == 0
        else []
    )
    command = [*drop, sys.executable, "-c", code, *map(str, arguments)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("root may write everywhere, and there is no setpriv")


CODE = """
import sys, pathlib
from trimode.formats.files import check_replaceable, staged_replacement
from trimode.errors import TrimodeError, exit_with
output = pathlib.Path(sys.argv[1])
try:
    check_replaceable(output, "it.json", "an output")
    print("worked")
    with staged_replacement(output, "it.json") as staged:
        (staged / "it.json").write_text("new")
        (staged / "sub").mkdir()
        (staged / "sub" / "part").write_text("new")
except TrimodeError as error:
    exit_with(error)
"""


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("begin", [lambda _: None, lambda folder: folder.mkdir(), old])
def test_a_folder(tmp_path: Path, begin: Callable[[Path], Any]) -> None:
    begin(tmp_path / "out")
    write(tmp_path / "out", "sub/part")
    assert contents(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}


def test_a_mount_point(mounted: Path) -> None:
    (mounted / "lost+found").mkdir()
    for _ in range(2):
        write(mounted, "sub/part")
        assert contents(mounted) == NEW
    assert sorted(path.name for path in mounted.iterdir()) == [MARKER, "lost+found", "sub"]
    assert [path.name for path in mounted.parent.iterdir()] == ["mounted"]


def test_a_bind_mount_of_the_same_file_system(tmp_path: Path) -> None:
    """Its device is that of the parent: only trying tells that it cannot be renamed."""
    folder, source = tmp_path / "bound", old(tmp_path / "source")
    folder.mkdir()
    if subprocess.run(
        ["mount", "--bind", str(source), str(folder)], capture_output=True, check=False
    ).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        write(folder, "sub/part")
        assert contents(source) == NEW
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_left_as_it_was(mounted: Path) -> None:
    old(mounted)
    for output in (mounted, mounted / "deep" / "out"):
        with pytest.raises(BuildError, match=rf"disk full \({mounted}\)"):
            write(output, "big", text="x" * 900_000)
        assert contents(mounted) == OLD
    (mounted / "filler").write_bytes(
        bytes(os.statvfs(mounted).f_bavail * os.statvfs(mounted).f_frsize)
    )
    with pytest.raises(BuildError, match=rf"disk full \({mounted}\)"):
        check_replaceable(mounted, MARKER, "an output")
    with pytest.raises(BuildError, match="disk full"):
        check_file_place(mounted / "table.json")


def test_a_limit_on_files_is_a_full_disk(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(BuildError, match="disk full"):
            write(tmp_path / "a" / "b" / "out", "big", text="x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("begin", [lambda folder: folder.mkdir(), old, lambda _: None])
def test_a_link_stays(tmp_path: Path, begin: Callable[[Path], Any]) -> None:
    """What it points to is replaced; where that is not there yet, it is made."""
    begin(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "sub/part")
    assert (tmp_path / "link").readlink() == Path("real")
    assert contents(tmp_path / "real") == NEW
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UsageError, match="circle"):
        write(tmp_path / "a")


@pytest.mark.parametrize("name", [".", "", "../here", "./sub/..", "../here/"])
def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It is the same folder afterwards: a shell in it still sees its contents."""
    here = old(tmp_path / "here")
    inode = here.stat().st_ino
    monkeypatch.chdir(here)
    write(Path(name), "sub/part")
    assert contents(Path()) == NEW
    assert here.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("begin", [lambda folder: folder.mkdir(), old])
def test_a_folder_in_a_read_only_one(tmp_path: Path, begin: Callable[[Path], Any]) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    begin(parent / "out")
    parent.chmod(0o555)
    try:
        done = as_nobody(CODE, parent / "out")
    finally:
        parent.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert contents(parent / "out") == NEW
    assert [path.name for path in parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("mode", "name"), [(0o555, "new"), (0o555, "."), (0o666, "new"), (0o666, "."), (0o000, "new")]
)
def test_what_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, mode: int, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(mode)
    try:
        done = as_nobody(CODE, tmp_path / "out" / name)
    finally:
        (tmp_path / "out").chmod(0o755)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: " in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="found something else"):
        check_replaceable(tmp_path / "file", MARKER, "an output")
    with pytest.raises(BuildError, match="Not a directory"):
        check_replaceable(tmp_path / "file" / "out", MARKER, "an output")
    assert contents(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize(
    "name", ["n" * 255, "n" * 245, "ü" * 120, "[a-z]*", "bad\udcff", "\udcff" * 240]
)
def test_names(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        write(tmp_path / name, "sub/part")
        assert contents(tmp_path / name) == NEW
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208
    for suffix in (".lock", ".state.pt"):
        companion(tmp_path / name, suffix, is_hidden=True).touch()


def test_a_name_that_no_file_system_takes(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="File name too long") as caught:
        check_replaceable(tmp_path / ("n" * 300), MARKER, "an output")
    assert "shorter" in caught.value.hint


@pytest.mark.parametrize("begin", [lambda _: None, lambda folder: folder.mkdir(), old])
@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EPERM])
def test_where_renaming_is_refused_entries_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: Callable[[Path], Any], number: int
) -> None:
    def refuse(source: Any, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), source)

    begin(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        write(tmp_path / "out", "sub/part")
    assert contents(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MARKER, "sub"]


@pytest.mark.parametrize("kill", [False, True])
def test_whenever_the_exchange_stops_the_folder_is_old_or_new(tmp_path: Path, kill: bool) -> None:
    """Stopped before each of its steps: by an error, which puts the old back, or for good, which
    the next run sees to.
    """
    code = """
import os, pathlib, shutil, sys
from trimode.formats import exchange, files
output, steps, kill = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
def stepping(function):
    def step(*arguments, **named):
        global steps
        steps -= 1
        if steps == 0:
            if kill:
                os._exit(9)
            raise OSError(5, "Input/output error")
        return function(*arguments, **named)
    return step
exchange._move = stepping(exchange._move)
pathlib.Path.touch = stepping(pathlib.Path.touch)
shutil.rmtree = stepping(shutil.rmtree) if kill else shutil.rmtree
os.chdir(output)
with files.staged_replacement(output, "it.json") as staged:
    (staged / "it.json").write_text("new")
    (staged / "sub").mkdir()
    (staged / "sub" / "part").write_text("new")
"""
    seen = []
    for steps in range(1, 12):
        output = old(tmp_path / f"{steps}" / "out")
        done = subprocess.run(
            [sys.executable, "-c", code, str(output), str(steps), str(kill)],
            capture_output=True,
            text=True,
            check=False,
        )
        if (output / MARKER).exists() and kill:
            assert {
                name: text for name, text in contents(output).items() if not name.startswith(".")
            } in (OLD, NEW)
        if kill:
            check_replaceable(output, MARKER, "an output")
            with pytest.raises(KeyboardInterrupt), staged_replacement(output, MARKER):
                raise KeyboardInterrupt
        seen.append(contents(output))
        assert seen[-1] in (OLD, NEW)
        assert not list(output.glob(".partial*"))
        if done.returncode == 0:
            break
    assert done.returncode == 0
    assert seen[0] == OLD
    assert seen[-1] == NEW


def interrupted(staged: Path) -> None:
    (staged / "half").touch()
    raise KeyboardInterrupt


def test_an_interrupt_leaves_an_empty_folder_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    with pytest.raises(KeyboardInterrupt), staged_replacement(tmp_path / "out", MARKER) as staged:
        interrupted(staged)
    assert list((tmp_path / "out").iterdir()) == []
    write(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("output", "source"),
    [("ck", "ck"), ("ck/out", "ck"), (".", "ck"), ("link", "ck"), ("ck/../ck/./out/deep", "ck")],
)
def test_what_is_read_is_not_written_over(tmp_path: Path, output: str, source: str) -> None:
    old(tmp_path / "ck")
    (tmp_path / "link").symlink_to("ck")
    with pytest.raises(UsageError, match="found"):
        check_apart(tmp_path / output, tmp_path / source)
    check_apart(tmp_path / "ck-2", tmp_path / "ck", None, tmp_path / "ck" / "stale")
    with pytest.raises(UsageError, match="holds"):
        check_apart(tmp_path / "ck", None, tmp_path / "ck" / "stale")


def test_a_file_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_device_is_written_and_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=-1, text=True)
    check_file_place(tmp_path / "pipe")
    replace_text(tmp_path / "pipe", "new")
    assert reader.communicate()[0] == "new"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_file_that_cannot_be_exchanged_is_written_in_place(tmp_path: Path) -> None:
    code = """
import sys, pathlib
from trimode.formats.files import check_file_place, replace_text
check_file_place(pathlib.Path(sys.argv[1]))
replace_text(pathlib.Path(sys.argv[1]), "new")
"""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "table").write_text("old")
    (tmp_path / "in").chmod(0o555)
    try:
        done = as_nobody(code, tmp_path / "in" / "table")
        refused = as_nobody(code, tmp_path / "in" / "another")
    finally:
        (tmp_path / "in").chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == {"in/table": "new"}
    assert "BuildError" in refused.stderr


def test_no_error_but_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for path in (
        Path("out"),
        Path("nul\0byte"),
        Path("/proc/out"),
        Path("/dev/null"),
        Path("/dev/null/out"),
    ):
        with pytest.raises(TrimodeError):
            check_replaceable(path, MARKER, "an output")


def test_the_mount_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    assert mount_of(tmp_path / "a" / "b") == mount_of(tmp_path)
    assert mount_of(Path("/proc/nothing")) == Path("/proc")

"""The cache: makes once, checks what it hands out, survives interruption, and forgets the oldest
first.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import config_of, write_checkpoint

from trimode.compiler.store.cache import ContentCache, key_of
from trimode.runtime.bundle.cache_folder import usual_folder


def writes(data: bytes, calls: list[int] | None = None) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        if calls is not None:
            calls.append(1)
        path.write_bytes(data)

    return make


def entries(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "lock")


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    cache, calls = ContentCache(tmp_path / "c"), list[int]()
    key = key_of(graph="g", target="8.9")
    assert not cache.fetch(key, tmp_path / "one", writes(b"engine", calls))
    assert cache.fetch(key, tmp_path / "two", writes(b"other", calls))
    assert (tmp_path / "two").read_bytes() == b"engine"
    assert len(calls) == 1
    assert key != key_of(graph="g", target="8.6")
    assert key == key_of(target="8.9", graph="g")


@pytest.mark.parametrize("harm", ["flip", "truncate", "no digest"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, harm: str) -> None:
    cache, key = ContentCache(tmp_path / "c"), key_of(x=1)
    cache.fetch(key, tmp_path / "one", writes(b"engine"))
    entry = tmp_path / "c" / key[:2] / key
    {
        "flip": lambda: entry.write_bytes(b"enginE"),
        "truncate": lambda: entry.write_bytes(b""),
        "no digest": entry.with_name(key + ".sha256").unlink,
    }[harm]()
    assert not cache.fetch(key, tmp_path / "two", writes(b"engine"))
    assert (tmp_path / "two").read_bytes() == b"engine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_failing_to_make_leaves_nothing(
    tmp_path: Path, error: BaseException | type[BaseException]
) -> None:
    cache, key = ContentCache(tmp_path / "c"), key_of(x=1)

    def make(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        cache.fetch(key, tmp_path / "one", make)
    assert entries(tmp_path) == []
    assert not cache.fetch(key, tmp_path / "one", writes(b"whole"))


def test_a_killed_maker_is_cleared_by_the_next(tmp_path: Path) -> None:
    key = key_of(x=1)
    code = (
        "import sys, pathlib\nfrom trimode.compiler.store.cache import ContentCache\n"
        "def make(p):\n    p.write_bytes(b'half'); print('in', flush=True); sys.stdin.read()\n"
        "ContentCache(pathlib.Path(sys.argv[1])).fetch(sys.argv[2], pathlib.Path(sys.argv[3]), "
        "make)\n"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "c"), key, str(tmp_path / "x")],
        stdin=-1,
        stdout=-1,
    )
    assert victim.stdout is not None
    assert victim.stdin is not None
    victim.stdout.readline()
    victim.kill()
    victim.wait()
    victim.stdout.close()
    victim.stdin.close()
    assert ContentCache(tmp_path / "c").usage() == (0, 0)
    ContentCache(tmp_path / "c").fetch(key, tmp_path / "one", writes(b"whole"))
    assert (tmp_path / "one").read_bytes() == b"whole"
    assert [p.name for p in entries(tmp_path / "c")] == [key, f"{key}.sha256"]


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    key = key_of(x=1)
    code = (
        "import sys, pathlib, time\nfrom trimode.compiler.store.cache import ContentCache\n"
        "def make(p):\n    print('made', flush=True); time.sleep(0.5); p.write_bytes(b'engine')\n"
        "ContentCache(pathlib.Path(sys.argv[1])).fetch(sys.argv[2], pathlib.Path(sys.argv[3]), "
        "make)\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "c"), key, str(tmp_path / f"out{i}")],
            stdout=-1,
            text=True,
        )
        for i in range(3)
    ]
    made = [process.communicate()[0] for process in running]
    assert sum(out.count("made") for out in made) == 1
    assert all((tmp_path / f"out{i}").read_bytes() == b"engine" for i in range(3))


def test_pruning_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = ContentCache(tmp_path / "c", limit_bytes=250)
    keys = [key_of(x=i) for i in range(3)]
    for i, key in enumerate(keys):
        cache.fetch(key, tmp_path / "out", writes(bytes(100)))
        os.utime(tmp_path / "c" / key[:2] / key, (i, i))
    cache.fetch(keys[0], tmp_path / "out", writes(b""))  # used again: now the youngest
    assert time.time() - (tmp_path / "c" / keys[0][:2] / keys[0]).stat().st_mtime < 60
    assert cache.usage() == (3, 300)
    assert cache.prune() == 1
    assert {p.name for p in entries(tmp_path / "c") if len(p.name) == 64} == {keys[0], keys[2]}
    assert cache.usage() == (2, 200)


def test_pruning_leaves_what_is_in_use(tmp_path: Path) -> None:
    cache, key = ContentCache(tmp_path / "c", limit_bytes=0), key_of(x=1)
    cache.fetch(key, tmp_path / "out", writes(b"engine"))
    (tmp_path / "c" / key[:2] / key).write_bytes(b"damaged")

    def make(path: Path) -> None:
        path.write_bytes(b"engine")
        code = (
            "import sys, pathlib\nfrom trimode.compiler.store.cache import ContentCache\n"
            "print(ContentCache(pathlib.Path(sys.argv[1]), 0).prune())"
        )
        assert (
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / "c")],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            == "0\n"
        )

    cache.fetch(key, tmp_path / "out", make)
    assert (tmp_path / "out").read_bytes() == b"engine"


def break_digest(entry: Path) -> None:
    entry.with_name(f"{entry.name}.sha256").write_bytes(b"\xff\xfe")


def make_a_folder_of(path: Path) -> None:
    path.unlink()
    (path / "sub").mkdir(parents=True)


@pytest.mark.parametrize(
    "harm",
    [
        break_digest,
        make_a_folder_of,
        lambda entry: make_a_folder_of(entry.with_name(f"{entry.name}.sha256")),
        lambda entry: shutil.rmtree(entry.parent),
    ],
)
def test_what_is_odd_in_the_cache_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    cache, key = ContentCache(tmp_path / "c"), key_of(x=1)
    cache.fetch(key, tmp_path / "one", writes(b"engine"))
    harm(tmp_path / "c" / key[:2] / key)
    assert not cache.fetch(key, tmp_path / "two", writes(b"engine"))
    assert cache.fetch(key, tmp_path / "three", writes(b"other"))
    assert (tmp_path / "two").read_bytes() == (tmp_path / "three").read_bytes() == b"engine"
    assert not caplog.records


def test_an_unusable_cache_is_done_without_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "c", Path("/proc/c")):
        caplog.clear()
        cache = ContentCache(folder)
        for number in range(3):
            assert not cache.fetch(key_of(x=number), tmp_path / "out", writes(f"{number}".encode()))
            assert (tmp_path / "out").read_bytes() == f"{number}".encode()
        assert cache.prune() == 0
        (record,) = caplog.records
        assert str(folder) in record.getMessage()
        assert "\n" not in record.getMessage()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_cache_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        cache, data = ContentCache(folder), bytes(100_000)
        for number in range(2):
            assert not cache.fetch(key_of(x=number), tmp_path / "out", writes(data))
            assert (tmp_path / "out").read_bytes() == data
        assert not [path for path in folder.glob("??/*") if path.name != "lock"]
        (record,) = caplog.records
        assert f"the disk full ({folder})" in record.getMessage()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")]
)
def test_a_file_system_without_locks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    cache = ContentCache(tmp_path / "c")
    for number in range(2):
        assert not cache.fetch(key_of(x=number), tmp_path / "out", writes(b"engine"))
        assert (tmp_path / "out").read_bytes() == b"engine"
    assert len(caplog.records) == 1


def test_an_error_of_the_destination_is_not_taken_for_one_of_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, key = ContentCache(tmp_path / "c"), key_of(x=1)
    cache.fetch(key, tmp_path / "one", writes(b"engine"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3, before[1]))
        with pytest.raises(OSError, match="File too large"):
            cache.fetch(key, tmp_path / "two", writes(b"engine"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "two").exists()
    with pytest.raises(FileNotFoundError):
        cache.fetch(key, tmp_path / "nowhere" / "out", writes(b"engine"))
    assert not caplog.records


def test_a_cache_deleted_while_an_entry_is_made(tmp_path: Path) -> None:
    cache, key = ContentCache(tmp_path / "c"), key_of(x=1)

    def make(path: Path) -> None:
        shutil.rmtree(tmp_path / "c")
        path.write_bytes(b"engine")

    assert not cache.fetch(key, tmp_path / "one", make)
    assert cache.fetch(key, tmp_path / "two", writes(b"other"))
    assert (tmp_path / "two").read_bytes() == b"engine"


NOT_ROOT = (
    ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--securebits=+noroot"]
    if os.geteuid() == 0
    else []
)


@pytest.mark.parametrize("what", ["folder", "shard", "entry"])
def test_a_cache_that_may_not_be_read_or_written(tmp_path: Path, what: str) -> None:
    if NOT_ROOT and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere, and there is no setpriv")
    key = key_of(x=1)
    ContentCache(tmp_path / "c").fetch(key, tmp_path / "one", writes(b"engine"))
    forbidden = {
        "folder": tmp_path / "c",
        "shard": tmp_path / "c" / key[:2],
        "entry": tmp_path / "c" / key[:2] / key,
    }[what]
    code = (
        "import sys, pathlib\nfrom trimode.compiler.store.cache import ContentCache\n"
        "cache = ContentCache(pathlib.Path(sys.argv[1]))\n"
        "cache.fetch(sys.argv[2], pathlib.Path(sys.argv[3]), lambda path: "
        "path.write_bytes(b'engine') and None)\ncache.prune()\n"
    )
    forbidden.chmod(0)
    try:
        arguments = [
            *NOT_ROOT,
            sys.executable,
            "-c",
            code,
            str(tmp_path / "c"),
            key,
            str(tmp_path / "two"),
        ]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    finally:
        forbidden.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two").read_bytes() == b"engine"
    assert done.stderr.count("\n") == 1
    assert "Permission denied" in done.stderr


def trimode(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*NOT_ROOT, sys.executable, "-m", "trimode.cli.main", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_only_the_command_of_the_cache_fails_on_it(tmp_path: Path) -> None:
    if NOT_ROOT and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere, and there is no setpriv")
    (tmp_path / "file").touch()
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    ContentCache(tmp_path / "kept").fetch(key_of(x=1), tmp_path / "one", writes(b"engine"))
    shard = tmp_path / "kept" / key_of(x=1)[:2]
    shard.chmod(0o555)
    for folder, options in (
        (tmp_path / "file", []),
        (locked, []),
        (tmp_path / "kept", ["--clear"]),
    ):
        done = trimode("cache", *options, TRIMODE_CACHE=str(folder))
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert f"error: {folder}" in done.stderr
        assert "TRIMODE_CACHE" in done.stderr
    shard.chmod(0o755)


def test_a_build_without_a_home_or_a_place_for_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path / "ck", config_of(num_hidden_layers=1), rank=2)
    (tmp_path / "file").touch()
    done = trimode(
        "build", checkpoint, "-o", tmp_path / "one", TRIMODE_CACHE=str(tmp_path / "file")
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be used") == 1

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TRIMODE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert usual_folder() is None

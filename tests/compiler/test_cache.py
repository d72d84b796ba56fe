"""The cache: makes once, checks what it hands out, survives interruption, and forgets the oldest first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trimode.compiler.cache import ContentCache, key_of


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
    {"flip": lambda: entry.write_bytes(b"enginE"), "truncate": lambda: entry.write_bytes(b""), "no digest": entry.with_name(key + ".sha256").unlink}[
        harm
    ]()
    assert not cache.fetch(key, tmp_path / "two", writes(b"engine"))
    assert (tmp_path / "two").read_bytes() == b"engine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_failing_to_make_leaves_nothing(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
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
        "import sys, pathlib\nfrom trimode.compiler.cache import ContentCache\n"
        "def make(p):\n    p.write_bytes(b'half'); print('in', flush=True); sys.stdin.read()\n"
        "ContentCache(pathlib.Path(sys.argv[1])).fetch(sys.argv[2], pathlib.Path(sys.argv[3]), make)\n"
    )
    victim = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c"), key, str(tmp_path / "x")], stdin=-1, stdout=-1)
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
        "import sys, pathlib, time\nfrom trimode.compiler.cache import ContentCache\n"
        "def make(p):\n    print('made', flush=True); time.sleep(0.5); p.write_bytes(b'engine')\n"
        "ContentCache(pathlib.Path(sys.argv[1])).fetch(sys.argv[2], pathlib.Path(sys.argv[3]), make)\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c"), key, str(tmp_path / f"out{i}")], stdout=-1, text=True) for i in range(3)
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
        code = "import sys, pathlib\nfrom trimode.compiler.cache import ContentCache\nprint(ContentCache(pathlib.Path(sys.argv[1]), 0).prune())"
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, check=True).stdout == "0\n"

    cache.fetch(key, tmp_path / "out", make)
    assert (tmp_path / "out").read_bytes() == b"engine"

"""``trimode bench`` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import trimode
from conftest import Built


def test_timings_are_printed_written_and_kept(
    built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path / "cache"))
    bundle, file = built("three_kv_heads").bundle, tmp_path / "table.json"
    options = ("--rows", "1,4,8", "--past", "10,300", "--repeats", 2, "--threads", 1)
    done = trimode("bench", bundle, *options, "-o", file, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads(file.read_text())
    (kept,) = (tmp_path / "cache" / "timings").iterdir()
    assert printed == json.loads(kept.read_text())
    assert str(kept) in done.stderr
    assert (printed["subject"]["target"], printed["subject"]["num_threads"]) == ("cpu", 1)
    assert len(printed["forwards"]) == 2 * (3 + 2 + 2 + 2)
    shown = trimode("bench", bundle, *options, "--batch", "3")
    for text in ("draft with the drafter", "10 cached", "300 cached", "verify", "sequences"):
        assert text in shown.stdout
    # measured anew
    assert {one["batch"] for one in json.loads(kept.read_text())["forwards"]} == {1, 3}


def test_auto_runs_by_the_table(
    built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path / "cache"))
    it, file, prompts = built("three_kv_heads"), tmp_path / "table.json", tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"token_ids": [20, 30, {n}]}}\n' for n in range(40, 48)))
    done = trimode(
        "bench",
        it.bundle,
        "--rows",
        "1,4,8",
        "--past",
        9,
        "--repeats",
        1,
        "--prompts-file",
        prompts,
        "-o",
        file,
        "--threads",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert "without the drafter (8 prompts, 1 beginnings that several share)" in done.stdout
    records = json.loads(file.read_text())["acceptance"]
    assert [one["drafter"] for one in records] == [False, True]
    assert [
        (kind["num_tokens"], kind["num_prompts"], len(kind["tried"]))
        for one in records
        for kind in one["kinds"]
    ] == [(2, 8, 7)] * 2
    command = (
        "run",
        it.bundle,
        "--mode",
        "auto",
        "--token-ids",
        "20,21",
        "--max-new-tokens",
        9,
        "--threads",
        1,
    )
    expected = it.model.ar_generate([[20, 21]], max_new_tokens=9)[0][0, 2:].tolist()
    for options in ((), ("--timings", file)):
        done = trimode(*command, "--json", *options)
        record = json.loads(done.stdout)
        assert (record["mode"], record["token_ids"]) == ("auto", expected)
        assert set(record["picks"]) <= {"1", "4", "8"}
        assert "no timings" not in done.stderr
    assert "steps " in trimode(*command).stderr
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path / "empty"))
    assert "no timings" in trimode(*command).stderr
    wrong = trimode("run", it.bundle, "--token-ids", "20", "--timings", file)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--mode auto" in wrong.stderr


BAD = {
    "no bundle": (["nowhere"], 1, "expected a bundle"),
    "rows": (["BUNDLE", "--rows", "65"], 2, "--rows from 1 to 64"),
    "words": (["BUNDLE", "--rows", "many"], 2, "whole numbers"),
    "past": (["BUNDLE", "--past", "1024"], 2, "--past from 1 to"),
    "batch": (["BUNDLE", "--batch", "2,0"], 2, "--batch of at least 1, found 0"),
    "repeats": (["BUNDLE", "--repeats", "0"], 2, "--repeats"),
    "a folder to write": (["BUNDLE", "-o", "FOLDER"], 2, "expected a file to write"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(built: Callable[[str], Built], tmp_path: Path, case: str) -> None:
    args, code, message = BAD[case]
    places = {"BUNDLE": built("three_kv_heads").bundle, "FOLDER": tmp_path}
    done = trimode("bench", *(places.get(a, a) for a in args))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr

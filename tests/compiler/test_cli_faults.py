"""What goes wrong around a command: streams, files, arguments, memory. Always one line, a hint and
an exit code, never a traceback.
"""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
from conftest import Built

from trimode.cli.boundary import as_error, run_guarded
from trimode.cli.output import print_json
from trimode.errors import DeviceError, UsageError

CLI = (sys.executable, "-m", "trimode.cli.main")
DROP = (
    ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--securebits=+noroot")
    if os.geteuid() == 0
    else ()
)
"""What root has to give up to be refused a file."""


def trimode(*args: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return commands.trimode(*args, env=changes)


def shell(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    """The command ``"$@"`` is part of the script."""
    command = ["bash", "-c", script, "bash", *CLI, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def assert_clean(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    for word in words:
        assert word in done.stderr
    if words:
        assert "hint:" in done.stderr


def guarded(command: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and messages of a command in this process."""
    messages = io.StringIO()
    monkeypatch.setattr("trimode.cli.boundary._prepare_streams", lambda: None)
    monkeypatch.setattr(sys, "stderr", messages)
    with pytest.raises(SystemExit) as left:
        run_guarded(command)
    assert isinstance(left.value.code, int)
    return left.value.code, messages.getvalue()


def raising(error: BaseException) -> Callable[[], object]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            ["/x/y: No space left", "free some space"],
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            1,
            ["/x/y: Permission denied", "permissions"],
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a", None, "b"),
            1,
            ["a -> b: No such file", "path"],
        ),
        (OSError(errno.EMFILE, "Too many open files"), 1, ["Too many open files", "ulimit"]),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", b"\xff"),
            1,
            ["File name too long", "shorter"],
        ),
        (
            OSError("a library's own words\nand more"),
            1,
            ["a library's own words", "TRIMODE_TRACEBACK"],
        ),
        (MemoryError(), 1, ["memory"]),
        (RecursionError("maximum recursion depth"), 1, ["nested too deep"]),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), 1, ["surrogates"]),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, ["the package x"]),
        (
            ZeroDivisionError("division by zero"),
            1,
            ["internal: ZeroDivisionError: division by zero", "TRIMODE_TRACEBACK=1"],
        ),
        (BaseException("a panic"), 1, ["internal: BaseException: a panic"]),
        (
            UsageError("expected a, found b\udcff", "do c"),
            2,
            ["error: expected a, found b\\udcff", "hint: do c"],
        ),
        (DeviceError("expected a GPU", ""), 1, ["error: expected a GPU"]),
    ],
)
def test_every_exception_ends_in_a_line_and_a_hint(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: list[str]
) -> None:
    found, messages = guarded(raising(error), monkeypatch)
    assert found == code
    assert messages.startswith("error: ")
    assert "Traceback" not in messages
    for word in words:
        assert word in messages


def test_endings_that_are_no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for ending, code in (
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 1),
        (SystemExit(3), 3),
        (SystemExit(), 0),
        (SystemExit("no"), 1),
    ):
        assert guarded(raising(ending), monkeypatch) == (code, "")
    assert guarded(lambda: None, monkeypatch) == (0, "")


def test_a_traceback_for_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMODE_TRACEBACK", "1")
    assert "Traceback" in guarded(raising(KeyError("a")), monkeypatch)[1]


def test_a_closed_stderr_hides_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr("trimode.cli.boundary._prepare_streams", lambda: None)
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(SystemExit) as left:
            run_guarded(raising(UsageError("a", "b")))
        assert left.value.code == 2


def test_unknown_errors_have_a_hint() -> None:
    assert as_error(OSError(12345, "strange")).hint


@pytest.mark.parametrize(
    "command", [["targets"], ["targets", "--json"], ["--help"], ["run", "--help"], ["--version"]]
)
def test_stdout_that_cannot_be_written(command: list[str]) -> None:
    assert_clean(shell('"$@" > /dev/full', *command), 1, "No space left on device")
    assert_clean(shell('"$@" >&-', *command), 1, "Bad file descriptor")
    assert_clean(shell('"$@" >&- 2>&-', *command), 1)
    piped = shell('set -o pipefail; "$@" | true', *command)
    assert "Traceback" not in piped.stderr
    assert "Exception ignored" not in piped.stderr


def test_stderr_that_cannot_be_written(built: Callable[[str], Built]) -> None:
    command = ("run", built("plain").bundle, "--token-ids", "20,21", "--max-new-tokens", 2)
    expected = trimode(*command).stdout
    for where in ("2>&-", "2>/dev/full"):
        done = shell(f'"$@" {where}', *command)
        assert (done.returncode, done.stdout) == (0, expected)
        assert shell(f'"$@" {where}', "run", "nowhere", "--token-ids", "1").returncode == 1


def test_a_closed_stdin_and_no_stream_at_all(built: Callable[[str], Built]) -> None:
    command = ("run", built("plain").bundle, "--token-ids", "20,21", "--max-new-tokens", 2)
    assert shell('"$@" <&-', *command).stdout == trimode(*command).stdout
    assert shell('"$@" <&- >&- 2>&-', *command).returncode == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16", "cp1252"])
def test_json_is_json_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    value = {"text": 'ü€𝄞\u2028"\\\n', "half": "\ud83d", "number": float("nan")}
    print_json(value)
    text = raw.getvalue().decode(encoding)
    assert text.count("\n") == 1
    assert json.loads(text) == {"text": 'ü€𝄞\u2028"\\\n', "half": "\ufffd", "number": None}


def test_text_in_any_encoding(demo: Path) -> None:
    for encoding in ("ascii", "latin-1", "ascii:strict"):
        done = trimode(
            "run", demo, "--prompt", "ü€", "--max-new-tokens", 2, PYTHONIOENCODING=encoding
        )
        assert_clean(done, 0)
    assert_clean(trimode("targets", PYTHONIOENCODING="ascii"), 0)
    assert_clean(
        trimode("inspect", demo, LC_ALL="C", LANG="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"), 0
    )


@pytest.mark.parametrize("name", ["--prompt", "--stop", "--system"])
def test_arguments_that_are_not_utf8(demo: Path, name: str) -> None:
    given = (
        [name, b"bad \xff byte"]
        if name == "--prompt"
        else ["--prompt", "Add 1 and 2.", name, b"bad \xff byte"]
    )
    assert_clean(trimode("run", demo, *given), 2, name, "UTF-8")


@pytest.mark.parametrize(
    "args",
    [
        ["run", b"b\xff", "--token-ids", "1"],
        ["inspect", b"b\xff"],
        ["run", "BUNDLE", "--prompts-file", b"b\xff"],
        ["run", "BUNDLE", "--mode", b"b\xff"],
        ["run", "BUNDLE", "--token-ids", b"b\xff"],
        ["build", b"b\xff", "-o", "out"],
        ["b\udcff"],
        ["run", "BUNDLE", "--token-ids", "9" * 5000],
        ["run", "BUNDLE", "--token-ids", "9" * 4000],
        ["run", "n" * 300, "--token-ids", "1"],
        ["run", "BUNDLE", "--prompts-file", "n" * 300],
        ["run", "BUNDLE", "--token-ids", "1", "--precision", b"b\xff"],
        ["run", "BUNDLE", "--token-ids", "1", "--target", b"b\xff"],
    ],
)
def test_odd_arguments(
    built: Callable[[str], Built], tmp_path: Path, args: list[str | bytes]
) -> None:
    places = {"BUNDLE": str(built("plain").bundle), "out": str(tmp_path / "out")}
    done = trimode(*(places.get(arg, arg) if isinstance(arg, str) else arg for arg in args))
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "internal" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("batch", [1, 2])
def test_good_lines_are_answered_beside_bad_ones(
    built: Callable[[str], Built], tmp_path: Path, batch: int
) -> None:
    it, file = built("three_kv_heads"), tmp_path / "p.jsonl"
    lines = [
        '{"token_ids": [20, 21]}',
        "hello",
        "",
        '{"token_ids": [109]}',
        '{"token_ids": [30, 31, 32]}',
        '{"prompt": "no tokenizer here"}',
        json.dumps({"token_ids": [20] * 1024}),
        '{"token_ids": [40]}',
        "[" * 10**5,
    ]
    file.write_text("\n".join(lines))
    command = ("run", it.bundle, "--prompts-file", file, "--max-new-tokens", 9, "--batch", batch)
    done = trimode(*command, "--json")
    assert_clean(
        done,
        2,
        "p.jsonl, line 2: ",
        "p.jsonl, line 4: ",
        "p.jsonl, line 6: ",
        "p.jsonl, line 7: ",
        "p.jsonl, line 9: ",
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record.get("line") for record in records] == [None, 2, 4, None, 6, 7, None, 9]
    assert "found 109" in records[2]["error"]
    assert "found 1024" in records[5]["error"]
    for record, prompt in ((records[0], [20, 21]), (records[3], [30, 31, 32]), (records[6], [40])):
        assert (
            record["token_ids"]
            == it.model.ar_generate([prompt], max_new_tokens=9)[0][0, len(prompt) :].tolist()
        )
    shown = trimode(*command)
    assert shown.returncode == 2
    assert shown.stdout.splitlines() == [
        ",".join(map(str, records[number]["token_ids"])) for number in (0, 3, 6)
    ]


def test_wrong_options_are_not_taken_for_bad_lines(
    built: Callable[[str], Built], tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text('{"token_ids": [20, 21]}\n' * 3)
    for batch in (1, 2):
        done = trimode(
            "run",
            built("plain").bundle,
            "--prompts-file",
            tmp_path / "p.jsonl",
            "--temperature",
            -1,
            "--json",
            "--batch",
            batch,
        )
        assert_clean(done, 2, "temperature")
        assert done.stdout == ""
        assert "line" not in done.stderr


def test_measures_refuse_a_file_with_bad_lines_before_the_work(
    built: Callable[[str], Built], demo: Path, tmp_path: Path
) -> None:
    it, file = built("plain"), tmp_path / "p.jsonl"
    file.write_text('{"token_ids": [20]}\nx\n{"token_ids": [21]}\n{}\n')
    ids = tmp_path / "ids.jsonl"
    ids.write_text(
        '{"token_ids": [20]}\n\n{"token_ids": [500]}\n{"token_ids": [21]}\n{"token_ids": []}\n'
    )
    out = tmp_path / "out"
    commands: list[tuple[object, ...]] = [
        ("bench", it.bundle, "--prompts-file", "FILE", "-o", out),
        (
            "bench",
            it.bundle,
            "--speed-of-light",
            "--prompts-file",
            "FILE",
            "-o",
            out,
            "--no-figure",
        ),
        ("verify", it.bundle, "--against", it.checkpoint, "--prompts-file", "FILE"),
        ("calibrate", it.checkpoint, "--precision", "int8", "--data", "FILE", "-o", out),
        ("calibrate", "drafter", it.checkpoint, "--data", "FILE", "-o", out, "--rank", 2),
        ("calibrate", "sampler", it.checkpoint, "--data", "FILE", "-o", out),
        (
            "report",
            "quantization",
            it.checkpoint,
            "--calibration",
            "rtn-int8",
            "--data",
            "FILE",
            "-o",
            out,
            "--no-figure",
        ),
    ]
    for command in commands:
        done = trimode(*(file if word == "FILE" else word for word in command))
        assert_clean(done, 2, "p.jsonl, line 2: ", "; line 4: ")
        done = trimode(*(ids if word == "FILE" else word for word in command))
        assert_clean(done, 2, "ids.jsonl, line 3: ", "found 500", "; line 5: ")
        assert not out.exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions")
@pytest.mark.parametrize(
    "name", ["manifest.json", "weights.safetensors", "tokenizer.json", "ar.onnx"]
)
def test_a_file_of_the_bundle_that_may_not_be_read(demo: Path, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle"
    subprocess.run(["cp", "-r", str(demo), str(bundle)], check=True)
    (bundle / name).chmod(0)
    command = [*DROP, *CLI, "run", str(bundle), "--prompt", "Add 1 and 2.", "--max-new-tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_clean(done, 1, f"{name}: ", "Permission denied", "permissions")


BROKEN: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"a"',
    b"\xff\xfe\x00",
    b"[" * 10**5,
    b'{"a":' * 10**5,
    b'{"schema_version": ' + b"9" * 5000 + b"}",
    b'{"schema_version": "x"}',
    b'{"schema_version": NaN}',
    b'{"schema_version": true}',
    b'{"schema_version": 99}',
    b"\xef\xbb\xbf{}",
    b'{"schema_version": 5, "x": "\\ud83d"}',
    b"[]" * 3,
    bytes(100),
]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:24].decode("latin-1"))
def test_broken_records(built: Callable[[str], Built], tmp_path: Path, content: bytes) -> None:
    """In this process, with the exceptions that a command would end by."""
    from trimode.errors import BundleError, CheckpointError
    from trimode.formats.calibration import load_calibration
    from trimode.formats.sampler import load_sampler_record
    from trimode.formats.verification import read_verifications
    from trimode.runtime.auto.timings import read_timings
    from trimode.runtime.bundle.open import read_manifest

    for name, kind, read in (
        ("manifest.json", BundleError, read_manifest),
        ("calibration.json", CheckpointError, load_calibration),
        ("sampler.json", CheckpointError, load_sampler_record),
        ("timings.json", UsageError, lambda folder: read_timings(folder / "timings.json")),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(kind) as raised:
            read(tmp_path)
        assert str(tmp_path) in raised.value.message
        assert "\n" not in raised.value.message
        assert raised.value.hint
    (tmp_path / "verification.json").write_bytes(content)
    assert read_verifications(tmp_path).verifications == ()


def test_folders_in_the_place_of_records(tmp_path: Path) -> None:
    from trimode.errors import TrimodeError
    from trimode.formats.calibration import load_record
    from trimode.formats.sampler import load_sampler_record
    from trimode.runtime.auto.timings import read_timings
    from trimode.runtime.bundle.open import read_manifest

    for name in ("manifest.json", "calibration.json", "sampler.json", "timings.json"):
        (tmp_path / name).mkdir()
    for read in (
        read_manifest,
        load_record,
        load_sampler_record,
        lambda folder: read_timings(folder / "timings.json"),
    ):
        with pytest.raises(TrimodeError, match="directory"):
            read(tmp_path)

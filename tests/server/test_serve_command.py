"""`trimode serve` as a user starts it: options, signals, a kill and a new start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from trimode.errors import UsageError
from trimode.server.limits import Limits
from trimode.server.options import ServeOptions, read_options

BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Add: 1 + 2 ="}],
    "temperature": 0,
    "ignore_eos": True,
    "mode": "ar",
}


class Command:
    """A server in a process of its own."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trimode.cli.main", "serve", *words],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []

    def address(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving on (\S+)", line):
                return found[1]
        raise AssertionError("".join(self.lines))

    def end(self) -> tuple[int, str]:
        _, rest = self.process.communicate(timeout=30)
        return self.process.returncode, "".join(self.lines) + rest


@contextmanager
def started(*words: str) -> Iterator[tuple[Command, str]]:
    command = Command(*words)
    try:
        yield command, command.address()
    finally:
        command.process.kill()
        command.process.communicate()


def ask_aside(address: str, count: int, tokens: int) -> tuple[list[Any], list[threading.Thread]]:
    """Ask from so many threads at once; answers come into the list."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            with httpx.stream(
                "POST",
                f"{address}/v1/chat/completions",
                json=BODY | {"stream": True, "max_tokens": tokens},
                timeout=60,
            ) as answer:
                answers.append((answer.status_code, "".join(answer.iter_text())))
        except httpx.HTTPError as error:
            answers.append((0, repr(error)))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    return answers, threads


def wait_until_running(address: str, count: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        shown = httpx.get(f"{address}/metrics").text
        found = re.search(r"^vllm:num_requests_running\S* (\d+)", shown, re.MULTILINE)
        if found and int(found[1]) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("they never ran")


def test_sigterm_under_load_finishes_what_runs_and_refuses_the_rest(demo: Path) -> None:
    with started(str(demo), "--port", "0", "--max-rows", "2", "--threads", "1") as (cmd, address):
        answers, threads = ask_aside(address, 4, tokens=400)  # two run, two wait
        wait_until_running(address, 2)
        cmd.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        refused = httpx.post(f"{address}/v1/chat/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        assert httpx.get(f"{address}/ready").status_code == 503
        assert httpx.get(f"{address}/health").status_code == 200
        for thread in threads:
            thread.join()
        code, _ = cmd.end()
    assert code == 0
    assert [status for status, _ in answers] == [200] * 4
    for _, text in answers:
        assert '"finish_reason":"length"' in text
        assert text.endswith("data: [DONE]\n\n")


def test_what_outlasts_the_limit_is_told_so(demo: Path) -> None:
    words = (str(demo), "--port", "0", "--threads", "1", "--drain-timeout", "0.2")
    with started(*words) as (cmd, address):
        answers, threads = ask_aside(address, 1, tokens=1900)
        wait_until_running(address, 1)
        cmd.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        code, _ = cmd.end()
    assert code == 0
    ((status, text),) = answers
    assert status == 200
    assert '"code":"cancelled"' in text
    assert text.endswith("data: [DONE]\n\n")


def test_a_second_signal_stops_at_once_and_a_kill_leaves_nothing_behind(demo: Path) -> None:
    with started(str(demo), "--port", "0", "--threads", "1") as (cmd, address):
        _, threads = ask_aside(address, 2, tokens=1900)
        wait_until_running(address, 2)
        cmd.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        began = time.monotonic()
        cmd.process.send_signal(signal.SIGTERM)
        cmd.end()
        assert time.monotonic() - began < 10
        for thread in threads:
            thread.join()
    port = address.rpartition(":")[2]
    with started(str(demo), "--port", port, "--threads", "1") as (cmd, address):
        answers, threads = ask_aside(address, 1, tokens=1900)
        wait_until_running(address, 1)
        cmd.process.kill()
        for thread in threads:
            thread.join()
        assert "[DONE]" not in answers[0][1]
        cmd.end()
    with started(str(demo), "--port", port, "--threads", "1") as (_, address):
        answers, threads = ask_aside(address, 1, tokens=5)
        threads[0].join()
        assert answers[0][1].endswith("data: [DONE]\n\n")


def test_a_file_has_the_options_names(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 9\nmax-rows = 3\nmode = "linear-spec"\n[limits]\nmax_n = 2\n')
    found = read_options(file, {"port": 10})
    assert found == ServeOptions(port=10, max_rows=3, mode="linear_spec", limits=Limits(max_n=2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = 1\nprot = 2\n", "line 2: expected an option of the server, found 'prot'"),
        ("[limits]\n\nmax_m = 2\n", "line 3: expected an option of the server, found 'max_m'"),
        ('\nport = "80"\n', "line 2: expected port to be a whole number, found '80'"),
        ("watch = 1\n", "line 1: expected watch to be true or false, found 1"),
        ('mode = "fast"\n', "line 1: expected mode to be one of"),
        ("limits = 3\n", "line 1: expected limits to be a table, found 3"),
        ("port = \n", "expected a TOML file"),
        ("port = 70000\n", "expected `port` from 0 to 65535, found 70000"),
        ("drain_timeout = nan\n", "expected `drain_timeout` from 0 to 86400 seconds, found nan"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_options(file, {})
    assert words in caught.value.message


def test_a_taken_port_is_said_in_one_line(demo: Path) -> None:
    with started(str(demo), "--port", "0", "--threads", "1") as (_, address):
        port = address.rpartition(":")[2]
        code, errors = Command(str(demo), "--port", port, "--threads", "1").end()
    assert code == 2
    assert "Traceback" not in errors
    assert "Address already in use" in errors
    assert "--port" in errors


def test_without_the_extra_the_command_says_how_to_install_it(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'uvicorn' else found(name, *a)\n"
        "sys.argv = ['trimode', 'serve', 'x']\n"
        "from trimode.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected uvicorn for a server, found not installed" in done.stderr
    assert "pip install 'trimode[serve]'" in done.stderr

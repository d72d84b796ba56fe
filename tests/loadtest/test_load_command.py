"""``trimode bench serve`` and ``trimode report serve`` as a user meets them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from stub_server import Stub, running, script
from typer.testing import CliRunner

from trimode.cli.groups import _separated, _with_limits_joined
from trimode.cli.main import app
from trimode.errors import TrimodeError
from trimode.formats.load import read_requests, read_result
from trimode.report.load_page import load_page
from trimode.report.pareto_figure import Line, Point, nice_step, pareto_svg

MAIN = (sys.executable, "-m", "trimode.cli.main")


def trimode(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MAIN, *map(str, args)], capture_output=True, text=True, check=False)


def data_of(folder: Path, count: int = 4) -> Path:
    told = {"num_spec_steps": 2, "num_draft_tokens": 10, "num_accepted_draft_tokens": 5}
    told |= {"mean_acceptance_length": 3.5, "draft_acceptance_rate": 0.5}  # type: ignore[dict-item]
    path = folder / "set.jsonl"
    lines = [
        {
            "question_id": n,
            "category": "<b>&math" if n % 2 else "sql",
            "turns": [script((0.01, f"<i>{n}"), (0.01, "b"), tokens=7, speculation=told)] * 2,
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Page(HTMLParser):
    """Collects what a page loads and holds."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_load_test_is_printed_and_written(tmp_path: Path) -> None:
    folder, data = tmp_path / "out", data_of(tmp_path)
    with running() as stub:
        done = trimode(
            *("bench", "--concurrency", "1,2", "--serve", stub.url, "--data", data, "--check"),
            *("--modes", "ar,linear-spec", "--num-prompts", 4, "--shared-prefix", 5, "-o", folder),
            *("--goodput", "ttft:5000", "tpot:5000"),
        )
        assert done.returncode == 0, done.stderr
        system = stub.served[0].body["messages"][0]
    assert (system["role"], len(system["content"].split())) == ("system", 5)
    result, requests = read_result(folder), list(read_requests(folder))
    assert [(one.mode, one.max_concurrency) for one in result.runs] == [
        *(("ar", 1), ("ar", 2), ("linear-spec", 1), ("linear-spec", 2))
    ]
    assert result.workload.goodput_ms == {"ttft": 5000, "tpot": 5000}
    assert all(run.request_goodput == run.request_throughput for run in result.runs)
    assert result.check is not None
    assert (result.check.compared, result.check.differing) == (32, 0)
    assert len(requests) == 32
    for index, run in enumerate(result.runs):
        mine = [one for one in requests if one.run == index]
        assert (run.completed, run.total_output_tokens) == (len(mine), 7 * len(mine))
        assert run.acceptance_by_category["sql"].num_spec_steps == 8
        assert run.acceptance_by_category["sql"].mean_acceptance_length == 3.5
    assert (result.partial, result.server.model) == (False, "stub")
    assert result.machine["cores"]
    for text in ("linear-spec", "TPOT ms", "acceptance by category", "All 32 greedy answers equal"):
        assert text in done.stdout
    assert {one.name for one in folder.iterdir()} == {
        *("result.json", "requests.jsonl", "report.html")
    }


def test_the_page_is_one_file_and_escapes_what_others_wrote(tmp_path: Path) -> None:
    folder, data = tmp_path / "out", data_of(tmp_path)
    with running() as stub:
        trimode("bench", "serve", stub.url, "--data", data, "--num-prompts", 4, "-o", folder)
    source = (folder / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert page.links == []
    assert not {"script", "img", "link", "iframe", "b", "i"} & set(page.tags)
    assert "url(" not in source
    assert "default-src 'none'" in source
    assert "<b>&math" in page.text  # as text
    assert re.search(r"set\.jsonl: 4 conversations, 8 turns", page.text)
    assert "1 client" in page.text


def test_answers_that_differ_fail_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as stub:

        def counted(body: dict[str, object]) -> dict[str, object]:
            return {"chunks": [[0, f"<u>{len(stub.served)}"]], "tokens": 1}

        monkeypatch.setattr("stub_server.script_of", counted)
        folder, data = tmp_path / "out", data_of(tmp_path, 1)
        done = trimode("bench", "serve", stub.url, "--data", data, "--check", "-o", folder)
    assert done.returncode == 1
    assert "FAILED: 200 of 200 greedy answers differ" in done.stderr
    assert "expected '<u>2 (1 tokens, stop)', found '<u>4" in done.stderr
    page = Page()
    page.feed((folder / "report.html").read_text())
    assert "200 of 200 greedy answers differ" in " ".join(page.text.split())
    assert "u" not in page.tags


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    folder, data = tmp_path / "out", data_of(tmp_path)
    with running() as stub:
        command = [*MAIN, "bench", "serve", stub.url, "--data", str(data), "--duration", "60"]
        process = subprocess.Popen(
            [*command, "--concurrency", "2", "-o", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell in the background lets its jobs ignore the signal
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            _wait_for(stub, 20)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    result = read_result(folder)
    assert result.partial
    assert result.runs[0].partial
    assert 10 < result.runs[0].completed <= len(stub.served)
    assert "Traceback" not in errors
    assert "(interrupted)" in (folder / "report.html").read_text()


def _wait_for(stub: Stub, count: int) -> None:
    end = time.monotonic() + 30
    while len(stub.served) < count:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_load_tests_are_compared(tmp_path: Path) -> None:
    data, page = data_of(tmp_path), tmp_path / "page.html"
    with running() as stub:
        for name, modes in (("first", "ar,linear-spec"), ("second", "linear-spec")):
            options = ("--modes", modes, "--num-prompts", 2, "-o", tmp_path / name)
            assert trimode("bench", "serve", stub.url, "--data", data, *options).returncode == 0
    done = trimode("report", "serve", tmp_path / "first", tmp_path / "second", "-o", page)
    assert done.returncode == 0, done.stderr
    first, second = (read_result(tmp_path / name) for name in ("first", "second"))
    ratio = second.runs[0].output_throughput / first.runs[1].output_throughput
    assert "times the figure of first" in done.stdout
    assert f"{ratio:.2f}" in done.stdout
    html = page.read_text()
    assert "first: linear-spec" in html
    assert "second: linear-spec" in html
    printed = json.loads(trimode("report", "serve", tmp_path / "first", "--json").stdout)
    assert list(printed) == ["first"]
    gone = trimode("report", "serve", tmp_path)
    assert gone.returncode == 2
    assert "expected the result of a load test" in gone.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--concurrency", "1", "--rate", "2"), "expected --concurrency or --rate, found both"),
        (("--burstiness", "2"), "expected --burstiness together with --rate"),
        (("--goodput", "itl:3"), "expected --goodput like ttft:500"),
        (("--duration", "5", "--num-prompts", "5"), "expected --duration or --num-prompts"),
        (("--random-input-len", "5"), "expected --data or --random-input-len, found both"),
        (("--max-new-tokens", "0"), "expected --max-new-tokens of at least 1"),
        (("--concurrency", "x"), "expected whole numbers like 1,2,3"),
        (("--check", "--temperature", "1"), "expected --check with greedy answers"),
        ((), "expected a server at http://127.0.0.1:9, found"),
    ],
)
def test_bad_options_are_refused_by_their_flags(
    tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    words = ["bench", "serve", "http://127.0.0.1:9", "--data", str(data_of(tmp_path)), *args]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, TrimodeError)
    assert message in error.message


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    data = data_of(tmp_path)
    words = ["bench", "serve", "http://127.0.0.1:9", "--data", str(data), "-o", str(tmp_path)]
    error = CliRunner().invoke(app, words).exception
    assert "expected a new or empty folder, or a load test to replace" in str(error)
    assert data.is_file()


def test_words_of_the_command_line() -> None:
    assert list(_separated(["--serve=http://a", "--rate=2"])) == ["--serve", "http://a", "--rate=2"]
    joined = _with_limits_joined(["--goodput", "ttft:5", "tpot:6", "http://a:80", "e2el:7"])
    assert joined == ["--goodput", "ttft:5 tpot:6", "http://a:80", "e2el:7"]
    assert _with_limits_joined(["--goodput", "nonsense"]) == ["--goodput", "nonsense"]
    assert _with_limits_joined(["--goodput"]) == ["--goodput"]


def test_points_of_the_figure_are_where_their_values_are() -> None:
    lines = [
        Line("a<b", [Point(50, 400, "4"), Point(100, 100, "1")]),
        Line("c", [Point(20, 500, "9")]),
    ]
    svg = ET.fromstring(pareto_svg(lines))
    first, second = (one.get("points", "") for one in svg.iter("polyline"))
    (b, a), ((c, d),) = (
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in (first, second)
    )
    # axes begin at (70, 368) and are 500 and 348 long, to 100 and 500
    assert a == pytest.approx((70 + 500, 368 - 348 * 100 / 500), abs=0.06)
    assert b == pytest.approx((70 + 250, 368 - 348 * 400 / 500), abs=0.06)
    assert (c, d) == pytest.approx((70 + 100, 20), abs=0.06)
    assert "a<b" in [one.text for one in svg.iter("text")]
    assert list(ET.fromstring(pareto_svg([])).iter("polyline")) == []


@pytest.mark.parametrize("most", [0.003, 0.9, 1, 7, 10, 99.9, 1234, 5e6])
def test_ticks_are_round(most: float) -> None:
    step = nice_step(most)
    assert step * 5 >= most * (1 - 1e-9) > step * 1.6
    assert float(f"{step:.1e}") == pytest.approx(step)


def test_pages_of_nothing(tmp_path: Path) -> None:
    with running() as stub:
        data = data_of(tmp_path)
        out = tmp_path / "out"
        trimode("bench", "serve", stub.url, "--data", data, "--num-prompts", 1, "-o", out)
    result = read_result(out)
    empty = result.model_copy(update={"runs": (), "check": None})
    assert "<svg" in load_page([("x", empty)])

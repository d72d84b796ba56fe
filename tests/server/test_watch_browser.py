"""The page in headless Chromium, against a server on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import serving
from typer.testing import CliRunner

from trimode import Engine, TriModeModel
from trimode.cli.main import app
from trimode.formats.trace import read_trace
from trimode.server.auth import ApiKeys
from trimode.server.service import Service
from trimode.server.watch.router import OPEN_PATHS, watch_router

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
MODES = ("ar", "diffusion", "linear_spec")
HOSTILE = '<script>window.hacked=1</script><img src=x onerror="window.hacked=2">'
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def engine(demo_model: TriModeModel) -> Iterator[Engine]:
    with Engine(demo_model, max_rows=4, max_queue=64) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    service = Service(engine, "demo")
    with serving(service, routers=[watch_router(service)], open_paths=OPEN_PATHS) as found:
        yield found


@pytest.fixture
def watch(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page; afterwards nothing may have failed, or left the origin."""
    contexts, urls, faults = [], [], []

    def opened(at: str = address, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: urls.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: line.type == "error" and faults.append(line.text))
        page.goto(f"{at}/watch")
        page.locator("#model", has_text="demo").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults
    assert {url.split("/watch", 1)[0] for url in urls} == {address}


def decode(page: Any, prompt: str | None = None) -> None:
    if prompt is not None:
        page.fill("#prompt", prompt)
    page.click("#ask button")
    page.locator("#note", has_text="3 lanes decoded").wait_for()


def to_end(page: Any) -> None:
    page.locator("#play").focus()
    page.keyboard.press("End")


def texts(page: Any) -> list[str]:
    return [one.text_content() for one in page.locator(".text").all()]


def text_of_api(address: str, prompt: str, mode: str) -> str:
    body = {"messages": [{"role": "user", "content": prompt}], "mode": mode}
    limits = {"temperature": 0, "max_tokens": 96}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body | limits).json()
    return answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("together", [False, True])
def test_each_lane_has_the_text_of_the_api(
    watch: Callable[..., Any], address: str, together: bool
) -> None:
    page = watch()
    page.set_checked("#together", together)
    for prompt in ("SQL: name of books with price over 40, by year.", "Add 478 and 356."):
        decode(page, prompt)
        to_end(page)
        assert texts(page) == [text_of_api(address, prompt, mode) for mode in MODES]
        for mode, lane in zip(MODES, page.locator(".lane").all(), strict=True):
            tokens, forwards = (
                int(one.text_content().split("t")[0].split("f")[0])
                for one in lane.locator(".facts li").all()[:2]
            )
            assert lane.locator(".cell").count() == tokens + 1
            assert (tokens == forwards) == (mode == "ar")


def test_states_of_cells_follow_the_trace(watch: Callable[..., Any]) -> None:
    """Step by step, each lane has as many cells of a kind as its forward says."""
    page = watch()
    decode(page)
    page.select_option("#clock", "n")
    seen = set()
    for _ in range(9):
        page.keyboard.press("Escape")
        page.click("#next")
        lane = page.locator(".lane.linear_spec")
        says = lane.locator(".says").text_content()
        drafted, accepted = lane.locator(".drafted").count(), lane.locator(".accepted").count()
        rejected = lane.locator(".rejected").count()
        seen.add(says.split(":")[0])
        if says.startswith("draft: guesses"):
            assert f"guesses {drafted} token" in says
        elif says.startswith("verify"):
            assert f"{accepted} right, {rejected} wrong" in says
            assert not drafted
    assert seen == {"prefill", "draft", "verify"}
    assert page.locator(".lane.diffusion .masked").count() == 0
    assert page.locator(".lane.ar .committed").count() == 9


def test_hostile_prompts_and_tokens_stay_text(
    watch: Callable[..., Any], demo: Path, tmp_path: Path
) -> None:
    page = watch()
    decode(page, HOSTILE)
    lines = saved(demo, tmp_path, "diffusion").read_text(encoding="utf-8").splitlines()
    bad = [line.replace('"S"', json.dumps(HOSTILE)) for line in lines]
    assert bad != lines
    bad = [line.replace("nld-tiny", "<img src=y onerror=alert(1)>") for line in bad]
    (tmp_path / "bad.jsonl").write_text("\n".join(bad), encoding="utf-8")
    page.set_input_files("#file", tmp_path / "bad.jsonl")
    page.locator("#note", has_text="Replay of 1 run").wait_for()
    to_end(page)
    cell = page.locator(".cells .cell", has_text="<script>").first
    assert cell.text_content() == HOSTILE
    cell.hover()
    page.locator("#tip", has_text="<script>").wait_for()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert page.evaluate("window.hacked") is None


def saved(demo: Path, folder: Path, mode: str) -> Path:
    file = folder / f"{mode}.jsonl"
    arguments = ["run", str(demo), "--prompt", "SQL: name of books with price over 40, by year."]
    found = CliRunner().invoke(app, [*arguments, "--mode", mode, "--trace", str(file)])
    assert found.exit_code == 0, found.output
    return file


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear-spec", "auto"])
def test_a_saved_trace_replays_to_its_text(
    watch: Callable[..., Any], demo: Path, tmp_path: Path, mode: str
) -> None:
    page, file = watch(), saved(demo, tmp_path, mode)
    page.set_input_files("#file", file)
    page.locator("#note", has_text="Replay of 1 run").wait_for()
    to_end(page)
    assert texts(page) == [read_trace(file).runs[0].text]


def test_other_files_are_refused_and_change_nothing(
    watch: Callable[..., Any], tmp_path: Path
) -> None:
    page = watch()
    decode(page)
    to_end(page)
    before = texts(page)
    for text in ("", "{}", "no JSON", '{"kind":"header","schema_version":2}'):
        (tmp_path / "other").write_text(text, encoding="utf-8")
        page.set_input_files("#file", tmp_path / "other")
        page.locator("#note.bad", has_text="other: ").wait_for()
        assert texts(page) == before


def test_the_keyboard_does_all(watch: Callable[..., Any]) -> None:
    page = watch()
    page.locator("h1").click()
    page.keyboard.press("r")
    page.locator("#note", has_text="3 lanes decoded").wait_for()
    page.keyboard.press("Home")
    assert page.locator(".lane.ar .cell").count() == 1
    now = page.locator("#now").text_content
    page.keyboard.press("ArrowRight")
    first = now()
    page.keyboard.press("ArrowRight")
    assert now() != first
    page.keyboard.press("ArrowLeft")
    assert now() == first
    page.keyboard.press(" ")
    assert page.get_by_role("button", name="Pause").is_visible()
    page.keyboard.press(" ")
    assert page.get_by_role("button", name="Play").is_visible()
    page.keyboard.press("+")
    assert page.locator("#speed").text_content() == "2×"
    page.keyboard.press("-")
    page.keyboard.press("-")
    assert page.locator("#speed").text_content() == "1/2×"
    page.keyboard.press("End")
    page.locator(".lane.ar .cell").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("document.activeElement.ariaLabel")
    assert "committed, position" in focused
    assert page.locator("#tip div").count() == 5
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_words_and_shapes_stand_in_for_colour(watch: Callable[..., Any]) -> None:
    page = watch(forced_colors="active")
    decode(page)
    page.select_option("#clock", "n")
    for _ in range(2):
        page.click("#next")
    kinds = {}
    for kind in ("masked", "drafted", "filled.fresh"):
        cell = page.locator(f".lane .{kind}").first
        style = cell.evaluate("(node) => getComputedStyle(node).borderStyle")
        kinds[kind] = style, cell.get_attribute("aria-label").split(", ")[-2]
    assert kinds["masked"][0] == "dotted"
    assert kinds["drafted"][0] == "dashed"
    assert kinds["filled.fresh"][0] == "solid"
    assert {label.split()[-1] for _, label in kinds.values()} == {"masked", "drafted", "filled"}


def test_reduced_motion_plays_nothing_by_itself(watch: Callable[..., Any]) -> None:
    page = watch(reduced_motion="reduce")
    decode(page)
    assert page.get_by_role("button", name="Play").is_visible()
    before = page.locator("#now").text_content()
    page.wait_for_timeout(200)
    assert page.locator("#now").text_content() == before


def test_a_key_is_asked_for(browser: Any, engine: Engine) -> None:
    service = Service(engine, "demo", keys=ApiKeys(["secret"]))
    with serving(service, routers=[watch_router(service)], open_paths=OPEN_PATHS) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{address}/watch")
        page.locator("#key").wait_for(timeout=WAIT_MS)
        page.fill("#key", "secret")
        page.click("#ask button")
        page.locator("#note", has_text="3 lanes decoded").wait_for(timeout=WAIT_MS)
        assert not page.context.cookies()
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        context.close()


def test_several_viewers_for_some_seconds(watch: Callable[..., Any], engine: Engine) -> None:
    pages = [watch() for _ in range(4)]
    until = time.monotonic() + 5
    while time.monotonic() < until:
        for page in pages:
            page.evaluate("run()")
    for page in pages:
        decode(page)
        to_end(page)
    assert len({tuple(texts(page)) for page in pages}) == 1
    for page in pages:
        page.evaluate("stop()")
    while engine.stats().running:
        time.sleep(0.02)
    assert engine.error is None

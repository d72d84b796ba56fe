"""The page's routes: what they need, what they refuse, and that a trace is the API's own text."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import serving

import trimode.server.watch
from trimode import Engine, TriModeModel
from trimode.formats.trace import Trace, read_trace
from trimode.server.auth import ApiKeys
from trimode.server.options import ServeOptions
from trimode.server.service import Service
from trimode.server.start import further_routes
from trimode.server.watch.router import OPEN_PATHS, watch_router

STATIC = Path(trimode.server.watch.__file__).parent / "static"
PROMPT = "SQL: name of books with price over 40, by year."
MODES = ("ar", "diffusion", "linear-spec", "auto")


@pytest.fixture(scope="module")
def engine(demo_model: TriModeModel) -> Iterator[Engine]:
    with Engine(demo_model, max_rows=4, max_queue=64) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    service = Service(engine, "demo")
    with serving(service, routers=[watch_router(service)], open_paths=OPEN_PATHS) as found:
        yield found


def traced(address: str, path: Path, headers: dict[str, str] | None = None, **body: Any) -> Trace:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 96, **body}
    with httpx.stream("POST", f"{address}/watch/trace", json=body, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    path.write_text("\n".join(lines), encoding="utf-8")
    return read_trace(path)


@pytest.mark.parametrize("mode", MODES)
def test_a_trace_is_the_text_of_the_api(address: str, tmp_path: Path, mode: str) -> None:
    run = traced(address, tmp_path / "t", mode=mode).runs[0]
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_tokens": 96,
        "mode": mode,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{address}/v1/chat/completions", json=body).json()
    choice = answer["choices"][0]
    assert run.text == choice["message"]["content"]
    assert run.token_ids == choice["token_ids"]
    assert run.end is not None
    assert run.end.finish_reason == choice["finish_reason"]


def test_prefixes_are_shared_only_where_asked(address: str, tmp_path: Path) -> None:
    for reuse, is_shared in ((False, False), (True, False), (True, True)):
        body: dict[str, Any] = {"mode": "ar", "reuse": reuse, "cache_salt": "mine"}
        run = traced(address, tmp_path / "t", **body).runs[0]
        assert (run.forwards[0].past_length > 0) == is_shared


def test_what_is_not_shared_is_not_kept(address: str, engine: Engine, tmp_path: Path) -> None:
    before = kept(engine)
    traced(address, tmp_path / "t", mode="diffusion", prompt="Sort 45 23 11.")
    assert kept(engine) == before
    traced(address, tmp_path / "t", mode="diffusion", prompt="Sort 45 23 11.", reuse=True)
    assert kept(engine) > before


def kept(engine: Engine) -> int:
    """Tokens that are kept once all rows have been let go."""
    until = time.monotonic() + 10
    while engine.stats().running and time.monotonic() < until:
        time.sleep(0.02)
    return engine.stats().kept_tokens


@pytest.mark.parametrize("is_asked", [False, True])
def test_nothing_is_served_unless_asked(engine: Engine, is_asked: bool) -> None:
    service = Service(engine, "demo")
    routes = further_routes(service, [], ServeOptions(watch=is_asked))
    with serving(service, **routes) as address:
        for path in ("/watch", "/watch/watch.js", "/watch/engine"):
            assert httpx.get(address + path).status_code == (200 if is_asked else 404)
        answer = httpx.post(f"{address}/watch/trace", json={"prompt": "x", "max_tokens": 1})
        assert answer.status_code == (200 if is_asked else 404)


def test_files_are_small_and_of_one_origin(address: str) -> None:
    html = httpx.get(f"{address}/watch")
    names = ["watch.html", *re.findall(r'(?:href|src)="watch/([^"]+)"', html.text)]
    assert sorted(names) == sorted(path.name for path in STATIC.iterdir())
    assert sum(path.stat().st_size for path in STATIC.iterdir()) < 25 * 1024
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*// .*$| // .*$", "", text, flags=re.MULTILINE), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
        answer = httpx.get(f"{address}/watch/{path.name}") if path.name != "watch.html" else html
        assert answer.content == path.read_bytes()
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy


def test_keys_guard_the_engine_but_not_the_page(engine: Engine, tmp_path: Path) -> None:
    service = Service(engine, "demo", keys=ApiKeys(["secret"]))
    with serving(service, routers=[watch_router(service)], open_paths=OPEN_PATHS) as address:
        assert httpx.get(f"{address}/watch").status_code == 200
        assert httpx.get(f"{address}/watch/engine").status_code == 401
        assert httpx.post(f"{address}/watch/trace", json={"prompt": "x"}).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{address}/watch/engine", headers=key).status_code == 200
        assert traced(address, tmp_path / "t", headers=key, mode="ar").runs[0].text


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": ""}, 422, "prompt"),
        ({}, 422, "prompt"),
        ({"prompt": "x", "mode": "fast"}, 422, "mode"),
        ({"prompt": "x", "n": 2}, 400, "n"),
        ({"prompt": "x", "more": 1}, 422, "more"),
        ({"prompt": "x", "model": "other"}, 404, "model"),
        ({"prompt": "x", "max_tokens": 5000}, 400, None),
        ({"prompt": "1 " * 3000}, 400, None),
        ({"prompt": "\ud800"}, 400, None),
    ],
)
def test_refuses(address: str, body: dict[str, Any], status: int, param: str | None) -> None:
    answer = httpx.post(f"{address}/watch/trace", content=json.dumps(body))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"]
    assert error["param"] == param


def test_the_engine_tells_of_its_rows(address: str, engine: Engine) -> None:
    quiet = httpx.get(f"{address}/watch/engine").json()
    assert quiet["modes"] == ["ar", "diffusion", "linear_spec", "auto"]
    assert (quiet["running"], quiet["free_rows"], quiet["rows"]) == (0, 4, [])
    endless: dict[str, Any] = {"max_new_tokens": 900, "eos_token_ids": []}
    handle = engine.submit(list(range(12, 40)), mode="ar", **endless)
    next(iter(handle))
    row = httpx.get(f"{address}/watch/engine").json()["rows"][0]
    handle.cancel()
    assert (row["mode"], row["block_length"], row["prompt_tokens"]) == ("ar", 1, 28)
    assert 28 <= row["cached_tokens"] < row["tokens"] <= row["capacity"]


def test_a_viewer_that_leaves_frees_its_row(address: str, engine: Engine) -> None:
    body = {"prompt": PROMPT, "mode": "ar", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
    with httpx.stream("POST", f"{address}/watch/trace", json=body) as answer:
        next(answer.iter_lines())
    kept(engine)
    assert engine.stats().running == 0

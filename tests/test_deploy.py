"""What `deploy/` has: read as their programs read it, where these are installed."""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.requirements import Requirement
from prometheus_client.parser import text_string_to_metric_families as parse
from serving import serving

from trimode import Engine, TriModeModel
from trimode.server.metrics import Metrics
from trimode.server.records import make_record
from trimode.server.service import Service

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
HADOLINT, SYSTEMD = shutil.which("hadolint"), shutil.which("systemd-analyze")


def instructions() -> list[tuple[str, str]]:
    source = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in source.splitlines()]
    return [tuple(line.split(None, 1)) for line in lines if line and line[0] != "#"]  # type: ignore[misc]


def test_the_image_runs_as_nobody_and_is_watched() -> None:
    found = instructions()
    last = found[max(n for n, (word, _) in enumerate(found) if word == "FROM") :]
    words = dict(last)
    assert int(words["USER"]) > 0
    assert "/health" in words["HEALTHCHECK"]
    assert json.loads(words["ENTRYPOINT"]) == ["trimode", "serve"]
    assert words["STOPSIGNAL"] == "SIGTERM"
    assert "pip" not in " ".join(value for word, value in last if word == "RUN")


def test_the_image_gets_all_that_the_wheel_needs() -> None:
    """And the list of what is left out lets it through."""
    copied = [
        value.split()[:-1]
        for word, value in instructions()
        if word == "COPY" and "--from" not in value
    ]
    names = {name for words in copied for name in words}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {path.split("/")[0] for path in wheel["only-include"]} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in allowed if line.startswith("!")} == names
    assert "*" in allowed
    assert all((ROOT / name).exists() for name in names)


def test_the_image_has_no_torch() -> None:
    """All that its extras require, as installed here, and what that requires."""
    (extras,) = (value.split("=")[1] for word, value in instructions() if word == "ARG")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = settings["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)
    wanted = [*settings["dependencies"], *(one for e in extras.split(",") for one in known[e])]
    seen: set[str] = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = requirement.name.lower().replace("_", "-")
        environments = [{"extra": extra} for extra in (*requirement.extras, "")]
        marker = requirement.marker
        if name in seen or not (marker is None or any(map(marker.evaluate, environments))):
            continue
        seen.add(name)
        try:
            more = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted += [one for one in more if "extra ==" not in one]
    assert {"fastapi", "onnxruntime", "numpy", "starlette"} <= seen
    assert not seen & {"torch", "transformers", "onnx", "safetensors", "matplotlib"}


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint() -> None:
    assert HADOLINT is not None
    found = subprocess.run([HADOLINT, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def unit() -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "trimode.service")
    return parser["Service"]


def test_the_unit_gives_requests_time_to_end() -> None:
    service = unit()
    assert service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) > 30 + 5  # draining, then closing connections
    assert service["DynamicUser"] == "yes"
    assert service["Restart"] == "on-failure"


@pytest.mark.parametrize("file", ["trimode.service", "Dockerfile"])
def test_commands_have_options_that_there_are(file: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "trimode.cli.main", "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": "/usr/bin", "TERM": "dumb"},
    ).stdout
    words = unit()["ExecStart"] if file == "trimode.service" else dict(instructions())["CMD"]
    flags = re.findall(r"--[a-z-]+", words)
    assert flags
    assert [flag for flag in flags if flag not in shown] == []


@pytest.mark.skipif(SYSTEMD is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    assert SYSTEMD is not None
    source = (DEPLOY / "trimode.service").read_text()
    copy = tmp_path / "trimode.service"
    copy.write_text(source.replace("/opt/trimode/bin/trimode", sys.executable))
    found = subprocess.run([SYSTEMD, "verify", copy], capture_output=True, text=True)
    assert "trimode.service" not in found.stderr, found.stderr
    scored = subprocess.run(
        [SYSTEMD, "security", "--offline=yes", "--threshold=20", copy],
        capture_output=True,
        text=True,
    )
    assert scored.returncode == 0, scored.stdout[-300:]


def nginx_conf(folder: Path, port: int, server: str) -> Path:
    """The example on a free port without TLS, and with files in a folder."""
    source = (DEPLOY / "nginx.conf").read_text()
    assert "listen 443 ssl;" in source
    source = source.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    source = re.sub(r" *ssl_\w+ [^;]*;\n", "", source)
    source = source.replace("server 127.0.0.1:8000", f"server {server}")
    source = source.replace("/var/log/nginx/trimode.log", str(folder / "access.log"))
    assert "rate=20r/s" in source
    source = source.replace("rate=20r/s", "rate=1r/s")  # a slow machine never reaches 20
    paths = "".join(
        f"    {kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    source = source.replace("http {\n", "http {\n" + paths)
    path = folder / "nginx.conf"
    path.write_text(f"pid {folder}/pid;\nerror_log {folder}/error.log;\n{source}")
    return path


@contextmanager
def nginx(folder: Path, server: str) -> Iterator[str]:
    assert NGINX is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = nginx_conf(folder, port, server)
    words = [NGINX, "-c", str(config), "-e", str(folder / "start.log")]
    tested = subprocess.run([*words, "-t"], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stderr
    process = subprocess.Popen([*words, "-g", "daemon off;"])
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_events_pass_nginx_at_once(demo: Path, tmp_path: Path) -> None:
    """Piece by piece; a client that leaves frees its row; limits hold; the inside is hidden."""
    body: dict[str, Any] = {
        "prompt": "1 2 3",
        "max_tokens": 400,
        "ignore_eos": True,
        "mode": "ar",
        "stream": True,
        "return_token_ids": True,  # so that silent tokens are told, too
    }
    with (
        TriModeModel.from_pretrained(demo, num_threads=1) as model,
        Engine(model, max_rows=2) as engine,
        serving(Service(engine, "demo")) as inside,
        nginx(tmp_path, inside.removeprefix("http://")) as outside,
        httpx.Client(base_url=outside, timeout=60) as client,
    ):
        start, arrivals = time.monotonic(), list[tuple[float, bytes]]()
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            assert len(answer.headers["x-request-id"]) == 32
            arrivals += [(time.monotonic() - start, chunk) for chunk in answer.iter_raw()]
        assert arrivals[-1][1].endswith(b"data: [DONE]\n\n")
        assert len(arrivals) > 50
        assert arrivals[0][0] < arrivals[-1][0] / 4

        with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 1900}) as answer:
            next(answer.iter_raw())
        deadline = time.monotonic() + 5
        while engine.stats().running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stats().running == 0

        assert client.get("/ready").status_code == 200
        assert client.get("/metrics").status_code == 404
        assert client.get("/health").status_code == 404
        too_large = client.post("/v1/completions", content=b"x" * (5 << 20))
        assert too_large.status_code == 413
        codes = {client.get("/v1/models").status_code for _ in range(80)}
        assert codes == {200, 429}
    assert (tmp_path / "access.log").read_text()


@pytest.fixture
def shown(demo: Path) -> set[str]:
    """Names of what the exporter has after a text of each mode."""
    with TriModeModel.from_pretrained(demo, num_threads=1) as model, Engine(model) as engine:
        metrics = Metrics(engine.stats, "demo", 100, {"target": "cpu"})
        metrics.reject("draining")
        ids = model.codec.encode_chat([{"role": "user", "content": "Sort: 5 3 9 1"}])
        for mode in ("ar", "diffusion", "linear_spec"):
            handle = engine.submit(ids, mode=mode, max_new_tokens=30)
            handle.result()
            metrics.observe(make_record(handle, request_id="r", model="demo", mode=mode))
        families = list(parse(metrics.render().decode()))
    gauges = {family.name for family in families if family.type == "gauge"}  # of rows at work
    return gauges | {sample.name for family in families for sample in family.samples}


def test_each_query_of_the_dashboard_names_a_metric(shown: set[str]) -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    named = {
        name
        for query in queries
        for name in re.findall(r"\b(?:vllm:|trimode:|process_)[a-z0-9_]+", query)
    }
    assert len(queries) > 25
    assert named - shown == set()
    for query in queries:
        assert query.count("(") == query.count(")")
        for name in re.findall(r"rate\((\S+?)\{", query):
            assert name.endswith(("_total", "_bucket", "_sum", "_count")), query
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)

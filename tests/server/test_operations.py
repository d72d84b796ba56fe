"""What watches a server, as `trimode serve` puts it together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import serving

from trimode import Engine, TriModeModel
from trimode.errors import UsageError
from trimode.server.operations import operating
from trimode.server.options import ServeOptions
from trimode.server.service import Service

MARKER = "z3z3z3"
BODY = {"messages": [{"role": "user", "content": f"Reverse: {MARKER}"}], "max_tokens": 5}


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_commands_log(demo: Path, log_prompts: bool) -> None:
    words = [str(demo), "--port", "0", "--threads", "1", "--log-format", "json"]
    command = [sys.executable, "-m", "trimode.cli.main", "serve", *words]
    with subprocess.Popen(
        [*command, *["--log-prompts"] * log_prompts],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stderr is not None
        address = next(line.split()[-1] for line in process.stderr if line.startswith("serving on"))
        httpx.post(f"{address}/v1/chat/completions", json=BODY, headers={"X-Request-Id": "mine"})
        httpx.get(f"{address}/metrics")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    (request,) = (line for line in lines if line["message"] == "request")
    assert request["request_id"] == "mine"
    assert request["completion_tokens"] == 5
    assert any(line["message"].startswith("draining") for line in lines)
    assert (MARKER in log) == log_prompts


def test_parts_fit_together(demo_model: TriModeModel) -> None:
    with (
        Engine(demo_model, max_rows=2) as engine,
        operating(engine, "demo", ServeOptions()) as watching,
    ):
        service = Service(
            engine, "demo", observers=watching.observers, processors=watching.processors
        )
        parts = {"routers": watching.routers, "middleware": watching.middleware}
        with serving(service, **parts) as address:
            httpx.post(f"{address}/v1/chat/completions", json=BODY)
            httpx.post(f"{address}/v1/chat/completions", json=BODY | {"max_tokens": -1})
            answer = httpx.get(f"{address}/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'vllm:request_success_total{finished_reason="length",model_name="demo"} 1.0' in (
        answer.text
    )
    assert "vllm:admission_rejections_total{" in answer.text
    assert MARKER not in answer.text


def test_a_thinking_budget_needs_thinking(demo_model: TriModeModel) -> None:
    """Where the template closes the tag, nothing is forced into the answer."""
    with Engine(demo_model, max_rows=2) as engine, serving(Service(engine, "demo")) as address:

        def ask(**more: object) -> dict[str, str]:
            body = BODY | {"temperature": 0, "max_tokens": 12, "ignore_eos": True} | more
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
            message: dict[str, str] = answer["choices"][0]["message"]
            return message

        assert ask(max_thinking_tokens=3) == ask()
        kept = {
            "logit_bias": {"12": -100, "13": -100},
            "chat_template_kwargs": {"enable_thinking": True},
        }
        free, cut = ask(**kept), ask(**kept, max_thinking_tokens=4)
    assert free["content"] == ""
    assert len(free["reasoning_content"]) > len(cut["reasoning_content"]) > 0
    assert free["reasoning_content"].startswith(cut["reasoning_content"])
    assert cut["content"]


@pytest.mark.parametrize(
    ("name", "value"), [("log_format", "xml"), ("otlp_traces_endpoint", "localhost:4318")]
)
def test_options_are_checked(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):
        ServeOptions(**{name: value})  # type: ignore[arg-type]

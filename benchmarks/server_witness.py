"""The load test beside guidellm, against one server, at the same time.

    python -m venv /tmp/witness && /tmp/witness/bin/pip install guidellm
    python -m benchmarks.server_witness /tmp/witness/bin/guidellm [--rounds 4] [--clients 2]
    python -m benchmarks.server_witness /tmp/witness/bin/guidellm --scripted

Without `--scripted` the server is the demo's, in mode `ar`, and both play its 108 conversations of
one turn, greedily. With it the server is that of the tests, which sends scripted texts at scripted
times: a busy machine hardly changes these, so that only the tools' definitions can differ.

Both have the same number of clients, and run side by side, so that whatever else the machine does
slows both. Of ours, only requests count that were sent and answered while guidellm's were.
Conversations are compared one by one, by the mean of each tool, and what is reported is the median
of ours divided by theirs.

Names differ. guidellm's inter-token latency goes from the first to the last event with text, and
our TPOT to the last event of the stream; guidellm's TPOT divides the whole time by all tokens. Both
are computed here from our events, too. guidellm starts its clock when the headers leave; the load
test starts it, as vLLM does, before the client prepares them. Here both moments are noted, and the
verdict is on figures of one definition.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.common import save
from benchmarks.server_soak import ROOT, demo_server
from tests.stub_server import running, script
from trimode.formats.load import RequestRecord
from trimode.loadtest.bodies import Composer
from trimode.loadtest.client import Connections
from trimode.loadtest.figures import tpot_of
from trimode.loadtest.options import Load, Sampling, Server, Span
from trimode.loadtest.play import Played, Player, endless, run_loop
from trimode.loadtest.questions import read_questions
from trimode.loadtest.requests import request_record
from trimode.loadtest.window import Window

DATA = ROOT / "artifacts" / "speed-demo" / "single_turn.jsonl"
MODEL = "nld-tiny"
AGREEMENT = 0.05
LONGEST_S = 500.0
OWN = ("TTFT ms", "E2EL ms")
"""Figures by the load test's own clock; guidellm has none of this definition."""
FIGURES = (
    "TTFT from the headers, ms",
    "E2EL from the headers, ms",
    "first to last text, by token, ms",
    "whole time by all tokens, ms",
)
Sample = dict[str, float]
DISPATCHED: ContextVar[float] = ContextVar("DISPATCHED", default=0.0)
"""Time at which the headers of this task's last request left."""


class Turn(NamedTuple):
    """A turn of ours: when it was asked, when its headers left, by the wall clock."""

    sent: float
    dispatched: float
    played: Played


class Noting(Connections):
    """Notes when headers leave."""

    def _opened(self) -> httpx.AsyncClient:
        client = super()._opened()
        client.event_hooks = {"request": [follow]}
        return client


async def follow(request: httpx.Request) -> None:
    async def note(event: str, _: dict[str, Any]) -> None:
        if event == "http11.send_request_headers.started":
            DISPATCHED.set(time.time())

    request.extensions["trace"] = note


def our_sample(one: RequestRecord, late: float) -> Sample:
    """Return the figures; ``late`` is the time from asking to the headers' leaving."""
    last = (one.ttft or 0.0) + sum(one.itl)
    return {
        "TTFT from the headers, ms": 1000 * ((one.ttft or 0.0) - late),
        "E2EL from the headers, ms": 1000 * ((one.latency or 0.0) - late),
        "TTFT ms": 1000 * (one.ttft or 0.0),
        "E2EL ms": 1000 * (one.latency or 0.0),
        "first to last text, by token, ms": 1000 * sum(one.itl) / (one.output_tokens - 1),
        "whole time by all tokens, ms": 1000 * (last - late) / one.output_tokens,
        "TPOT ms": 1000 * (tpot_of(one) or 0.0),
        "tokens": one.output_tokens,
    }


def their_sample(one: dict[str, Any]) -> Sample:
    return {
        "TTFT from the headers, ms": one["time_to_first_token_ms"],
        "E2EL from the headers, ms": 1000 * one["request_latency"],
        "first to last text, by token, ms": one["inter_token_latency_ms"],
        "whole time by all tokens, ms": one["time_per_output_token_ms"],
        "tokens": one["output_tokens"],
    }


async def side_by_side(url: str, clients: int, data: Path, command: list[str]) -> list[Turn]:
    """Put our load on the server while guidellm runs; return our turns."""
    turns: list[Turn] = []
    offset = time.time() - time.perf_counter()
    questions = read_questions(data).questions
    async with Noting(Server(url, timeout=60)) as connections:
        player = Player(
            connections,
            url,
            Composer(MODEL, Sampling()),
            lambda one: turns.append(Turn(one.exchange.sent + offset, DISPATCHED.get(), one)),
        )
        window = Window(Span(duration=LONGEST_S))
        source, load = endless(questions, 1), Load(concurrency=clients)
        ours = asyncio.create_task(run_loop(player, source, window, load, seed=1))
        witness = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        said, _ = await asyncio.wait_for(witness.communicate(), LONGEST_S)
        ours.cancel()
        await asyncio.gather(ours, return_exceptions=True)
    if witness.returncode:
        raise RuntimeError(f"guidellm failed: {said.decode()[-2000:]}")
    return turns


def command_of(guidellm: str, url: str, clients: int, folder: Path) -> list[str]:
    prompts = folder / "prompts.jsonl"
    backend = {
        "kind": "openai_http",
        "target": url,
        "model": MODEL,
        "validate_backend": False,
        "max_tokens": 128,
        "extras": {"body": {"temperature": 0}},
    }
    options = (
        ("--backend", json.dumps(backend)),
        ("--profile", f"kind=concurrent,streams={clients}"),
        ("--constraint", f"kind=max_requests,count={len(prompts.read_text().splitlines())}"),
        ("--data", f"kind=json_file,path={prompts}"),
        ("--output", f"kind=json,path={folder / 'report.json'}"),
    )
    return [guidellm, "run", *(word for pair in options for word in pair), "--disable-console"]


def write_prompts(folder: Path, *, scripted: bool) -> None:
    """Write what both play: the demo's questions, or scripts of the tests' server."""
    lines = [json.loads(line) for line in DATA.read_text().splitlines()]
    prompts = [one["messages"][0]["content"] for one in lines]
    if scripted:
        starts = [0.2 + 0.002 * n for n in range(60)]
        prompts = [script((start, "a"), *[(0.05, "bc")] * 9, tokens=37) for start in starts]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": one}) + "\n" for one in prompts)
    )


def one_round(url: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = command_of(args.guidellm, url, args.clients, folder)
    turns = asyncio.run(side_by_side(url, args.clients, folder / "prompts.jsonl", command))
    (benchmark,) = json.loads((folder / "report.json").read_text())["benchmarks"]
    theirs = benchmark["requests"]["successful"]
    start = min(one["request_start_time"] for one in theirs)
    end = max(one["request_end_time"] for one in theirs)
    within = [one for one in turns if one.sent >= start and ended(one) <= end]
    return {
        "ours": [sampled(one) for one in within if not one.played.exchange.error],
        "theirs": [(prompt_of(one), their_sample(one)) for one in theirs],
        "failed": [one.played.exchange.error for one in within if one.played.exchange.error]
        + benchmark["requests"]["errored"],
    }


def ended(one: Turn) -> float:
    done = one.played.exchange
    return one.sent + (done.ended or done.sent) - done.sent


def sampled(one: Turn) -> tuple[str, Sample]:
    prompt = str(one.played.question.turns[0][0]["content"])
    return prompt, our_sample(request_record(one.played, 0, 0.0), one.dispatched - one.sent)


def prompt_of(one: dict[str, Any]) -> str:
    return str(json.loads(one["request_args"])["body"]["messages"][0]["content"][0]["text"])


def means(samples: Iterable[tuple[str, Sample]]) -> dict[str, Sample]:
    by_prompt: dict[str, list[Sample]] = defaultdict(list)
    for prompt, sample in samples:
        by_prompt[prompt].append(sample)
    return {
        prompt: {name: statistics.fmean(one[name] for one in some) for name in some[0]}
        for prompt, some in by_prompt.items()
    }


def compared(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    ours, theirs = (
        means(sample for one in rounds for sample in one[side]) for side in ("ours", "theirs")
    )
    both = sorted(set(ours) & set(theirs))
    table = {
        name: {
            "ours, median": statistics.median(ours[one][name] for one in both),
            "guidellm's, median": statistics.median(theirs[one][name] for one in both),
            "ours / guidellm's, median of conversations": statistics.median(
                ours[one][name] / theirs[one][name] for one in both
            ),
        }
        for name in FIGURES
    }
    for name in OWN:
        table[name] = {"ours, median": statistics.median(ours[one][name] for one in both)}
    table["tokens"] = {
        "conversations": len(both),
        "with other counts": sum(ours[one]["tokens"] != theirs[one]["tokens"] for one in both),
    }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("guidellm")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--scripted", action="store_true")
    args = parser.parse_args()
    version = subprocess.run(
        [args.guidellm, "--version"], capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_prompts(folder, scripted=args.scripted)
        if args.scripted:
            url = stack.enter_context(running()).url
        else:
            url = stack.enter_context(demo_server("--mode", "ar", "--threads", 1))
        rounds = [one_round(url, args, folder) for _ in range(args.rounds)]
    table = compared(rounds)
    ratio = "ours / guidellm's, median of conversations"
    verdict = {name: abs(table[name][ratio] - 1) <= AGREEMENT for name in FIGURES}
    verdict["tokens"] = not table["tokens"]["with other counts"]
    verdict["no failure"] = not any(one["failed"] for one in rounds)
    print(json.dumps({"compared": table, "within 5%": verdict}, indent=1))
    measured = {
        "witness": version.stdout.strip(),
        "clients": args.clients,
        "requests": {side: sum(len(one[side]) for one in rounds) for side in ("ours", "theirs")},
        "compared": table,
        "within_5_percent": verdict,
    }
    save("server_witness_scripted" if args.scripted else "server_witness", measured)
    sys.exit(not all(verdict.values()))


if __name__ == "__main__":
    main()

"""The load test beside guidellm, against one server, in turns.

    python -m venv /tmp/witness && /tmp/witness/bin/pip install guidellm
    python -m benchmarks.server_witness /tmp/witness/bin/guidellm [--rounds 5] [--clients 4]

Both play the demo's 108 conversations of one turn, each once, greedily, in mode `ar`. They take
turns, in an order that is drawn anew, after one round that does not count. Figures are medians over
requests; what is compared is the median over rounds of ours divided by theirs. guidellm's figures
are computed from its own record of each request, by its definitions.

Names differ: what guidellm calls inter-token latency is nearly our TPOT (its last event is the last
with text, ours the last of the stream), and its TPOT divides the whole time by all tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.server_soak import ROOT, demo_server
from trimode.loadtest.figures import tpot_of
from trimode.loadtest.job import run_load_test
from trimode.loadtest.options import Load, Server, Span
from trimode.loadtest.plan import LoadTest
from trimode.loadtest.questions import read_questions

DATA = ROOT / "artifacts" / "speed-demo" / "single_turn.jsonl"
AGREEMENT = 0.05
Figures = dict[str, float]


def ours(url: str, clients: int) -> Figures:
    data = read_questions(DATA)
    span = Span(num_prompts=len(data.questions))
    test = LoadTest(Server(url), data, (Load(concurrency=clients),), span=span)
    measured = run_load_test(test)
    (run,) = measured.runs
    assert not run.failed
    requests = measured.requests
    return {
        "requests": run.completed,
        "output tokens": run.total_output_tokens,
        "output tokens/s": run.output_throughput,
        "TTFT ms": run.median_ttft_ms or 0.0,
        "E2EL ms": run.median_e2el_ms or 0.0,
        "TPOT ms": run.median_tpot_ms or 0.0,
        "first to last text, by token, ms": 1000
        * statistics.median(
            sum(one.itl) / (one.output_tokens - 1) for one in requests if tpot_of(one) is not None
        ),
        "whole time by all tokens, ms": 1000
        * statistics.median(
            ((one.ttft or 0.0) + sum(one.itl)) / one.output_tokens for one in requests
        ),
        "client's share of a processor": run.client_cpu_share,
    }


def theirs(url: str, clients: int, guidellm: str, folder: Path) -> Figures:
    prompts, report = folder / "prompts.jsonl", folder / "report.json"
    lines = [json.loads(line) for line in DATA.read_text().splitlines()]
    prompts.write_text(
        "".join(json.dumps({"prompt": one["messages"][0]["content"]}) + "\n" for one in lines)
    )
    backend = {
        "kind": "openai_http",
        "target": url,
        "model": "nld-tiny",
        "max_tokens": 128,
        "extras": {"body": {"temperature": 0}},
    }
    options = [
        ("--backend", json.dumps(backend)),
        ("--profile", f"kind=concurrent,streams={clients}"),
        ("--constraint", f"kind=max_requests,count={len(lines)}"),
        ("--data", f"kind=json_file,path={prompts}"),
        ("--output", f"kind=json,path={report}"),
    ]
    command = [guidellm, "run", *(word for pair in options for word in pair), "--disable-console"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode or not report.is_file():
        raise RuntimeError(f"guidellm failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    return figures_of(benchmark["requests"]["successful"])


def figures_of(requests: list[dict[str, Any]]) -> Figures:
    start = min(one["request_start_time"] for one in requests)
    end = max(one["request_end_time"] for one in requests)
    tokens = sum(one["output_tokens"] for one in requests)

    def median(name: str, factor: float = 1.0) -> float:
        return factor * statistics.median(
            one[name] for one in requests if one[name] is not None and one["output_tokens"] > 1
        )

    return {
        "requests": len(requests),
        "output tokens": tokens,
        "output tokens/s": tokens / (end - start),
        "TTFT ms": median("time_to_first_token_ms"),
        "E2EL ms": median("request_latency", 1000),
        "first to last text, by token, ms": median("inter_token_latency_ms"),
        "whole time by all tokens, ms": median("time_per_output_token_ms"),
    }


def compared(rounds: list[tuple[Figures, Figures]]) -> dict[str, dict[str, float]]:
    names = [name for name in rounds[0][1] if name in rounds[0][0]]
    return {
        name: {
            "ours": statistics.median(mine[name] for mine, _ in rounds),
            "guidellm's": statistics.median(other[name] for _, other in rounds),
            "ours / guidellm's": statistics.median(m[name] / o[name] for m, o in rounds),
        }
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("guidellm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    version = subprocess.run(
        [args.guidellm, "--version"], capture_output=True, text=True, check=True
    )
    rng, rounds = random.Random(5), []
    with (
        tempfile.TemporaryDirectory() as folder,
        demo_server("--mode", "ar", "--threads", 1) as url,
    ):
        ways = {
            "ours": lambda: ours(url, args.clients),
            "theirs": lambda: theirs(url, args.clients, args.guidellm, Path(folder)),
        }
        ways["ours"]()
        for _ in range(args.rounds):
            found = {name: ways[name]() for name in rng.sample(list(ways), len(ways))}
            rounds.append((found["ours"], found["theirs"]))
            print(rounds[-1])
    table = compared(rounds)
    verdict = {name: abs(one["ours / guidellm's"] - 1) <= AGREEMENT for name, one in table.items()}
    print(json.dumps({"compared": table, "within 5%": verdict}, indent=1))
    save(
        "server_witness",
        {
            "witness": version.stdout.strip(),
            "clients": args.clients,
            "rounds": rounds,
            "compared": table,
            "within_5_percent": verdict,
        },
    )
    sys.exit(not all(verdict.values()))


if __name__ == "__main__":
    main()

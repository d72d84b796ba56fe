"""A server of the demo under load for minutes, and under far more requests than it may queue.

    python -m benchmarks.server_soak load [--minutes 5] [--clients 64] [--mode auto]
    python -m benchmarks.server_soak overload [--requests 10000]

`load`: clients of a closed loop play the demo's conversations and prompts whose content nobody else
has (a name, an age, a city). Every greedy answer is compared with the answer to the same request
alone; no answer may hold another prompt's content; the server's memory may not grow.
`overload`: all requests at once, to a server with a short queue. Each has to get one answer: a
whole right text, or 429 with Retry-After. Then the server has to answer as before.

Both are bounded in count and time, and leave a result in benchmarks/results.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import arguments_of, save
from trimode.calib.demo.tasks import CITIES, NAMES
from trimode.cli.console import RichProgress
from trimode.formats.load import RequestRecord
from trimode.loadtest.bodies import Composer
from trimode.loadtest.client import Connections, Exchange
from trimode.loadtest.job import Measured, run_load_test
from trimode.loadtest.options import Load, Sampling, Server, Span
from trimode.loadtest.plan import LoadTest, workload
from trimode.loadtest.play import Player
from trimode.loadtest.questions import Question, Questions, read_questions

ROOT = Path(__file__).parents[1]
MAIN = (sys.executable, "-m", "trimode.cli.main")
MOST_GROWTH = 0.03
START_S, DEADLINE_S = 120.0, 600.0
BATCH = 500
"""Requests of the burst that begin without a pause between them."""


@contextmanager
def demo_server(*options: object) -> Iterator[str]:
    """Build the demo and serve it on a free port; yield the address."""
    with tempfile.TemporaryDirectory() as folder:
        bundle, log = Path(folder) / "nld-tiny", Path(folder) / "log"
        build = (*MAIN, "build", ROOT / "artifacts" / "nld-tiny", "-o", bundle, "--target", "cpu")
        subprocess.run(build, check=True, capture_output=True)
        with log.open("w") as stream:
            command = [*MAIN, "serve", bundle, "--port", "0", *options]
            server = subprocess.Popen([*map(str, command)], stdout=stream, stderr=stream)
        try:
            yield address_of(server, log)
        finally:
            server.terminate()
            server.wait(60)


def address_of(server: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        if found := re.search(r"http://[\d.]+:\d+", log.read_text()):
            return found[0]
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {log.read_text()}")


def marked(count: int) -> tuple[Question, ...]:
    """Prompts of which each has a name, an age and a city that no other has together."""
    contents = itertools.islice(marker_contents(), count)
    return tuple(
        Question(f"marked-{n}", "marked", (({"role": "user", "content": prompt_of(*one)},),))
        for n, one in enumerate(contents)
    )


def marker_contents() -> Iterator[tuple[str, int, str]]:
    for n in itertools.count():
        yield NAMES[n % len(NAMES)], 18 + n * 7 % 72, CITIES[(n // 16 + n) % len(CITIES)]


def prompt_of(name: str, age: int, city: str) -> str:
    return f"JSON: {name} is {age} and lives in {city}."


def crossings(requests: list[RequestRecord], count: int) -> dict[str, int]:
    """Sort the answers to marked prompts: with their own content, another's, or neither."""
    contents = dict(enumerate(itertools.islice(marker_contents(), count)))
    everyone, found = set(contents.values()), Counter[str]()
    assert len(everyone) == count
    for one in requests:
        if one.category == "marked" and not one.error:
            own = contents[int(one.question_id.rpartition("-")[2])]
            said = content_of(one.text)
            kind = "own" if said == own else "another's" if said in everyone else "neither"
            found[kind] += 1
    return dict(found)


def content_of(text: str) -> tuple[str, int, str] | None:
    try:
        record = json.loads(text)
        return record["name"], record["age"], record["city"]
    except (ValueError, KeyError, TypeError):
        return None


def soak(args: argparse.Namespace) -> dict[str, Any]:
    demo = read_questions(ROOT / "artifacts" / "speed-demo")
    questions = Questions(
        f"{demo.name} and {args.markers} marked prompts",
        demo.sha256,
        (*demo.questions, *marked(args.markers)),
    )
    with demo_server("--max-rows", args.rows, "--threads", 1, "--kv-bytes", 64 << 20) as url:
        test = LoadTest(
            Server(url),
            questions,
            (Load(concurrency=args.clients),),
            modes=(args.mode,),
            span=Span(args.warmup, 60 * args.minutes),
            checks=True,
        )
        with RichProgress() as progress:
            measured = run_load_test(test, progress)
    return summary(args, test, questions, measured)


def summary(
    args: argparse.Namespace, test: LoadTest, questions: Questions, measured: Measured
) -> dict[str, Any]:
    (run,), check = measured.runs, measured.check
    assert check is not None
    first, last = run.served.rss_first_bytes or 0, run.served.rss_last_bytes or 0
    growth = last / first - 1 if first else None
    markers = crossings(measured.requests, args.markers)
    verdict = {
        "no request failed": not run.failed and not run.partial,
        "no greedy answer differs": check.passed and check.compared == run.completed,
        "no marker crossed": not markers.get("another's"),
        "memory is flat": growth is not None and abs(growth) <= MOST_GROWTH,
    }
    return {
        "verdict": verdict,
        "memory_growth": growth,
        "markers": markers,
        "check": check.model_dump(),
        "workload": workload(test, questions).model_dump(),
        "server": measured.server.model_dump() if measured.server else None,
        "run": run.model_dump(),
    }


def overload(args: argparse.Namespace) -> dict[str, Any]:
    with demo_server("--max-rows", args.rows, "--max-queue", args.queue, "--threads", 1) as url:
        started = time.monotonic()
        answers, reference, after = asyncio.run(burst(url, args))
        took = time.monotonic() - started
    kinds = Counter(kind_of(one, reference) for one in answers)
    times = sorted(one.ended - one.sent for one in answers if one.ended)
    return {
        "verdict": {
            "every request has one answer": sum(kinds.values()) == args.requests,
            "each is a whole right text or 429 with Retry-After": set(kinds)
            <= {"right text", "429 with Retry-After"},
            "some were refused and some answered": len(kinds) == 2,
            "the server answers afterwards": kind_of(after, reference) == "right text",
        },
        "requests": args.requests,
        "answers": dict(kinds.most_common()),
        "seconds": took,
        "slowest_answer_s": times[-1] if times else None,
    }


async def burst(
    url: str, args: argparse.Namespace
) -> tuple[list[Exchange], dict[str, str], Exchange]:
    """Send all requests; return the answers, the right text, and an answer afterwards."""
    (question,) = marked(1)
    async with asyncio.timeout(DEADLINE_S), Connections(Server(url, timeout=DEADLINE_S)) as lender:
        player = Player(lender, url, Composer("nld-tiny", Sampling()), lambda _: None)
        alone = await player.ask(question, question.turns[0])
        tasks = []
        for number in range(args.requests):
            if number % BATCH == 0:
                await asyncio.sleep(0)
            tasks.append(asyncio.create_task(player.ask(question, question.turns[0])))
        answers = await asyncio.gather(*tasks)
        after = await player.ask(question, question.turns[0])
    return answers, {"text": alone.text, "reason": alone.finish_reason or ""}, after


def kind_of(one: Exchange, reference: dict[str, str]) -> str:
    if one.status == 429:
        return "429 with Retry-After" if one.retry_after else "429 without Retry-After"
    if one.error:
        return one.error
    same = one.text == reference["text"] and one.finish_reason == reference["reason"]
    return "right text" if same else "another text"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    load = jobs.add_parser("load")
    load.add_argument("--minutes", type=float, default=5.0)
    load.add_argument("--warmup", type=float, default=60.0, help="seconds")
    load.add_argument("--clients", type=int, default=64)
    load.add_argument("--rows", type=int, default=16)
    load.add_argument("--mode", default=None)
    load.add_argument("--markers", type=int, default=100)
    many = jobs.add_parser("overload")
    many.add_argument("--requests", type=int, default=10_000)
    many.add_argument("--rows", type=int, default=8)
    many.add_argument("--queue", type=int, default=256)
    args = parser.parse_args()
    measured = soak(args) if args.job == "load" else overload(args)
    print(json.dumps(measured["verdict"], indent=1))
    save(f"server_soak_{args.job}", {"arguments": arguments_of(vars(args)), **measured})
    sys.exit(not all(measured["verdict"].values()))


if __name__ == "__main__":
    main()

"""What the server adds to the engine: milliseconds at one client, and who is busy at many.

    python -m benchmarks.server_overhead BUNDLE [--rounds 7] [--clients 64]

Engine and server are one process, so both sides of a ratio run the same model. The client is a
process of its own, with one connection that stays open. A round asks the engine, the server in one
piece and the server in events for the same texts, one after the other. Ratios are of the fastest
rounds; processor time is that of the serving process alone.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import arguments_of, save
from tests.serving import serving
from trimode import Engine, TriModeModel
from trimode.calib.demo.tasks import examples
from trimode.server.service import Service

TOKENS = 64
MODES = ("ar", "linear_spec", "diffusion")
TICKS = 100.0
"""Of a second, in /proc."""


def body_of(question: str, mode: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    fixed = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "mode": mode}
    return {"messages": messages, **fixed, **more}


def client(address: str, pipe: Connection) -> None:
    """Another process: ask for bodies, one after the other; send the seconds of each."""
    parts = urlsplit(address)
    peer = http.client.HTTPConnection(str(parts.hostname), parts.port)
    while (bodies := pipe.recv()) is not None:
        pipe.send([ask(peer, body) for body in bodies])
    peer.close()


def ask(peer: http.client.HTTPConnection, body: dict[str, Any]) -> float:
    content = json.dumps(body)
    start = time.perf_counter()
    peer.request("POST", "/v1/chat/completions", content)
    answer = peer.getresponse()
    answer.read()
    assert answer.status == 200
    return time.perf_counter() - start


def crowd(address: str, bodies: list[dict[str, Any]], pipe: Connection) -> None:
    """Another process: one thread for each body, which asks until it is told to stop."""
    parts, is_over, counts = urlsplit(address), threading.Event(), [0] * len(bodies)

    def go(number: int) -> None:
        peer = http.client.HTTPConnection(str(parts.hostname), parts.port)
        while not is_over.is_set():
            ask(peer, bodies[number])
            counts[number] += 1
        peer.close()

    threads = [threading.Thread(target=go, args=(n,)) for n in range(len(bodies))]
    for thread in threads:
        thread.start()
    pipe.recv()
    is_over.set()
    for thread in threads:
        thread.join()
    pipe.send(sum(counts))


def in_process(engine: Engine, questions: list[str], mode: Any) -> Callable[[], list[float]]:
    """The same work without a server: template, tokenizer, engine, text."""
    codec = engine.model.codec

    def run() -> list[float]:
        seconds = []
        for question in questions:
            start = time.perf_counter()
            ids = codec.encode_chat([{"role": "user", "content": question}])
            handle = engine.submit(ids, mode=mode, max_new_tokens=TOKENS, eos_token_ids=())
            codec.decode(handle.result().token_ids)
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


def over_http(pipe: Connection, bodies: list[dict[str, Any]]) -> Callable[[], list[float]]:
    def run() -> list[float]:
        pipe.send(bodies)
        return list(pipe.recv())

    return run


def at_one_client(
    address: str, engine: Engine, questions: list[str], rounds: int
) -> dict[str, Any]:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=client, args=(address, theirs))
    child.start()
    found = {mode: compared(ours, engine, questions, mode, rounds) for mode in MODES}
    ours.send(None)
    child.join()
    return found


def compared(
    pipe: Connection, engine: Engine, questions: list[str], mode: str, rounds: int
) -> dict[str, Any]:
    sides = {
        "engine": in_process(engine, questions, mode),
        "whole": over_http(pipe, [body_of(one, mode) for one in questions]),
        "events": over_http(pipe, [body_of(one, mode, stream=True) for one in questions]),
    }
    for run in sides.values():
        run()
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            cpu = time.process_time()
            wall[name].append(sum(run()))
            processor[name].append(time.process_time() - cpu)
    return {
        "wall_s": wall,
        "processor_s": processor,
        **{f"{name}_over_engine": ratios(wall, name) for name in ("whole", "events")},
        **{f"{name}_processor": ratios(processor, name) for name in ("whole", "events")},
    }


def ratios(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    pairs = zip(seconds[name], seconds["engine"], strict=True)
    return {
        "of_least": min(seconds[name]) / min(seconds["engine"]),
        "median": statistics.median(mine / engines for mine, engines in pairs),
    }


def threads_of_process() -> dict[int, float]:
    """Processor seconds of each thread of this process."""
    found = {}
    for folder in Path("/proc/self/task").iterdir():
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        found[int(folder.name)] = (int(fields[11]) + int(fields[12])) / TICKS
    return found


def at_many_clients(address: str, questions: list[str], seconds: float) -> dict[str, Any]:
    """Share of the time that each thread of the server computes."""
    bodies = [body_of(one, "auto", stream=True) for one in questions]
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=crowd, args=(address, bodies, theirs)
    )
    child.start()
    time.sleep(5)
    before, start = threads_of_process(), time.perf_counter()
    time.sleep(seconds)
    after, passed = threads_of_process(), time.perf_counter() - start
    ours.send(None)
    answers = ours.recv()
    child.join()
    names = {one.native_id: one.name for one in threading.enumerate()}
    shares: dict[str, float] = {}
    for number, spent in after.items():
        name = names.get(number, "other")
        shares[name] = shares.get(name, 0) + (spent - before.get(number, 0)) / passed
    busiest = dict(sorted(shares.items(), key=lambda one: -one[1]))
    return {"clients": len(bodies), "answers": answers, "share_of_a_core": busiest}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15.0)
    args = parser.parse_args()
    questions = [one.prompt for one in itertools.islice(examples(1, "held-out"), args.clients)]
    with (
        TriModeModel.from_pretrained(args.bundle, num_threads=1) as model,
        Engine(model, kv_bytes=0) as engine,
        serving(Service(engine, "demo")) as address,
    ):
        measured = {
            "one_client": at_one_client(address, engine, questions[: args.prompts], args.rounds),
            "many_clients": at_many_clients(address, questions, args.seconds),
        }
    for mode, found in measured["one_client"].items():
        print(mode, {name: one for name, one in found.items() if not name.endswith("_s")})
    print(measured["many_clients"])
    save("server_overhead", {"arguments": arguments_of(vars(args)), **measured})


if __name__ == "__main__":
    main()

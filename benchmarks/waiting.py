"""What it gives that rows wait for others that are one forward behind.

    python -m benchmarks.waiting BUNDLE [--prompts 32]

The engine and the texts are real; its clock goes on by what a machine's table says of each forward
that ran. So the forwards, who waits, and the tokens are what the engine does, on any machine.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments_of, save
from benchmarks.simulator.machines import machine
from trimode import TriModeModel
from trimode.calib.demo.tasks import examples
from trimode.runtime.decode.options import make_options
from trimode.runtime.engine.core import EngineCore
from trimode.runtime.engine.handle import Handle
from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.request import Request
from trimode.runtime.engine.settings import Settings
from trimode.runtime.service_parts import open_stream

MACHINES = ("cpu", "b200 bf16", "h100 bf16", "dgx-spark int4")
ROWS = 8
ARRIVALS = ("together", "spread")


class TimedSession:
    """A session whose forwards take the time of a table.

    Attributes:
        now: Seconds so far.
        held: Longest time between two commits of a row is bounded by these seconds; see the test.
    """

    def __init__(self, session: Any, table: CostTable) -> None:
        self._session, self._table, self.now = session, table, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_rows(
        self, graph_name: Any, cache: Any, rows: range, ids: Any, past: Any, *rest: Any
    ) -> Any:
        ms = self._table.ms(graph_name, len(rows), ids.shape[1], int(np.max(past)))
        self.now += ms / 1000
        return self._session.run_rows(graph_name, cache, rows, ids, past, *rest)


def run(
    model: TriModeModel,
    prompts: list[list[int]],
    table: CostTable,
    *,
    block_length: int,
    arrival: str,
    waits: bool,
) -> dict[str, Any]:
    """Answer the prompts, eight at a time, in linear self-speculation."""
    session: Any = TimedSession(model.session, table)
    settings = Settings(
        max_rows=ROWS, kv_bytes=0, table=table if waits else None, clock=lambda: session.now
    )
    core = EngineCore(session, model.model, partial(open_stream, model), settings)
    ids = iter(prompts)
    options = make_options(block_length=block_length, threshold=0.0)
    asked: list[tuple[float, Handle]] = []
    ends: dict[int, tuple[float, float]] = {}
    every = 0.0 if arrival == "together" else 20 * table.ms("ar", 1, 1, 64) / 1000
    following = next(ids, None)
    while following is not None or not core.is_idle:
        while following is not None and (every * len(asked) <= session.now or core.is_idle):
            handle = Handle(following, core.post)
            core.post(Request(handle, following, "linear_spec", options))
            asked.append((session.now, handle))
            following = next(ids, None)
            core.take_in()
        core.turn()
        for number, (_, handle) in enumerate(asked):
            if handle.token_ids and number not in ends:
                ends[number] = (session.now, 0.0)
            if handle.done and ends[number][1] == 0.0:
                ends[number] = (ends[number][0], session.now)
    begun = [at for at, _ in asked]
    tokens = [handle.token_ids for _, handle in asked]
    counts = core.counts
    return {
        "tokens": tokens,
        "forwards": dict(counts.forwards),
        "rows_per_forward": counts.rows_per_forward,
        "detours": core.num_detours,
        "total_ms": 1000 * session.now,
        "first_token_ms": 1000 * float(np.mean([ends[n][0] - at for n, at in enumerate(begun)])),
        "last_token_ms": 1000 * float(np.mean([ends[n][1] - at for n, at in enumerate(begun)])),
    }


def compared(
    model: TriModeModel, prompts: list[list[int]], name: str, block_length: int, arrival: str
) -> dict[str, Any]:
    """Both ways on one machine; their tokens are those of single runs."""
    streams = [
        model.stream([ids], "linear_spec", block_length=block_length).finish() for ids in prompts
    ]
    single = sum(sum(vars(one.forwards).values()) for one in streams)
    found: dict[str, Any] = {}
    for way, waits in (("at once", False), ("waiting", True)):
        one = run(
            model,
            prompts,
            machine(name),
            block_length=block_length,
            arrival=arrival,
            waits=waits,
        )
        assert one.pop("tokens") == [stream.token_ids for stream in streams]
        found[way] = {**one, "share_of_single": sum(one["forwards"].values()) / single}
    ratios = {
        key: found["waiting"][key] / found["at once"][key]
        for key in ("total_ms", "first_token_ms", "last_token_ms", "share_of_single")
    }
    return {"single_forwards": single, **found, "waiting_over_at_once": ratios}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    args = parser.parse_args()
    model = TriModeModel.from_pretrained(args.bundle, num_threads=1, target="portable")
    prompts = [
        model.codec.encode_chat([{"role": "user", "content": e.prompt}])
        for e in itertools.islice(examples(1, "held-out"), args.prompts)
    ]
    measured = {}
    for name, length, arrival in itertools.product(MACHINES, (32, 8), ARRIVALS):
        key = f"{name}, blocks of {length}, {arrival}"
        measured[key] = one = compared(model, prompts, name, length, arrival)
        shares = [round(one[way]["share_of_single"], 3) for way in ("at once", "waiting")]
        ratios = {k: round(v, 3) for k, v in one["waiting_over_at_once"].items()}
        print(key, shares, one["waiting"]["detours"], ratios, flush=True)
    save("waiting", {"arguments": arguments_of(vars(args)), "measured": measured})


if __name__ == "__main__":
    main()

"""What it gives that rows wait for others that are one forward behind.

    python -m benchmarks.waiting BUNDLE [--prompts 64]

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
from trimode.runtime.decode.options import DEFAULT_THRESHOLDS, make_options
from trimode.runtime.decode.stream import Generation
from trimode.runtime.engine.core import EngineCore
from trimode.runtime.engine.handle import Handle
from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.request import Request
from trimode.runtime.engine.settings import Settings
from trimode.runtime.service_parts import open_stream

MACHINES = ("cpu", "b200 bf16", "h100 bf16", "dgx-spark int4")
ROWS = 8
ARRIVALS = ("together", "spread")
GAP = 3
"""Steps of AR of one text between two requests that are spread."""


class TimedSession:
    """A session whose forwards take the time of a table.

    Attributes:
        now: Seconds so far.
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
    mode: Any = "linear_spec",
) -> dict[str, Any]:
    """Answer the prompts, eight at a time, in one mode; all are submitted on time."""
    session: Any = TimedSession(model.session, table)
    settings = Settings(
        max_rows=ROWS, kv_bytes=0, table=table if waits else None, clock=lambda: session.now
    )
    core = EngineCore(session, model.model, partial(open_stream, model), settings)
    threshold = DEFAULT_THRESHOLDS[mode]
    options = make_options(block_length=block_length, threshold=threshold)
    gap = 0.0 if arrival == "together" else GAP * table.ms("ar", 1, 1, 64) / 1000
    arrivals = [number * gap for number in range(len(prompts))]
    handles = [Handle(ids, core.post) for ids in prompts]
    firsts, lasts = [0.0] * len(prompts), [0.0] * len(prompts)
    num_sent = 0
    while num_sent < len(prompts) or not core.is_idle:
        if core.is_idle:
            session.now = max(session.now, arrivals[num_sent])
        while num_sent < len(prompts) and arrivals[num_sent] <= session.now:
            handle = handles[num_sent]
            core.post(Request(handle, handle.prompt, mode, options))
            num_sent += 1
        core.turn()
        for number, handle in enumerate(handles[:num_sent]):
            firsts[number] = firsts[number] or (session.now if handle.token_ids else 0.0)
            lasts[number] = lasts[number] or (session.now if handle.done else 0.0)
    return {
        "tokens": [handle.token_ids for handle in handles],
        "forwards": dict(core.counts.forwards),
        "rows_per_forward": core.counts.rows_per_forward,
        "detours": core.num_detours,
        "total_ms": 1000 * session.now,
        "first_token_ms": 1000 * float(np.mean(np.subtract(firsts, arrivals))),
        "last_token_ms": 1000 * float(np.mean(np.subtract(lasts, arrivals))),
    }


def compared(
    model: TriModeModel,
    prompts: list[list[int]],
    singles: list[Generation],
    name: str,
    block_length: int,
    arrival: str,
) -> dict[str, Any]:
    """Both ways on one machine; their tokens are those of single runs."""
    single = sum(sum(vars(one.forwards).values()) for one in singles)
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
        assert one.pop("tokens") == [one.token_ids for one in singles]
        found[way] = {**one, "share_of_single": sum(one["forwards"].values()) / single}
    ratios = {
        key: found["waiting"][key] / found["at once"][key]
        for key in ("total_ms", "first_token_ms", "last_token_ms", "share_of_single")
    }
    return {"single_forwards": single, **found, "waiting_over_at_once": ratios}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    model = TriModeModel.from_pretrained(args.bundle, num_threads=1, target="portable")
    prompts = [
        model.codec.encode_chat([{"role": "user", "content": e.prompt}])
        for e in itertools.islice(examples(1, "held-out"), args.prompts)
    ]
    measured = {}
    for length in (32, 8):
        singles = [
            model.stream([ids], "linear_spec", block_length=length).finish() for ids in prompts
        ]
        for name, arrival in itertools.product(MACHINES, ARRIVALS):
            key = f"{name}, blocks of {length}, {arrival}"
            measured[key] = one = compared(model, prompts, singles, name, length, arrival)
            shares = [round(one[way]["share_of_single"], 3) for way in ("at once", "waiting")]
            ratios = {k: round(v, 3) for k, v in one["waiting_over_at_once"].items()}
            print(key, shares, one["waiting"]["detours"], ratios, flush=True)
    save("waiting", {"arguments": arguments_of(vars(args)), "measured": measured})


if __name__ == "__main__":
    main()

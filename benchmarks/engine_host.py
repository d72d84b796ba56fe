"""Host time of a row in an AR step: through the engine, and by the decoder alone.

    python -m benchmarks.engine_host BUNDLE

Forwards give the same outputs at once, so that only Python is measured, on a busy machine too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import save
from trimode import TriModeModel
from trimode.runtime.decode.options import make_options
from trimode.runtime.engine.core import EngineCore
from trimode.runtime.engine.handle import Handle
from trimode.runtime.engine.request import Request
from trimode.runtime.engine.settings import Settings
from trimode.runtime.service_parts import open_stream

STEPS, ROUNDS = 200, 30
IDS = list(range(20, 50))


def through_engine(model: TriModeModel, num_rows: int) -> None:
    core = EngineCore(
        model.session,  # type: ignore[arg-type]
        model.model,
        partial(open_stream, model),
        Settings(max_rows=num_rows, kv_bytes=0),
    )
    options = make_options(max_new_tokens=STEPS, eos_token_ids=())
    for row in range(num_rows):
        ids = [*IDS, 50 + row]
        core.post(Request(Handle(ids, core.post), ids, "ar", options))
    core.take_in()
    while not core.is_idle:
        core.turn()


def alone(model: TriModeModel) -> None:
    model.stream([IDS], "ar", max_new_tokens=STEPS, eos_token_ids=()).finish()


def least_us(run: Callable[[], None], num_rows: int) -> float:
    """Least processor microseconds of a row and step."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return 1e6 * min(found) / STEPS / num_rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    args = parser.parse_args()
    model = TriModeModel.from_pretrained(args.bundle, num_threads=1, target="portable")
    logits = np.zeros((16, model.model.vocab_size), np.float32)
    ids = np.full(16, 50)
    session: Any = model.session
    session.run = lambda *_, **__: (ids[:1], logits[:1])
    session.run_rows = lambda _, __, rows, *___: (ids[: len(rows)], logits[: len(rows)])
    measured = {"decoder, 1 row": least_us(partial(alone, model), 1)}
    for rows in (1, 4, 16):
        run = partial(through_engine, model, rows)
        measured[f"engine, {rows} rows"] = least_us(run, rows)
    print(measured)
    save("engine_host", {"us_a_row_and_step": measured})


if __name__ == "__main__":
    main()

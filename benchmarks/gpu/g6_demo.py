"""G6: the demo checkpoint trained on the GPU: exact match by mode, acceptance length with the
drafter and without, minutes.

python -m benchmarks.gpu.g6_demo [--joint-minutes 3] [--refinement-minutes 2]
    [--drafter-minutes 1] [--questions 112]
python -m benchmarks.gpu.g6_demo --device cpu --size tiny

The checkpoint is written beside the results, with its ``training.json``, so that a good one can be
taken home.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import TINY, arguments, result_folder, save, show
from trimode.calib.demo.model import demo_config
from trimode.calib.demo.train import Plan, train_demo
from trimode.calib.training.budget import Budget

BATCH_SIZE, REFINEMENT_BATCH_SIZE = 256, 64
"""A step of so small a model takes a GPU about as long for many chats as for few."""


def plan_of(options: Any, state: Path, output: Path) -> Plan:
    """The budgets are minutes; in the tiny run steps, a few of each."""
    if options.size == TINY:
        config = {
            **demo_config(),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "block_size": 8,
        }
        budgets = [Budget(steps=3)] * 3
        return Plan(
            output,
            state,
            budgets[0],
            budgets[1],
            budgets[2],
            num_questions=1,
            batch_size=4,
            refinement_batch_size=2,
            device=options.device,
            config=config,
        )
    minutes = (options.joint_minutes, options.drafter_minutes, options.refinement_minutes)
    joint, drafter, refinement = (Budget(seconds=60 * m) for m in minutes)
    return Plan(
        output,
        state,
        joint,
        drafter,
        refinement,
        num_questions=options.questions,
        batch_size=BATCH_SIZE,
        refinement_batch_size=REFINEMENT_BATCH_SIZE,
        device=options.device,
    )


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a family, and their mean."""
    found = report["evaluation"]
    diffusion, lengths = found["diffusion_exact_match"], found["acceptance_length_per_family"]
    rows = [
        {
            "family": family,
            "ar": exact,
            "diffusion": diffusion[family],
            "without_drafter": lengths[family][0],
            "with_drafter": lengths[family][1],
        }
        for family, exact in found["exact_match"].items()
    ]
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("ar", "diffusion")}
    return [
        *rows,
        {
            "family": "all",
            **mean,
            "without_drafter": found["acceptance_length_base"],
            "with_drafter": found["acceptance_length"],
        },
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--joint-minutes", type=float, default=3.0)
    parser.add_argument("--refinement-minutes", type=float, default=2.0)
    parser.add_argument("--drafter-minutes", type=float, default=1.0)
    parser.add_argument("--questions", type=int, default=112, help="per family")
    options = parser.parse_args()
    start = time.perf_counter()
    output = result_folder() / f"g6_demo_{options.device}"
    with tempfile.TemporaryDirectory() as name:
        report = train_demo(plan_of(options, Path(name) / "state.pt", output))
    rows = rows_of(report)
    save(
        f"g6_demo_{options.device}",
        {
            "size": options.size,
            "minutes": (time.perf_counter() - start) / 60,
            "training": report,
            "rows": rows,
        },
    )
    show(rows, ("family", "ar", "diffusion", "without_drafter", "with_drafter"))


if __name__ == "__main__":
    main()

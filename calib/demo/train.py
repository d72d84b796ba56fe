"""Trains the demo checkpoint from nothing: ``python -m trimode.calib.demo.train -o DIR``.

Stages: the joint objective, rounding to bfloat16, the drafter on the rounded weights, the folder, and an evaluation on held-out questions
whose results go to ``training.json`` in that folder.
"""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer

import trimode
from trimode.calib.budget import Budget
from trimode.calib.checkpoint_io import round_weights, write_json
from trimode.calib.demo.console import StageProgress, run_command
from trimode.calib.demo.data import batches
from trimode.calib.demo.evaluate import Evaluation, evaluate
from trimode.calib.demo.joint import JointTraining, Progress, Settings, hash_seed
from trimode.calib.demo.model import build_trunk, demo_config
from trimode.calib.demo.save import save_demo
from trimode.calib.demo.tasks import examples
from trimode.calib.demo.tokenizer import build_tokenizer
from trimode.calib.drafter import DrafterProgress, DrafterSettings, train_drafter
from trimode.errors import UsageError
from trimode.graphs.trunk import TriModeTrunk

log = logging.getLogger(__name__)

REPORT_FILE = "training.json"
JOINT_MINUTES, DRAFTER_MINUTES = 40.0, 7.0
DRAFTER_BATCH_SIZE = 16


@dataclass(frozen=True)
class Plan:
    """What a whole run is told.

    Attributes:
        output: folder of the checkpoint.
        state: file with the joint stage's state.
        resume: take up the run in ``state``; without it, that file must not exist.
        num_questions: held-out questions per family; 0 leaves the evaluation out.
        config: the contents of ``config.json``.
    """

    output: Path
    state: Path
    joint: Budget
    drafter: Budget
    seed: int = 0
    resume: bool = False
    num_questions: int = 20
    batch_size: int = 32
    config: dict[str, Any] = field(default_factory=demo_config)


def train_demo(plan: Plan, progress: StageProgress | None = None) -> dict[str, Any]:
    """Run every stage; returns the contents of ``training.json``.

    Raises:
        UsageError: there is a state and ``resume`` is not set, or the other way round, or the output is not a folder to write to.
    """
    progress = progress or StageProgress()
    tokenizer = build_tokenizer()
    trunk = build_trunk(plan.config, plan.seed)
    settings = Settings(seed=plan.seed, batch_size=plan.batch_size)
    joint = _train_jointly(trunk, tokenizer, plan, settings, progress)
    round_weights(trunk)
    drafter_settings = DrafterSettings(seed=plan.seed)
    drafter = _train_drafter(trunk, tokenizer, plan, drafter_settings, progress)
    save_demo(plan.output, trunk, plan.config)
    log.info("wrote %s", plan.output)
    progress.update("evaluation", 0)
    evaluation = evaluate(trunk, tokenizer, num_questions=plan.num_questions, seed=plan.seed) if plan.num_questions else None
    progress.update("evaluation", 1)
    report = _report(plan, (settings, joint), (drafter_settings, drafter), evaluation)
    write_json(plan.output / REPORT_FILE, report)
    return report


def _train_jointly(trunk: TriModeTrunk, tokenizer: Tokenizer, plan: Plan, settings: Settings, progress: StageProgress) -> Progress:
    if plan.resume and not plan.state.is_file():
        raise UsageError(f"{plan.state}: expected the state of an earlier run, found none", "leave out --resume to begin anew")
    if plan.state.exists() and not plan.resume:
        raise UsageError(f"{plan.state}: expected no earlier run, found one", "pass --resume to take it up, or delete it")
    plan.state.parent.mkdir(parents=True, exist_ok=True)
    training = JointTraining(trunk, tokenizer, settings, plan.state)
    if plan.resume:
        training.load()
    done = training.run(plan.joint, lambda p, share: progress.update("joint", share, _figures(p.step, p.losses)))
    progress.update("joint", 1, _figures(done.step, done.losses))
    return done


def _train_drafter(trunk: TriModeTrunk, tokenizer: Tokenizer, plan: Plan, settings: DrafterSettings, progress: StageProgress) -> DrafterProgress:
    source = batches(examples(hash_seed(f"{plan.seed} drafter"), "train"), tokenizer, min(plan.batch_size, DRAFTER_BATCH_SIZE))

    def report(p: DrafterProgress, share: float) -> None:
        progress.update("drafter", share, _figures(p.step, {"loss": p.loss, "accepted": p.accepted}))
        if p.step % 50 == 0:
            log.info("drafter: step %d, loss %.3f, %.2f slots accepted", p.step, p.loss, p.accepted)

    done = train_drafter(trunk, source, plan.drafter, settings, report)
    progress.update("drafter", 1, _figures(done.step, {"loss": done.loss, "accepted": done.accepted}))
    return done


def _report(
    plan: Plan, joint: tuple[Settings, Progress], drafter: tuple[DrafterSettings, DrafterProgress], evaluation: Evaluation | None
) -> dict[str, Any]:
    return {
        "trimode": trimode.__version__,
        "torch": torch.__version__,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "seed": plan.seed,
        "block_size": plan.config["block_size"],
        "joint": {name: value for part in joint for name, value in asdict(part).items() if name != "save_every_s"},
        "drafter": {**asdict(drafter[0]), **asdict(drafter[1])},
        "evaluation": None if evaluation is None else asdict(evaluation),
    }


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _figures(step: int, losses: dict[str, float]) -> str:
    return "  ".join([f"step {step}", *(f"{name} {value:.3f}" for name, value in losses.items())])


def main(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write the checkpoint to.")],
    minutes: Annotated[float | None, typer.Option(help=f"Time for the joint stage; {JOINT_MINUTES:g} if neither this nor --steps is given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the joint stage.")] = None,
    drafter_minutes: Annotated[float | None, typer.Option(help=f"Time for the drafter; {DRAFTER_MINUTES:g} if nothing is said.")] = None,
    drafter_steps: Annotated[int | None, typer.Option(help="Steps of the drafter.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the weights to begin with and the order of the examples.")] = 0,
    state: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the joint stage keeps its state; beside DIR if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up the run in the state file.")] = False,
    questions: Annotated[int, typer.Option(min=0, help="Held-out questions per family to evaluate on; 0 for no evaluation.")] = 20,
) -> None:
    """Train the demo checkpoint from nothing on CPU, drafter included, and evaluate it."""
    plan = Plan(
        output=output,
        state=state or output.absolute().with_name(f"{output.absolute().name}.state.pt"),
        joint=_budget(minutes, steps, JOINT_MINUTES),
        drafter=_budget(drafter_minutes, drafter_steps, DRAFTER_MINUTES),
        seed=seed,
        resume=resume,
        num_questions=questions,
    )
    with StageProgress() as progress:
        train_demo(plan, progress)


def _budget(minutes: float | None, steps: int | None, default_minutes: float) -> Budget:
    if any(limit is not None and limit <= 0 for limit in (minutes, steps)):
        raise UsageError(f"expected minutes and steps above 0, found {minutes} and {steps}", "leave one out for its default")
    if minutes is None and steps is None:
        minutes = default_minutes
    return Budget(None if minutes is None else minutes * 60, steps)


if __name__ == "__main__":
    run_command(main)

"""Trains the demo checkpoint from nothing: ``python -m trimode.calib.demo.train -o DIR``.

Stages: the joint objective on random corruption, the same on the states that decoding visits, the
drafter, the folder, and an evaluation on held-out questions whose results go to ``training.json``
in that folder. After each of the first two stages the weights are rounded to bfloat16, so what a
stage begins with is a checkpoint: ``--base DIR`` begins with one instead of the first stage.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer

import trimode
from trimode.calib.data.checks import check_device_name
from trimode.calib.demo.console import StageProgress, run_command
from trimode.calib.demo.evaluate import Evaluation, evaluate, greedy_answers
from trimode.calib.demo.joint import JointTraining
from trimode.calib.demo.model import build_trunk, demo_config
from trimode.calib.demo.refine import RefinementTraining
from trimode.calib.demo.save import save_demo
from trimode.calib.demo.tasks import examples
from trimode.calib.demo.tokenizer import build_tokenizer, render_prompt
from trimode.calib.demo.training import Settings, Training, hash_seed
from trimode.calib.drafter.answers import Written, batches, long_enough
from trimode.calib.drafter.training import DrafterProgress, DrafterSettings, train_drafter
from trimode.calib.reference.device import check_device
from trimode.calib.reference.torch_session import load_trunk
from trimode.calib.training.budget import Budget
from trimode.calib.training.checkpoint_writer import round_weights, write_json
from trimode.errors import UsageError
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.config import parse_config
from trimode.graphs.decoder.trunk import TriModeTrunk

log = logging.getLogger(__name__)

REPORT_FILE = "training.json"
JOINT_MINUTES, REFINEMENT_MINUTES, DRAFTER_MINUTES = 46.0, 90.0, 10.0
_JOINT_TIME = f"Time for the joint stage; {JOINT_MINUTES:g} if neither this nor --steps is given."
REFINEMENT_RATE, REFINEMENT_WARM_UP, REFINEMENT_DECAY = 6e-4, 0.03, 0.9


@dataclass(frozen=True)
class Plan:
    """Holds the choices of a whole run.

    Attributes:
        output: Folder of the checkpoint.
        state: File with the joint stage's state; the refinement's lies beside it.
        joint, drafter: Budgets of these stages.
        refinement: Budget of the refinement; None leaves that stage out.
        base: Checkpoint to begin with instead of the joint stage.
        resume: Whether to continue the run in ``state``; without it, that file must not exist.
        num_questions: Number of held-out questions per family; 0 leaves the evaluation out.
        batch_size: Chats in a step of the joint stage.
        refinement_batch_size: Chats in a step of the refinement, each with several blocks, and of
            the drafter.
        num_answers: Number of training prompts that the model answers for its drafter.
        device: Device of the training, ``cpu`` or ``cuda``.
        config: Contents of ``config.json``.
    """

    output: Path
    state: Path
    joint: Budget
    drafter: Budget
    refinement: Budget | None = None
    base: Path | None = None
    seed: int = 0
    resume: bool = False
    num_questions: int = 20
    batch_size: int = 32
    refinement_batch_size: int = 16
    num_answers: int = 4096
    device: str = "cpu"
    config: dict[str, Any] = field(default_factory=demo_config)

    @property
    def refinement_state(self) -> Path:
        """File with the refinement's state."""
        return self.state.with_name(f"{self.state.stem}.refinement{self.state.suffix}")


def train_demo(plan: Plan, progress: StageProgress | None = None) -> dict[str, Any]:
    """Run every stage; returns the contents of ``training.json``.

    Raises:
        UsageError: there is a state and ``resume`` is not set, or the other way round, or the
            output is not a folder to write to, or ``base`` has another shape.
        CheckpointError: ``base`` is no checkpoint.
        DeviceError: the device is not here.
    """
    progress = progress or StageProgress()
    tokenizer = build_tokenizer()
    check_device(plan.device)
    _check_states(plan)
    trunk = build_trunk(plan.config, plan.seed).to(plan.device)
    stages: dict[str, Any] = {}
    if plan.base:
        stages["base"] = _begin_with(plan.base, trunk, plan.config)
    else:
        stages["joint"] = _train_jointly(trunk, tokenizer, plan, progress)
    if plan.refinement:
        stages["refinement"] = _refine(trunk, tokenizer, plan, plan.refinement, progress)
    stages["drafter"] = _train_drafter(trunk, tokenizer, plan, progress)
    save_demo(plan.output, trunk, plan.config)
    log.info("wrote %s", plan.output)
    progress.update("evaluation", 0)
    evaluation = (
        evaluate(trunk, tokenizer, num_questions=plan.num_questions, seed=plan.seed)
        if plan.num_questions
        else None
    )
    progress.update("evaluation", 1)
    report = _report(plan, stages, evaluation)
    write_json(plan.output / REPORT_FILE, report)
    return report


def _check_states(plan: Plan) -> None:
    states = [plan.refinement_state] if plan.base else [plan.state, plan.refinement_state]
    found = [state for state in states if state.is_file()]
    if plan.resume and states[0] not in found:
        raise UsageError(
            f"{states[0]}: expected the state of an earlier run, found none",
            "leave out `resume` to begin anew",
        )
    if found and not plan.resume:
        raise UsageError(
            f"{found[0]}: expected no earlier run, found one",
            "pass `resume` to take it up, or delete it",
        )


def _begin_with(base: Path, trunk: TriModeTrunk, config: dict[str, Any]) -> dict[str, Any]:
    """Take a checkpoint's weights, its drafter left out.

    Returns how they came about, as far as its ``training.json`` tells.
    """
    checkpoint = open_checkpoint(base)
    if checkpoint.config != parse_config(config):
        raise UsageError(
            f"{base}: expected a checkpoint of the demo's shape, found another",
            "name one that this command has written",
        )
    weights = load_trunk(checkpoint, 1).state_dict()
    trunk.load_state_dict(
        {name: tensor for name, tensor in weights.items() if ".lora_" not in name}, strict=False
    )
    report = (
        json.loads((base / REPORT_FILE).read_text(encoding="utf-8"))
        if (base / REPORT_FILE).is_file()
        else {}
    )
    return {stage: report[stage] for stage in ("base", "joint", "refinement") if stage in report}


def _train_jointly(
    trunk: TriModeTrunk, tokenizer: Tokenizer, plan: Plan, progress: StageProgress
) -> dict[str, Any]:
    settings = Settings(seed=plan.seed, batch_size=plan.batch_size)
    return _train_trunk(
        JointTraining(trunk, tokenizer, settings, plan.state), "joint", plan.joint, progress
    )


def _refine(
    trunk: TriModeTrunk, tokenizer: Tokenizer, plan: Plan, budget: Budget, progress: StageProgress
) -> dict[str, Any]:
    settings = Settings(
        seed=plan.seed,
        batch_size=plan.refinement_batch_size,
        learning_rate=REFINEMENT_RATE,
        warm_up=REFINEMENT_WARM_UP,
        decay=REFINEMENT_DECAY,
    )
    return _train_trunk(
        RefinementTraining(trunk, tokenizer, settings, plan.refinement_state),
        "refinement",
        budget,
        progress,
    )


def _train_trunk(
    training: Training, name: str, budget: Budget, progress: StageProgress
) -> dict[str, Any]:
    """Run a stage, from any state it left, and round the weights.

    Returns what it was told and did.
    """
    training.state.parent.mkdir(parents=True, exist_ok=True)
    if training.state.is_file():
        training.load()
    done = training.run(
        budget, lambda p, share: progress.update(name, share, _figures(p.step, p.losses))
    )
    progress.update(name, 1, _figures(done.step, done.losses))
    round_weights(training.trunk)
    return {
        key: value
        for part in (training.settings, done)
        for key, value in asdict(part).items()
        if key != "save_every_s"
    }


def _train_drafter(
    trunk: TriModeTrunk, tokenizer: Tokenizer, plan: Plan, progress: StageProgress
) -> dict[str, Any]:
    """Train on what the model itself writes, as `trimode calibrate drafter` does.

    Of the ways to write an answer, the drafter learns its own.
    """
    settings = DrafterSettings(seed=plan.seed)
    drawn = islice(examples(hash_seed(f"{plan.seed} drafter"), "train"), plan.num_answers)
    prompts = [tokenizer.encode(render_prompt(example.prompt)).ids for example in drawn]
    log.info("drafter: the model answers %d prompts", len(prompts))
    with torch.inference_mode():
        written = [
            Written(prompt, answer)
            for prompt, answer in zip(prompts, greedy_answers(trunk, prompts), strict=True)
        ]
    source = batches(
        long_enough(written, "train on"), plan.refinement_batch_size, plan.seed, plan.device
    )

    def report(p: DrafterProgress, share: float) -> None:
        progress.update(
            "drafter", share, _figures(p.step, {"loss": p.loss, "accepted": p.accepted})
        )
        if p.step % 50 == 0:
            log.info("drafter: step %d, loss %.3f, %.2f slots accepted", p.step, p.loss, p.accepted)

    done = train_drafter(trunk, source, plan.drafter, settings, report)
    progress.update(
        "drafter", 1, _figures(done.step, {"loss": done.loss, "accepted": done.accepted})
    )
    return {**asdict(settings), "num_answers": len(written), **asdict(done)}


def _report(plan: Plan, stages: dict[str, Any], evaluation: Evaluation | None) -> dict[str, Any]:
    return {
        "trimode": trimode.__version__,
        "torch": torch.__version__,
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            **_gpu(plan.device),
        },
        "seed": plan.seed,
        "block_size": plan.config["block_size"],
        **stages,
        "evaluation": None if evaluation is None else asdict(evaluation),
    }


def _gpu(device: str) -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _figures(step: int, losses: dict[str, float]) -> str:
    return "  ".join([f"step {step}", *(f"{name} {value:.3f}" for name, value in losses.items())])


def main(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIR", help="Folder to write the checkpoint to."),
    ],
    *,
    minutes: Annotated[float | None, typer.Option(help=_JOINT_TIME)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the joint stage.")] = None,
    refinement_minutes: Annotated[
        float | None,
        typer.Option(help=f"Time for the refinement; {REFINEMENT_MINUTES:g} if nothing is said."),
    ] = None,
    refinement_steps: Annotated[
        int | None, typer.Option(help="Steps of the refinement; 0 leaves it out.")
    ] = None,
    drafter_minutes: Annotated[
        float | None,
        typer.Option(help=f"Time for the drafter; {DRAFTER_MINUTES:g} if nothing is said."),
    ] = None,
    drafter_steps: Annotated[int | None, typer.Option(help="Steps of the drafter.")] = None,
    seed: Annotated[
        int, typer.Option(help="Decides the weights to begin with and the order of the examples.")
    ] = 0,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT", help="Begin with these weights instead of the joint stage."
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where the stages keep their state; beside DIR if left out."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take up the run in the state file.")
    ] = False,
    questions: Annotated[
        int,
        typer.Option(
            min=0, help="Held-out questions per family to evaluate on; 0 for no evaluation."
        ),
    ] = 20,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Chats in a step of the joint stage.")
    ] = 32,
    refinement_batch_size: Annotated[
        int, typer.Option(min=1, help="Chats in a step of the refinement and of the drafter.")
    ] = 16,
    answers: Annotated[
        int, typer.Option(min=1, help="Prompts that the model answers for its drafter.")
    ] = 4096,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to train.")] = "cpu",
) -> None:
    """Train the demo checkpoint from nothing, drafter included, and evaluate it."""
    check_device_name(device)
    plan = Plan(
        output=output,
        state=state or output.absolute().with_name(f"{output.absolute().name}.state.pt"),
        joint=_budget(minutes, steps, JOINT_MINUTES),
        refinement=None
        if refinement_steps == 0
        else _budget(refinement_minutes, refinement_steps, REFINEMENT_MINUTES),
        drafter=_budget(drafter_minutes, drafter_steps, DRAFTER_MINUTES),
        base=base,
        seed=seed,
        resume=resume,
        num_questions=questions,
        batch_size=batch_size,
        refinement_batch_size=refinement_batch_size,
        num_answers=answers,
        device=device,
    )
    with StageProgress() as progress:
        train_demo(plan, progress)


def _budget(minutes: float | None, steps: int | None, default_minutes: float) -> Budget:
    if any(limit is not None and limit <= 0 for limit in (minutes, steps)):
        raise UsageError(
            f"expected minutes and steps above 0, found {minutes} and {steps}",
            "leave one out for its default",
        )
    if minutes is None and steps is None:
        minutes = default_minutes
    return Budget(None if minutes is None else minutes * 60, steps)


if __name__ == "__main__":
    run_command(main)

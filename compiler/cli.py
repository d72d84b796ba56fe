"""The command line. Heavy imports happen inside the commands: ``trimode --help`` must feel instant.

Data goes to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import trimode
from trimode.compiler.boundary import run_guarded
from trimode.errors import DependencyError, UsageError

app = typer.Typer(
    name="trimode",
    help="Compile a tri-mode language model once; decode autoregressively, by block diffusion or by self-speculation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Jobs(TyperGroup):
    """Commands of which one may go unnamed: ``trimode calibrate CHECKPOINT`` is ``trimode calibrate scales CHECKPOINT``."""

    unnamed = "scales"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = [self.unnamed, *args]
        return list(super().parse_args(ctx, args))


calibrate = typer.Typer(cls=_Jobs, no_args_is_help=True, help="Find what a build needs from data; without the name of a job: scales.")
app.add_typer(calibrate, name="calibrate")
report = typer.Typer(no_args_is_help=True, help="Measure what a choice costs.")
app.add_typer(report, name="report")
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder written by `trimode build`.")]
RunPrecision = Annotated[str | None, typer.Option("--precision", help="One of the bundle's; the one that was built first if left out.")]
CheckpointPath = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Hugging Face checkpoint.")]
TrainingData = Annotated[
    Path, typer.Option(metavar="FILE", help="JSON lines with `prompt`, `messages` or `token_ids`; the model writes the answers.")
]
ServedDtype = Annotated[str, typer.Option(help="What the bundle computes in: float32 (cpu), bfloat16 or float16. Weights are rounded to it.")]
TrainingSamples = Annotated[
    int | None, typer.Option(metavar="N", help="Prompts to train on, drawn by the seed; all that are not held out if left out.")
]
HeldOut = Annotated[int | None, typer.Option(metavar="N", help="Prompts set aside to measure with; a quarter, at most 64, if left out.")]
AnswerLength = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Device = Annotated[str, typer.Option(help="Where the checkpoint runs: cpu or cuda.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the same command where it was interrupted.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take texts as they are, without the chat template; a model that has none does so anyway.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="Begin each conversation with this system message.")]
Thinking = Annotated[
    bool | None, typer.Option("--enable-thinking/--no-enable-thinking", help="Tell the chat template; what a line says itself goes first.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point: whatever goes wrong ends in one line and a hint."""
    run_guarded(app)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"trimode {trimode.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@app.command()
def build(
    checkpoint: CheckpointPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="Folder to write, or a bundle of this checkpoint to add to.")],
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Where the bundle will run, repeatable; `trimode targets` lists them. [default: cpu]")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16, bf16, fp8, int8, int4 or nvfp4; if left out the bundle's first, for a new one what its targets prefer."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Scales for fp8, int8, int4 or nvfp4; rtn rounds int8, int4 or nvfp4 weights to nearest, without calibration."
        ),
    ] = None,
    drafter: Annotated[
        Path | None, typer.Option(metavar="ADAPTER", help="Drafter adapter in place of the checkpoint's own (`trimode calibrate drafter`).")
    ] = None,
    sampler: Annotated[Path | None, typer.Option(metavar="SAMPLER", help="Learned sampler of block diffusion (`trimode calibrate sampler`).")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer together; if left out the model's limit, at most 32768.")
    ] = None,
    block_lengths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Block lengths to compile engines for; if left out 8, 16, 32 and the model's own.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Most sequences in one forward of an engine.")] = 1,
    quadratic: Annotated[bool, typer.Option("--quadratic", help="Build the graph of quadratic self-speculation too.")] = False,
    weights: Annotated[str, typer.Option(help="Engines share the one pack (shared), or each holds its own copy (baked).")] = "shared",
    workspace: Annotated[int | None, typer.Option(metavar="MIB", help="Most scratch memory of an engine on the GPU.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(metavar="FILE", help="Timing cache of TensorRT (TensorRT-RTX has none).")] = None,
    jobs: Annotated[int | None, typer.Option(help="Engines compiled at a time; one a core if left out.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither use nor fill the cache of traced graphs and engines.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint into a bundle, for one target or several; add targets, or a precision, to a bundle that exists."""
    _need("the compiler", "compile", "torch", "onnx", "onnx_ir", "onnxscript", "filelock")
    from trimode.compiler.build_command import BuildRequest, run_build

    request = BuildRequest(
        tuple(target or ("cpu",)), precision, calibration, drafter, sampler, max_length, block_lengths, max_batch, quadratic, weights, workspace,
        timing_cache, jobs, no_cache, force, as_json,
    )  # fmt: skip
    run_build(checkpoint, output, request)


@calibrate.command()
def scales(
    checkpoint: CheckpointPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="CALIBRATION", help="Folder to write, or a calibration to replace.")],
    precision: Annotated[str, typer.Option(help="fp8, int8 (SmoothQuant), int4 (AWQ) or nvfp4.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines with `prompt`, `messages` or `token_ids`.")],
    samples: Annotated[int | None, typer.Option(metavar="N", help="Prompts to draw by the seed; all of them if left out.")] = None,
    modes: Annotated[str, typer.Option(metavar="MODE,...", help="Graphs whose rows the scales have to fit: ar, draft, verify.")] = "ar,draft,verify",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each prompt in each mode.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    block_size: Annotated[int | None, typer.Option(help="int4: inputs that share a scale, at most; 128 if left out.")] = None,
    per_channel: Annotated[bool, typer.Option("--per-channel", help="fp8: a scale for each row of a weight, instead of one.")] = False,
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="Quantize the output head too.")] = False,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB", help="Decode with float32 weights in memory if they fit into this, else from the files; half of what is free if left out."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where the same command was interrupted; without it, what that left in CALIBRATION.work is deleted."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the scales for a quantized build, from prompts answered in every mode."""
    _need("calibration", "compile", "torch", "safetensors", "ml_dtypes")
    _need("calibration", "calib", "modelopt", "requests")
    from trimode.compiler.calibrate_command import CalibrateRequest, run_calibrate
    from trimode.runtime.prompts import PromptStyle

    request = CalibrateRequest(
        precision,
        data,
        samples,
        modes,
        max_new_tokens,
        seed,
        block_size,
        per_channel,
        quantize_head,
        device,
        as_json,
        memory,
        resume,
        PromptStyle(raw, system, enable_thinking),
    )
    run_calibrate(checkpoint, output, request)


@calibrate.command()
def sensitivity(
    checkpoint: CheckpointPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="CALIBRATION", help="Folder to write, or a calibration to replace.")],
    calibration: Annotated[Path, typer.Option(metavar="FOLDER", help="Scales of `trimode calibrate`, some of which will be left out.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines with `prompt`, `messages` or `token_ids`, and perhaps `answer`.")],
    max_drop: Annotated[float, typer.Option(metavar="POINTS", help="Most that any mode's exact match may lose, in points of 100.")],
    samples: Annotated[int | None, typer.Option(metavar="N", help="Prompts to draw by the seed; all of them if left out.")] = None,
    ranking_samples: Annotated[int, typer.Option(metavar="N", help="Of these, prompts whose rows rank the layers.")] = 8,
    modes: Annotated[
        str, typer.Option(metavar="MODE,...", help="That have to hold the budget: ar, diffusion, linear-spec.")
    ] = "ar,diffusion,linear-spec",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each prompt in each mode.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Leave the most sensitive layers in high precision, as many as a budget on exact match asks for."""
    _need("the sensitivity search", "compile", "torch", "safetensors", "ml_dtypes")
    from trimode.compiler.sensitivity_command import SensitivityRequest, run_sensitivity
    from trimode.runtime.prompts import PromptStyle

    request = SensitivityRequest(
        calibration, data, max_drop, samples, ranking_samples, modes, max_new_tokens, seed, device, as_json, PromptStyle(raw, system, enable_thinking)
    )
    run_sensitivity(checkpoint, output, request)


@report.command()
def quantization(
    checkpoint: CheckpointPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="REPORT", help="Folder to write, or a report to replace.")],
    calibration: Annotated[
        list[str], typer.Option(metavar="FOLDER", help="Scales to measure, repeatable; rtn-int8, rtn-int4 and rtn-nvfp4 round to nearest.")
    ],
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines with `prompt`, `messages` or `token_ids`, and perhaps `answer`.")],
    samples: Annotated[int | None, typer.Option(metavar="N", help="Prompts to draw by the seed; all of them if left out.")] = None,
    modes: Annotated[str, typer.Option(metavar="MODE,...", help="To answer in: ar, diffusion, linear-spec.")] = "ar,diffusion,linear-spec",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each prompt in each mode.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    no_figure: Annotated[bool, typer.Option("--no-figure", help="Leave out the picture, which takes matplotlib.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what quantization costs in each mode; exit code 1 if self-speculation does not give autoregression's tokens."""
    _need("the report", "compile", "torch", "safetensors", "ml_dtypes")
    if not no_figure:
        _need("the report's picture (--no-figure leaves it out)", "calib", "matplotlib")
    from trimode.compiler.report_command import ReportRequest, run_report
    from trimode.runtime.prompts import PromptStyle

    request = ReportRequest(
        tuple(calibration), data, samples, modes, max_new_tokens, seed, device, not no_figure, as_json, PromptStyle(raw, system, enable_thinking)
    )
    if not run_report(checkpoint, output, request):
        raise typer.Exit(1)


@calibrate.command()
def drafter(
    checkpoint: CheckpointPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="ADAPTER", help="Folder to write, or a trained adapter to replace.")],
    data: TrainingData,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Scales of the bundle that the drafter is for; if left out nothing is quantized.")
    ] = None,
    dtype: ServedDtype = "float32",
    steps: Annotated[int | None, typer.Option(help="Steps of training; 300 if neither this nor --minutes is given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for the training, without writing answers and measuring.")] = None,
    samples: TrainingSamples = None,
    held_out: HeldOut = None,
    block_length: Annotated[int | None, typer.Option(help="Slots of a block that will be drafted; the model's if left out.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of a fresh adapter; needed where the checkpoint has none.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Of a fresh adapter, whose branch is scaled by alpha / rank; 4 times the rank if left out.")
    ] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Begin with a fresh adapter, not with the checkpoint's.")] = False,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak; 2e-3 for a fresh adapter, 5e-4 for one that is there.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the draw, of a fresh adapter and of what is trained on.")] = 0,
    max_new_tokens: AnswerLength = 256,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train the drafter's adapter on what the model itself answers, quantized if it will be; for `trimode build --drafter`."""
    _need("training", "compile", "torch", "safetensors", "ml_dtypes")
    from trimode.calib.drafter_job.settings import DrafterJobSettings
    from trimode.compiler.drafter_command import run_drafter
    from trimode.compiler.training_command import TrainingRequest
    from trimode.runtime.prompts import PromptStyle

    settings = DrafterJobSettings(
        dtype, steps, minutes, samples, held_out, block_length, rank, alpha, from_scratch, learning_rate, batch_size, seed, max_new_tokens, device,  # type: ignore[arg-type]  # its check refuses any other type
    )  # fmt: skip
    run_drafter(checkpoint, output, TrainingRequest(data, calibration, resume, as_json, PromptStyle(raw, system, enable_thinking)), settings)


@calibrate.command()
def sampler(
    checkpoint: CheckpointPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="SAMPLER", help="Folder to write, or a trained sampler to replace.")],
    data: TrainingData,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Scales of the bundle that the sampler is for; if left out nothing is quantized.")
    ] = None,
    dtype: ServedDtype = "float32",
    steps: Annotated[int | None, typer.Option(help="Steps of training; 2000 if neither this nor --minutes is given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for the training, without writing states and measuring.")] = None,
    samples: TrainingSamples = None,
    held_out: HeldOut = None,
    target: Annotated[str, typer.Option(help="What is right: the tokens of serial or of leftmost denoising, or the model's own (ar).")] = "serial",
    block_length: Annotated[str, typer.Option(metavar="N,N,...", help="Lengths of the blocks to train on.")] = "8,32",
    d_model: Annotated[int, typer.Option(help="Width of the network.")] = 192,
    layers: Annotated[int, typer.Option(help="Its layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Its attention heads.")] = 8,
    feed_forward: Annotated[int, typer.Option(help="Width of its feed-forward layers.")] = 384,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Slots in a step.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the draw, of the network and of what is trained on.")] = 0,
    max_new_tokens: AnswerLength = 256,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a sampler for block diffusion on the states that its denoising passes through; for `trimode build --sampler`."""
    _need("training", "compile", "torch", "safetensors", "ml_dtypes")
    from trimode.calib.sampler_job.settings import SamplerJobSettings
    from trimode.compiler.sampler_command import run_sampler
    from trimode.compiler.training_command import TrainingRequest
    from trimode.runtime.prompts import PromptStyle

    settings = SamplerJobSettings(
        dtype, steps, minutes, samples, held_out, target, tuple(parse_ints(block_length)), d_model, layers, heads, feed_forward,  # type: ignore[arg-type]  # its check refuses any other type
        learning_rate, batch_size, seed, max_new_tokens, device,
    )  # fmt: skip
    run_sampler(checkpoint, output, TrainingRequest(data, calibration, resume, as_json, PromptStyle(raw, system, enable_thinking)), settings)


@app.command()
def verify(
    bundle: BundlePath,
    against: Annotated[Path, typer.Option(metavar="CHECKPOINT", help="Folder of the checkpoint the bundle was built from.")],
    precision: RunPrecision = None,
    target: Annotated[str | None, typer.Option(metavar="NAME", help="One of the bundle's targets, or portable; what runs here if left out.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Compare the scales with this calibration's, too; those of rtn are always compared.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="JSON lines with `prompt`, `messages` or `token_ids`; random tokens if left out.")] = None,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    drafter: Annotated[Path | None, typer.Option(metavar="ADAPTER", help="The one that the bundle was built with, if not the checkpoint's.")] = None,
    sampler: Annotated[Path | None, typer.Option(metavar="SAMPLER", help="The one that the bundle was built with; else it is not compared.")] = None,
    long: Annotated[
        int | None, typer.Option(metavar="N", help="Position of the long comparisons; if left out past the rope's original length, where affordable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each generation.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads inside one operator; every core if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle with its checkpoint in PyTorch, graph by graph and token by token; exit code 1 if they differ."""
    _need("the reference", "verify", "torch", "polygraphy", "onnxruntime")
    from trimode.compiler.verify_command import VerifyRequest, run_verify
    from trimode.runtime.prompts import PromptStyle

    request = VerifyRequest(
        against,
        precision,
        target,
        calibration,
        prompts_file,
        seed,
        long,
        max_new_tokens,
        threads,
        as_json,
        drafter,
        sampler,
        PromptStyle(raw, system, enable_thinking),
    )
    if not run_verify(bundle, request):
        raise typer.Exit(1)


@app.command()
def targets(as_json: Json = False) -> None:
    """List where bundles can run, and what this machine can compile for and run now."""
    from trimode.compiler.targets_command import list_targets

    list_targets(as_json=as_json)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete every entry that nobody is making; timings stay.")] = False,
    as_json: Json = False,
) -> None:
    """Show, or clear, the cache: traced graphs and engines, weights arranged for this processor, timings."""
    _need("the compiler", "compile", "filelock")
    from trimode.compiler.cache_command import show_cache

    show_cache(clear=clear, as_json=as_json)


@app.command()
def run(
    bundle: BundlePath,
    mode: Annotated[str, typer.Option(help="ar, diffusion, linear-spec, or auto: ar or linear-spec, whichever is faster.")] = "linear-spec",
    prompt: Annotated[str | None, typer.Option(help="Ask this; it goes through the chat template, where there is one.")] = None,
    token_ids: Annotated[str | None, typer.Option(help="Prompt as token ids: 1,2,3.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="JSON lines with `prompt`, `messages` or `token_ids`, and perhaps `answer`.")] = None,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    batch: Annotated[int, typer.Option(metavar="N", help="With --prompts-file, how many to answer side by side.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 512,
    block_length: Annotated[int | None, typer.Option(help="Slots of a block, with auto at most; the model's if left out.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Probability that fills a slot; 0.9 for diffusion, 0 for linear-spec if left out.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --mode diffusion, what fills slots: threshold (if left out), schedule, margin, leftmost or learned."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="With --sampler schedule, denoise forwards of a block; one a slot if left out.")] = None,
    no_drafter: Annotated[bool, typer.Option("--no-drafter", help="Draft without the adapter.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; 0, the most probable token, if left out.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most probable tokens that together have this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Draw from tokens of at least this share of the highest probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Divides the logits of tokens that were there before; 1 is none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws, for each prompt; drawn and reported if left out.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends the answer, which ends before it; repeatable.")] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Fewest tokens to generate.")] = None,
    max_thinking_tokens: Annotated[int | None, typer.Option(help="Tokens after which thinking is ended.")] = None,
    end_think_token_id: Annotated[int | None, typer.Option(metavar="ID", help="Ends thinking; the tokenizer's </think> if left out.")] = None,
    logprobs: Annotated[int | None, typer.Option(metavar="N", help="With --json, log-probabilities of each token and of the N best.")] = None,
    precision: RunPrecision = None,
    target: Annotated[str | None, typer.Option(metavar="NAME", help="One of the precision's targets, or portable; what fits if left out.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads inside one operator; every core if left out.")] = None,
    runtime_cache: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where what is made for this machine is kept.")] = None,
    timings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --mode auto, a table of `trimode bench -o`; if left out what it kept for this machine.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate text, or token ids, in one of the modes; exit code 2 if lines of --prompts-file could not be answered."""
    from trimode.compiler.run_command import RunRequest, run_prompts
    from trimode.runtime.prompts import PromptStyle

    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed,
        "stop": stop, "min_new_tokens": min_new_tokens, "max_thinking_tokens": max_thinking_tokens, "end_think_token_id": end_think_token_id,
        "logprobs": logprobs, "sampler": sampler, "steps": steps,
    }  # fmt: skip
    choices = {name: value for name, value in given.items() if value is not None}
    request = RunRequest(
        mode, prompt, token_ids, prompts_file, max_new_tokens, block_length, threshold, not no_drafter, precision, target, threads,
        runtime_cache, as_json, choices, timings, batch, PromptStyle(raw, system, enable_thinking),
    )  # fmt: skip
    if not run_prompts(bundle, request):
        raise typer.Exit(2)


@app.command()
def bench(
    bundle: BundlePath,
    precision: RunPrecision = None,
    target: Annotated[str | None, typer.Option(metavar="NAME", help="One of the precision's targets, or portable; what fits if left out.")] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens of a forward; 1,4,8,12,16,24,32 or the model's block if left out.")
    ] = None,
    past: Annotated[str | None, typer.Option(metavar="N,N,...", help="Tokens cached before it; 64, 512 and 2048 if left out.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="N,N,...", help="Sequences in a forward; single ones if left out.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds; 20, or what fits into two minutes, if left out.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="JSON lines with `prompt`, `messages` or `token_ids`: what becomes of their drafts is measured too, by how prompts begin."),
    ] = None,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    speed_of_light: Annotated[
        bool, typer.Option("--speed-of-light", help="Measure not time but forwards, over the prompts: the fewest, and what each mode takes.")
    ] = False,
    block_length: Annotated[int | None, typer.Option(help="With --speed-of-light; the model's if left out.")] = None,
    thresholds: Annotated[str | None, typer.Option(metavar="P,P,...", help="With --speed-of-light; 0.5,0.7,0.9,0.95 if left out.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="With --speed-of-light, of each answer; 128 if left out.")] = None,
    no_figure: Annotated[bool, typer.Option("--no-figure", help="Leave out the picture, which takes matplotlib.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads inside one operator; every core if left out.")] = None,
    runtime_cache: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where what is made for this machine is kept.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PLACE", help="Write the table to this file too; with --speed-of-light, a folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the milliseconds of each forward on this machine, and keep them for `run --mode auto`."""
    from trimode.compiler.bench_command import BenchRequest, run_bench
    from trimode.runtime.prompts import PromptStyle

    timer = {"--rows": rows, "--past": past, "--batch": batch, "--repeats": repeats}
    light = {"--block-length": block_length, "--thresholds": thresholds, "--max-new-tokens": max_new_tokens, "--no-figure": no_figure or None}
    misplaced = [name for name, value in (timer if speed_of_light else light).items() if value is not None]
    if misplaced:
        found = f"expected {misplaced[0]} {'without' if speed_of_light else 'together with'} --speed-of-light"
        raise UsageError(f"{found}, found it {'with' if speed_of_light else 'alone'}", "time and forwards are measured by separate commands")
    style = PromptStyle(raw, system, enable_thinking)
    if speed_of_light:
        from trimode.compiler.light_command import LightRequest, run_light

        if output is not None and not no_figure:
            _need("the picture (--no-figure leaves it out)", "calib", "matplotlib")
        light_request = LightRequest(
            precision, target, prompts_file, block_length, thresholds, max_new_tokens, threads, runtime_cache, output, not no_figure, as_json, style
        )
        run_light(bundle, light_request)
        return
    request = BenchRequest(
        precision, target, _numbers(rows), _numbers(past), _numbers(batch), repeats, threads, runtime_cache, prompts_file, output, as_json, style
    )
    run_bench(bundle, request)


@app.command()
def inspect(
    bundle: BundlePath,
    plans: Annotated[bool, typer.Option("--plans", help="Show what a forward of each TensorRT-RTX engine moves on the GPU.")] = False,
    target: Annotated[str | None, typer.Option(metavar="NAME", help="With --plans: engines of this target alone.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a bundle holds: model, graphs, files, sizes, versions."""
    if target is not None and not plans:
        raise UsageError("expected --target with --plans, found it alone", "add --plans, or leave --target out")
    if plans:
        from trimode.compiler.plans.command import inspect_plans

        inspect_plans(bundle, target, as_json=as_json)
        return
    from trimode.compiler.inspect_command import inspect_bundle

    inspect_bundle(bundle, as_json=as_json)


def _need(what: str, extra: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"expected {', '.join(missing)} for {what}, found not installed", f"pip install 'trimode[{extra}]'")


def _numbers(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else tuple(parse_ints(text))


def parse_ints(text: str) -> list[int]:
    """``"1,2,3"`` -> ``[1, 2, 3]``."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"expected whole numbers like 1,2,3, found {text!r}", "separate them by commas") from error


if __name__ == "__main__":
    main()

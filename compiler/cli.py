"""The command line. Heavy imports happen inside the commands: ``trimode --help`` must feel instant.

Data goes to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

import trimode
from trimode.errors import DependencyError, TrimodeError, UsageError, exit_with

app = typer.Typer(
    name="trimode",
    help="Compile a tri-mode language model once; decode autoregressively, by block diffusion or by self-speculation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder written by `trimode build`.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point: turns deliberate errors into one line and a hint (typer sees to interruptions and closed pipes)."""
    try:
        app()
    except TrimodeError as error:
        exit_with(error)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"trimode {trimode.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@app.command()
def build(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Hugging Face checkpoint.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="Folder to write.")],
    target: Annotated[str, typer.Option(help="Where the bundle will run: cpu.")] = "cpu",
    precision: Annotated[str, typer.Option(help="Type of weights and activations: fp32.")] = "fp32",
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer together; if left out the model's limit, at most 32768.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Compile a checkpoint into a bundle: three graphs over one weight pack."""
    _need("the compiler", "compile", "torch", "onnx", "onnx_ir", "onnxscript", "filelock")
    from trimode.compiler.console import RichProgress
    from trimode.compiler.pipeline import BuildOptions, build_bundle

    with RichProgress() as progress:
        manifest = build_bundle(checkpoint, output, BuildOptions(target, precision, max_length, force), progress)
    size = sum(record.num_bytes for record in manifest.files.values())
    sys.stderr.write(f"built {output}: {len(manifest.graphs)} graphs over one weight pack, {size / 1e6:.1f} MB\n")


@app.command()
def run(
    bundle: BundlePath,
    mode: Annotated[str, typer.Option(help="ar, diffusion or linear-spec.")] = "linear-spec",
    prompt: Annotated[str | None, typer.Option(help="What to ask; goes through the chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take --prompt as it is, without the chat template.")] = False,
    token_ids: Annotated[str | None, typer.Option(help="Prompt as token ids: 1,2,3.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="JSON lines with `prompt` or `token_ids`, and perhaps `answer`.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 512,
    block_length: Annotated[int | None, typer.Option(help="Slots of a block; the model's if left out.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Probability that fills a slot; 0.9 for diffusion, 0 for linear-spec if left out.")] = None,
    no_drafter: Annotated[bool, typer.Option("--no-drafter", help="Draft without the adapter.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads inside one operator; every core if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Generate text, or token ids, in one of the modes."""
    _need("the runtime on CPU", "ort", "onnxruntime")
    from trimode.compiler.run_command import RunRequest, run_prompts

    request = RunRequest(mode, prompt, raw, token_ids, prompts_file, max_new_tokens, block_length, threshold, not no_drafter, threads, as_json)
    run_prompts(bundle, request)


@app.command()
def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds: model, graphs, files, sizes, versions."""
    from trimode.compiler.inspect_command import inspect_bundle

    inspect_bundle(bundle, as_json=as_json)


def _need(what: str, extra: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"expected {', '.join(missing)} for {what}, found not installed", f"pip install 'trimode[{extra}]'")


def parse_token_ids(text: str) -> list[int]:
    """``"1,2,3"`` -> ``[1, 2, 3]``."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"expected token ids like 1,2,3, found {text!r}", "separate whole numbers by commas") from error


if __name__ == "__main__":
    main()

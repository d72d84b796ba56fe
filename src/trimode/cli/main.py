"""Collects the commands.

Heavy imports happen inside the commands, so that ``trimode --help`` feels instant.

Data goes to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import trimode
from trimode.cli.bench import forwards
from trimode.cli.bench_serve import bench_serve
from trimode.cli.boundary import run_guarded
from trimode.cli.build import build
from trimode.cli.cache import cache
from trimode.cli.calibrate.drafter import drafter
from trimode.cli.calibrate.sampler import sampler
from trimode.cli.calibrate.scales import scales
from trimode.cli.calibrate.sensitivity import sensitivity
from trimode.cli.groups import BenchGroup, CalibrateGroup
from trimode.cli.inspect import inspect
from trimode.cli.plan import plan
from trimode.cli.report import quantization
from trimode.cli.report_serve import report_serve
from trimode.cli.run import run
from trimode.cli.serve import serve
from trimode.cli.targets import targets
from trimode.cli.verify import verify

app = typer.Typer(
    name="trimode",
    help="Compile a tri-mode language model once; decode autoregressively, by block diffusion "
    "or by self-speculation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


calibrate = typer.Typer(
    cls=CalibrateGroup,
    no_args_is_help=True,
    help="Compute from data what a build needs; scales unless another job is named.",
)
app.add_typer(calibrate, name="calibrate")
bench = typer.Typer(
    cls=BenchGroup,
    no_args_is_help=True,
    help="Measure forwards on this machine, or a server under load; forwards unless named.",
)
app.add_typer(bench, name="bench")
report = typer.Typer(
    no_args_is_help=True, help="Measure the cost of quantization, or compare load tests."
)
app.add_typer(report, name="report")


def main() -> None:
    """Run the command line; a failure ends in one line."""
    run_guarded(app)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"trimode {trimode.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(build)
app.command()(plan)
calibrate.command()(scales)
calibrate.command()(sensitivity)
report.command()(quantization)
calibrate.command()(drafter)
calibrate.command()(sampler)
app.command()(verify)
app.command()(targets)
app.command()(cache)
app.command()(run)
app.command()(serve)
bench.command()(forwards)
bench.command("serve")(bench_serve)
report.command("serve")(report_serve)
app.command()(inspect)


if __name__ == "__main__":
    main()

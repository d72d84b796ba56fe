"""Implements ``trimode bench serve``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimode.cli.flags import LOAD_FLAGS, flags_in_errors
from trimode.cli.options import load as options
from trimode.cli.options.shared import Json
from trimode.cli.parse import need, parse_floats, parse_ints, parse_names
from trimode.errors import UsageError

if TYPE_CHECKING:
    from trimode.loadtest.options import Load, Span
    from trimode.loadtest.plan import LoadTest
    from trimode.loadtest.questions import Questions
    from trimode.loadtest.random_questions import RandomLengths

_USUAL_PROMPTS = 100
_MOST_DRAWN = 1000
"""Random prompts of a run that a duration ends; they come again after that many."""


def bench_serve(
    url: options.Url,
    *,
    data: options.Data = None,
    random_input_len: options.RandomInput = None,
    random_output_len: options.RandomOutput = 128,
    random_range_ratio: options.RandomRange = 0.0,
    shared_prefix: options.SharedPrefix = 0,
    modes: options.Modes = None,
    concurrency: options.Concurrency = None,
    rate: options.Rate = None,
    burstiness: options.Burstiness = None,
    warmup: options.Warmup = 0.0,
    duration: options.Duration = None,
    num_prompts: options.NumPrompts = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    goodput: options.Limits = None,
    check: options.Check = False,
    model: options.Model = None,
    api_key_file: options.ApiKeyFile = None,
    timeout: options.Timeout = 600.0,
    server_pid: options.ServerPid = None,
    output: options.Output = None,
    as_json: Json = False,
) -> None:
    """Put load on an OpenAI-compatible server and measure its answers.

    Exit code 1 if the server fails, or an answer differs with --check.
    """
    need("a load test", "load", "httpx", "prometheus_client")
    from trimode.loadtest.options import Goodput, Sampling, Server
    from trimode.loadtest.plan import LoadTest

    with flags_in_errors(LOAD_FLAGS):
        span = _span(warmup, duration, num_prompts)
        lengths = (random_input_len, random_output_len, random_range_ratio)
        source = _source(data, lengths, span, seed)
        is_random = random_input_len is not None
        sampling = Sampling(
            # as long as drawn: an answer's own limit is the least of both
            max_tokens=max_new_tokens,
            min_tokens=2 * random_output_len if is_random else None,
            temperature=temperature,
            seed=seed,
        )
        test = LoadTest(
            server=Server(url, model, _api_key(api_key_file), timeout, server_pid),
            data=source,
            loads=_loads(concurrency, rate, burstiness),
            modes=(None,) if modes is None else parse_names(modes),
            span=span,
            sampling=sampling,
            goodput=Goodput() if goodput is None else Goodput.parse(goodput),
            shared_prefix=shared_prefix,
            seed=seed,
            checks=check,
        )
        run_bench_serve(test, output, as_json=as_json)


def run_bench_serve(test: LoadTest, output: Path | None, *, as_json: bool) -> None:
    """Measure, write and print; exit with 1 or 130 on trouble."""
    from trimode.cli.console import RichProgress
    from trimode.cli.load_output import complaints, show
    from trimode.cli.output import command_line, print_json
    from trimode.loadtest.job import run_load_test
    from trimode.loadtest.writing import check_output, load_result, write_load_test

    test.check()
    if output is not None:
        check_output(output)
    with RichProgress() as progress:
        measured = run_load_test(test, progress)
    if not measured.runs:
        raise KeyboardInterrupt
    result = load_result(test, measured, command_line())
    if output is not None:
        write_load_test(output, result, measured.requests)
        sys.stderr.write(f"wrote {output}\n")
    if as_json:
        print_json(result, indent=1)
    else:
        show([("", result)])
    faults = complaints(result)
    sys.stderr.write("".join(f"FAILED: {fault}\n" for fault in faults))
    if measured.is_interrupted:
        raise KeyboardInterrupt
    if faults:
        raise typer.Exit(1)


def _span(warmup: float, duration: float | None, num_prompts: int | None) -> Span:
    from trimode.loadtest.options import Span

    if duration is None and num_prompts is None:
        num_prompts = _USUAL_PROMPTS
    span = Span(warmup, duration, num_prompts)
    span.check()
    return span


def _source(
    data: Path | None, lengths: tuple[int | None, int, float], span: Span, seed: int
) -> Questions | RandomLengths:
    from trimode.loadtest.questions import read_questions
    from trimode.loadtest.random_questions import RandomLengths

    input_len, output_len, range_ratio = lengths
    if (data is None) == (input_len is None):
        found = "neither" if data is None else "both"
        raise UsageError(
            f"expected `data` or `random_input_len`, found {found}",
            "name a file of conversations, or the length of random prompts",
        )
    if data is not None:
        return read_questions(data)
    count = span.num_prompts or _MOST_DRAWN
    return RandomLengths(input_len or 0, output_len, range_ratio, count, seed)


def _loads(concurrency: str | None, rate: str | None, burstiness: float | None) -> tuple[Load, ...]:
    from trimode.loadtest.options import Load

    if concurrency is not None and rate is not None:
        raise UsageError(
            "expected `concurrency` or `rate`, found both", "clients wait, or they do not"
        )
    if rate is None:
        if burstiness is not None:
            raise UsageError(
                "expected `burstiness` together with `rate`, found it alone",
                "only an open loop has gaps",
            )
        return tuple(Load(concurrency=one) for one in parse_ints(concurrency or "1"))
    shape = 1.0 if burstiness is None else burstiness
    return tuple(Load(rate=one, burstiness=shape) for one in parse_floats(rate))


def _api_key(file: Path | None) -> str | None:
    from trimode.formats.texts import Unreadable, read_text

    if file is None:
        return os.environ.get("OPENAI_API_KEY") or None
    try:
        return read_text(file).strip() or None
    except Unreadable as error:
        raise UsageError(
            f"{file}: expected a file with the API key, found: {error.reason}", "check the path"
        ) from error

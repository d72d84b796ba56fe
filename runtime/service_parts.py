"""Does what an engine's methods need: opens, checks, fills in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trimode.errors import UsageError
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence
from trimode.runtime.decode.stream import Stream
from trimode.runtime.engine.compiling import Compiling
from trimode.runtime.engine.handle import Handle
from trimode.runtime.engine.load.setup import load_modes
from trimode.runtime.engine.modes import Modes
from trimode.runtime.engine.request import Request
from trimode.runtime.engine.settings import Settings
from trimode.runtime.engine.worker import Worker
from trimode.runtime.measure.trace import RunTrace, TraceWriter
from trimode.runtime.model import TriModeModel
from trimode.runtime.sessions.base import takes_block


def open_model(model: str | Path | TriModeModel, opening: dict[str, Any]) -> TriModeModel:
    """Open a bundle folder with these keywords.

    An opened model is returned as it is.
    """
    if not isinstance(model, TriModeModel):
        return TriModeModel.from_pretrained(model, **opening)
    if opening:
        raise UsageError(
            f"expected no {', '.join(opening)} with an opened model, found it",
            "give it to TriModeModel.from_pretrained",
        )
    return model


def open_stream(model: TriModeModel, sequence: Sequence, request: Request) -> Stream:
    """Open the stream of a request."""
    stream = Stream(sequence, request.mode, request.options, lambda: model.codec)
    stream.observer = request.observer
    return stream


def trace_request(request: Request, trace: TraceWriter, modes: Modes) -> None:
    """Let a request be a run of a trace."""
    run = trace.begin(request.mode, request.ids, request.options, lambda: modes.plan.reason)
    request.observer = run
    request.handle.add_done_callback(lambda handle: _end(run, handle))


def _end(run: RunTrace, handle: Handle) -> None:
    run.end(None if handle.error else handle.result(), handle.error)


def timed(settings: Settings, model: TriModeModel, *, has_plans: bool, is_frozen: bool) -> Settings:
    """Add a table of costs to settings.

    That is where timings of several texts were measured, or where one plan is made for all rows.

    Args:
        settings: Settings otherwise.
        model: Opened model.
        has_plans: Whether one plan is made for all rows.
        is_frozen: Whether the table stays as it was measured.
    """
    timings = model.timings
    if timings is None or not (has_plans or any(one.batch > 1 for one in timings.forwards)):
        return settings
    modes = load_modes(
        timings,
        use_drafter=model.model.has_drafter,
        takes_length=lambda length: takes_block(model.session, length),
        is_frozen=is_frozen,
    )
    if modes is None:
        return settings
    found = replace(settings, table=modes.table, alarm=modes.alarm, observe=modes.observe)
    if not has_plans:
        return found
    return replace(found, mode_policy=modes.policy, make_row_policy=modes.row)


def shut(compiling: Compiling, worker: Worker, model: TriModeModel | None) -> None:
    """Shut what is left of an engine that nobody holds.

    That is its threads, and the model it has opened.
    """
    compiling.close(drain=False)
    worker.stop(drain=False)
    worker.join(None)
    if model is not None:
        model.close()


def with_seed(options: DecodeOptions, number: int) -> DecodeOptions:
    """Return the options of one of several texts after one prompt."""
    seed = options.sampling.seed
    if seed is None or not number:
        return options
    return replace(options, sampling=replace(options.sampling, seed=seed + number))


def check_least(name: str, value: int, least: int) -> None:
    """Raise :class:`UsageError` for a number that is too small."""
    if value < least:
        raise UsageError(f"expected {name} of at least {least}, found {value}", "ask for more")


def check_within(name: str, value: int, most: int) -> None:
    """Raise :class:`UsageError` where a prompt has not so many tokens."""
    if not 0 <= value <= most:
        raise UsageError(
            f"expected {name} from 0 to {most}, found {value}", "count tokens of the prompt"
        )


def check_share(prefill_share: float, latency_target_ms: float) -> None:
    """Raise :class:`UsageError` for a share or a target out of its range."""
    if not 0 < prefill_share < 1:
        raise UsageError(
            f"expected a prefill_share above 0 and below 1, found {prefill_share}", "0.5 is usual"
        )
    if latency_target_ms <= 0:
        raise UsageError(
            f"expected a latency_target_ms above 0, found {latency_target_ms}", "50 is usual"
        )


def check_fits(max_new_tokens: int, prompt_length: int, room: int) -> None:
    """Raise :class:`UsageError` where prompt and answer can never fit."""
    if max_new_tokens > room:
        raise UsageError(
            f"expected at most {room} new tokens after a prompt of {prompt_length}, "
            f"found max_new_tokens {max_new_tokens}",
            "ask for fewer, shorten the prompt, or build with a larger `max_length`",
        )

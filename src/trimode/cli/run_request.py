"""Holds the request of ``trimode run``, and reads its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimode.cli.parse import parse_ints
from trimode.errors import UsageError

if TYPE_CHECKING:
    from trimode.runtime.text.prompts import BadLine, Prompt, PromptStyle


@dataclass(frozen=True)
class RunRequest:
    """Holds what a user asks of ``trimode run``.

    Attributes:
        mode: Name of the mode, as typed.
        decoding: Keywords for :meth:`trimode.runtime.model.TriModeModel.stream`.
        model: Keywords for :meth:`trimode.runtime.model.TriModeModel.from_pretrained`.
        prompt, token_ids, prompts_file: Source of the prompts; exactly one is allowed.
        style: Form in which texts reach the model.
        batch: Number of prompts answered at the same time.
        as_json: Whether answers are printed as JSON.
        trace: File for the trace; None = none is written.
    """

    mode: str
    decoding: Mapping[str, Any]
    model: Mapping[str, Any]
    prompt: str | None
    token_ids: str | None
    prompts_file: Path | None
    style: PromptStyle
    batch: int
    as_json: bool
    trace: Path | None = None


def check_request(request: RunRequest) -> None:
    """Raise :class:`UsageError` if options contradict each other."""
    from trimode.formats.files import check_file_place
    from trimode.runtime.text.prompts import check_text

    if request.model["timings"] is not None and request.mode != "auto":
        raise UsageError(
            "expected --timings together with --mode auto, found another mode", "leave it out"
        )
    if "logprobs" in request.decoding and not request.as_json:
        raise UsageError("expected --logprobs together with --json, found it alone", "add --json")
    if request.batch != 1 and request.prompts_file is None:
        found = (
            f"expected --prompts-file together with --batch, found --batch {request.batch} without"
        )
        raise UsageError(found, "leave it out for a single prompt")
    if request.trace is not None:
        check_file_place(request.trace)
    for text in request.decoding.get("stop", ()):
        check_text(text, "--stop")
    request.style.check()


def read_prompts(request: RunRequest) -> list[Prompt | BadLine]:
    """Read the prompts of a request and check their form."""
    from trimode.runtime.text.prompts import Prompt, apply_style, check_text, read_prompt_lines

    given = [
        name
        for name in ("prompt", "token_ids", "prompts_file")
        if getattr(request, name) is not None
    ]
    if len(given) != 1:
        raise UsageError(
            f"expected one of --prompt, --token-ids and --prompts-file, found {len(given)}",
            "pass exactly one of them",
        )
    if request.prompts_file is not None:
        return read_prompt_lines(request.prompts_file, request.style)
    if request.prompt is not None:
        check_text(request.prompt, "--prompt")
        return [apply_style(Prompt(text=request.prompt), request.style)]
    if request.style.chosen:
        found = (
            f"expected {request.style.chosen[0]} together with --prompt or --prompts-file, "
            "found it with --token-ids"
        )
        raise UsageError(found, "leave it out: token ids are what the model reads, as they are")
    return [Prompt(token_ids=parse_ints(request.token_ids or ""))]

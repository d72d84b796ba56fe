"""``trimode run``: prompts in, text or JSON out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from trimode.cli.options import BundlePath, Json, Raw, RunPrecision, System, Thinking, usual_style
from trimode.cli.parse import parse_ints, parse_mode
from trimode.errors import UsageError

if TYPE_CHECKING:
    from trimode.formats.contract import Mode
    from trimode.runtime.decode.stream import Generation, Stream
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.text.prompts import BadLine, Prompt, PromptStyle


def run(
    bundle: BundlePath,
    mode: Annotated[
        str,
        typer.Option(
            help="ar, diffusion, linear-spec, or auto: ar or linear-spec, whichever is faster."
        ),
    ] = "linear-spec",
    prompt: Annotated[
        str | None,
        typer.Option(help="Ask this; it goes through the chat template, where there is one."),
    ] = None,
    token_ids: Annotated[str | None, typer.Option(help="Prompt as token ids: 1,2,3.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with `prompt`, `messages` or `token_ids`, and perhaps `answer`."
        ),
    ] = None,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    batch: Annotated[
        int, typer.Option(metavar="N", help="With --prompts-file, how many to answer side by side.")
    ] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 512,
    block_length: Annotated[
        int | None,
        typer.Option(help="Slots of a block, with auto at most; the model's if left out."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Probability that fills a slot; 0.9 for diffusion, 0 for linear-spec if left out."
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --mode diffusion, what fills slots: threshold (if left out), schedule, margin, leftmost or learned.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="With --sampler schedule, denoise forwards of a block; one a slot if left out."
        ),
    ] = None,
    no_drafter: Annotated[
        bool, typer.Option("--no-drafter", help="Draft without the adapter.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling; 0, the most probable token, if left out.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most probable tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the most probable tokens that together have this probability."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Draw from tokens of at least this share of the highest probability."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Divides the logits of tokens that were there before; 1 is none."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the draws, for each prompt; drawn and reported if left out."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ends the answer, which ends before it; repeatable."),
    ] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Fewest tokens to generate.")] = None,
    max_thinking_tokens: Annotated[
        int | None, typer.Option(help="Tokens after which thinking is ended.")
    ] = None,
    end_think_token_id: Annotated[
        int | None,
        typer.Option(metavar="ID", help="Ends thinking; the tokenizer's </think> if left out."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --json, log-probabilities of each token and of the N best."
        ),
    ] = None,
    precision: RunPrecision = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of the precision's targets, or portable; what fits if left out.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads inside one operator; every core if left out.")
    ] = None,
    runtime_cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where what is made for this machine is kept."),
    ] = None,
    timings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --mode auto, a table of `trimode bench -o`; if left out what it kept for this machine.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate text, or token ids, in one of the modes; exit code 2 if lines of --prompts-file
    could not be answered.
    """
    from trimode.runtime.text.prompts import PromptStyle

    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
        "min_new_tokens": min_new_tokens,
        "max_thinking_tokens": max_thinking_tokens,
        "end_think_token_id": end_think_token_id,
        "logprobs": logprobs,
        "sampler": sampler,
        "steps": steps,
    }
    choices = {name: value for name, value in given.items() if value is not None}
    request = RunRequest(
        mode,
        prompt,
        token_ids,
        prompts_file,
        max_new_tokens,
        block_length,
        threshold,
        not no_drafter,
        precision,
        target,
        threads,
        runtime_cache,
        as_json,
        choices,
        timings,
        batch,
        PromptStyle(raw, system, enable_thinking),
    )
    if not run_prompts(bundle, request):
        raise typer.Exit(2)


@dataclass(frozen=True)
class RunRequest:
    """The options of the command, as given."""

    mode: str
    prompt: str | None
    token_ids: str | None
    prompts_file: Path | None
    max_new_tokens: int
    block_length: int | None
    threshold: float | None
    use_drafter: bool
    precision: str | None
    target: str | None
    threads: int | None
    runtime_cache: Path | None
    as_json: bool
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of :class:`trimode.runtime.decode.options.TokenChoices` and ``logprobs``, those that
    were given.
    """
    timings: Path | None = None
    batch: int = 1
    style: PromptStyle = field(default_factory=usual_style)


class Question(NamedTuple):
    """A prompt that the model takes, and its token ids."""

    prompt: Prompt
    token_ids: list[int]


class Answer(NamedTuple):
    """A result and its text, None where the bundle has no tokenizer."""

    prompt: Prompt
    result: Generation
    text: str | None


def run_prompts(bundle: Path, request: RunRequest) -> bool:
    """Answer every prompt of a request that can be answered; see the command's help. Returns
    whether that were all.
    """
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.text.prompts import BadLine

    mode = parse_mode(request.mode)
    _check_request(request)
    prompts = read_prompts(request)
    if all(isinstance(one, BadLine) for one in prompts):  # nothing to load a model for
        outcomes: Iterator[Answer | BadLine] = (one for one in prompts if isinstance(one, BadLine))
        return _show_outcomes(outcomes, request)
    with TriModeModel.from_pretrained(
        bundle,
        precision=request.precision,
        target=request.target,
        num_threads=request.threads,
        runtime_cache=request.runtime_cache,
        timings=request.timings,
    ) as model:
        questions = _encode_all(model, prompts)
        answer = _one_by_one if request.batch == 1 else _side_by_side
        return _show_outcomes(answer(model, questions, mode, request), request)


def _check_request(request: RunRequest) -> None:
    """Raise :class:`UsageError` where options contradict each other."""
    from trimode.runtime.text.prompts import check_text

    if request.timings is not None and request.mode != "auto":
        raise UsageError(
            "expected --timings together with --mode auto, found another mode", "leave it out"
        )
    if "logprobs" in request.choices and not request.as_json:
        raise UsageError("expected --logprobs together with --json, found it alone", "add --json")
    if request.batch != 1 and request.prompts_file is None:
        found = (
            f"expected --prompts-file together with --batch, found --batch {request.batch} without"
        )
        raise UsageError(found, "leave it out for a single prompt")
    for text in request.choices.get("stop", ()):
        check_text(text, "--stop")
    request.style.check()


def _encode_all(
    model: TriModeModel, prompts: Sequence[Prompt | BadLine]
) -> list[Question | BadLine]:
    """The prompts' token ids; a line of a file that the model does not take is a bad one."""
    from trimode.runtime.text.prompts import BadLine, warn_of_plain_text

    encoded = [one if isinstance(one, BadLine) else _encode_one(model, one) for one in prompts]
    warn_of_plain_text(
        [one.prompt for one in encoded if isinstance(one, Question)], lambda: model.codec
    )
    return encoded


def _encode_one(model: TriModeModel, prompt: Prompt) -> Question | BadLine:
    from trimode.runtime.text.prompts import BadLine, encode_checked, encode_prompt

    if prompt.line is None:  # the model says what is wrong with its ids
        return Question(prompt, encode_prompt(prompt, lambda: model.codec))
    try:
        return Question(prompt, encode_checked(prompt, lambda: model.codec, model.model))
    except UsageError as error:
        return BadLine(prompt.line, error)


def _show_outcomes(outcomes: Iterator[Answer | BadLine], request: RunRequest) -> bool:
    """Print what becomes of each prompt, in their order; returns whether all were answered."""
    from trimode.cli.output import print_json
    from trimode.runtime.text.prompts import BadLine

    num_right, num_known, num_bad = 0, 0, 0
    for outcome in outcomes:
        if isinstance(outcome, BadLine):
            num_bad += 1
            _show_bad_line(outcome, request)
            continue
        prompt, result, text = outcome
        if prompt.answers:
            num_known += 1
            num_right += text in prompt.answers
        if request.as_json:
            print_json(as_record(result, text, prompt))
        else:
            sys.stderr.write(summary(result) + "\n")
    if num_known:
        sys.stderr.write(f"exact match: {num_right} of {num_known}\n")
    return not num_bad


def _show_bad_line(bad: BadLine, request: RunRequest) -> None:
    """On stderr and, with --json, in the place of the answer."""
    from trimode.cli.output import print_json

    line, error = bad
    sys.stderr.write(
        f"error: {request.prompts_file}, line {line}: {error.message}\nhint: {error.hint}\n"
    )
    if request.as_json:
        print_json({"line": line, "error": error.message})


def read_prompts(request: RunRequest) -> list[Prompt | BadLine]:
    """The prompts of a request, checked for form."""
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
    if request.style.options:
        found = f"expected {request.style.options[0]} together with --prompt or --prompts-file, found it with --token-ids"
        raise UsageError(found, "leave it out: token ids are what the model reads, as they are")
    return [Prompt(token_ids=parse_ints(request.token_ids or ""))]


def as_record(result: Generation, text: str | None, prompt: Prompt) -> dict[str, Any]:
    """The JSON object of one prompt."""
    record: dict[str, Any] = {
        "text": text,
        "token_ids": result.token_ids,
        "mode": result.mode.replace("_", "-"),
        "nfe": result.nfe,
        "prefill_forwards": result.prefill_forwards,
        "tokens_per_forward": round(result.tokens_per_forward, 4),
        "acceptance_length": None
        if result.acceptance_length is None
        else round(result.acceptance_length, 4),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "elapsed_s": round(result.elapsed_s, 6),
    }
    if result.picks is not None:
        record["picks"] = result.picks
    if result.logprobs is not None:
        record["logprobs"] = [
            {"token_id": t.token_id, "logprob": t.logprob, "top": [list(pair) for pair in t.top]}
            for t in result.logprobs
        ]
    if prompt.answers:
        record["is_exact_match"] = text in prompt.answers
    return record


def summary(result: Generation) -> str:
    """One line about a generation for people."""
    from trimode.runtime.auto.policy import AR_STEP

    count = len(result.token_ids)
    parts = [
        f"{result.mode.replace('_', '-')}: {count} tokens",
        f"nfe {result.nfe}",
        f"{result.tokens_per_forward:.2f} tokens per forward",
    ]
    if result.acceptance_length is not None:
        parts.append(f"acceptance length {result.acceptance_length:.2f}")
    if result.picks:
        parts.append(
            "steps "
            + ", ".join(
                f"{count} of {'AR' if length == AR_STEP else f'block {length}'}"
                for length, count in result.picks.items()
            )
        )
    if result.seed is not None:
        parts.append(f"seed {result.seed}")
    speed = count / result.elapsed_s if result.elapsed_s else 0.0
    return ", ".join([*parts, f"{speed:.0f} tokens/s", f"finish {result.finish_reason}"])


def _one_by_one(
    model: TriModeModel, questions: Sequence[Question | BadLine], mode: Mode, request: RunRequest
) -> Iterator[Answer | BadLine]:
    """Answers as they are generated; without --json their text is shown while it comes."""
    from trimode.runtime.text.prompts import BadLine

    for one in questions:
        if isinstance(one, BadLine):
            yield one
            continue
        prompt, token_ids = one
        # options that cannot be show here, before any answer
        stream = model.stream([token_ids], mode, **_options(request))
        try:
            text = (
                _drain(model, stream, prompt)
                if request.as_json
                else _show_stream(model, stream, prompt)
            )
        except UsageError as error:
            if prompt.line is None:
                raise
            yield BadLine(prompt.line, error)
        else:
            yield Answer(prompt, stream.result, text)


def _side_by_side(
    model: TriModeModel, questions: Sequence[Question | BadLine], mode: Mode, request: RunRequest
) -> Iterator[Answer | BadLine]:
    """Answers in the order of the prompts, each once those before it are there; without --json
    their text is shown then.
    """
    from trimode.cli.batch_answers import BatchQuestion, answer_side_by_side
    from trimode.runtime.text.prompts import BadLine

    asked = [
        BatchQuestion(one.token_ids, _has_text(model, one.prompt))
        for one in questions
        if isinstance(one, Question)
    ]
    outcomes = answer_side_by_side(model.new_batch(request.batch), asked, mode, _options(request))
    for one in questions:
        if isinstance(one, BadLine):
            yield one
            continue
        outcome = next(outcomes)
        if isinstance(outcome, UsageError):
            yield BadLine(one.prompt.line or 0, outcome)
            continue
        if not request.as_json:
            shown = _join_ids(outcome.result.token_ids) if outcome.text is None else outcome.text
            sys.stdout.write(shown + "\n")
            sys.stdout.flush()
        yield Answer(one.prompt, *outcome)


def _options(request: RunRequest) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "use_drafter": request.use_drafter,
        **request.choices,
    }
    for name in ("block_length", "threshold"):
        if getattr(request, name) is not None:
            chosen[name] = getattr(request, name)
    return chosen


def _drain(model: TriModeModel, stream: Stream, prompt: Prompt) -> str | None:
    if _has_text(model, prompt):
        return "".join(stream.text())
    stream.finish()
    return None


def _show_stream(model: TriModeModel, stream: Stream, prompt: Prompt) -> str | None:
    if not _has_text(model, prompt):
        sys.stdout.write(_join_ids(stream.finish().token_ids) + "\n")
        return None
    pieces = []
    for piece in stream.text():
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(pieces)


def _join_ids(token_ids: list[int]) -> str:
    return ",".join(map(str, token_ids))


def _has_text(model: TriModeModel, prompt: Prompt) -> bool:
    return prompt.token_ids is None or (model.bundle.path / "tokenizer.json").is_file()

"""``trimode run``: prompts in, text or JSON out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimode.compiler.cli import parse_ints
from trimode.errors import UsageError
from trimode.runtime.auto import AR_STEP
from trimode.runtime.batch import BatchRequest
from trimode.runtime.decode import MODES
from trimode.runtime.model import TriModeModel
from trimode.runtime.options import Mode
from trimode.runtime.stream import Generation, Stream
from trimode.runtime.text import TextStream

Answer = tuple[Generation, str | None]
"""A result and its text, None where the bundle has no tokenizer."""
_LINE_HINT = 'write {"prompt": "..."} or {"token_ids": [1, 2]}'


@dataclass(frozen=True)
class RunRequest:
    """The options of the command, as given."""

    mode: str
    prompt: str | None
    raw: bool
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
    """Keywords of :class:`trimode.runtime.options.TokenChoices` and ``logprobs``, those that were given."""
    timings: Path | None = None
    batch: int = 1


@dataclass(frozen=True)
class Prompt:
    """One thing to answer; ``answers`` are all right ones, where these are known."""

    text: str | None = None
    token_ids: list[int] | None = None
    answers: tuple[str, ...] = ()


def run_prompts(bundle: Path, request: RunRequest) -> None:
    """Answer every prompt of a request; see the command's help."""
    mode = parse_mode(request.mode)
    if request.timings is not None and mode != "auto":
        raise UsageError("expected --timings together with --mode auto, found another mode", "leave it out")
    if "logprobs" in request.choices and not request.as_json:
        raise UsageError("expected --logprobs together with --json, found it alone", "add --json")
    if request.batch != 1 and request.prompts_file is None:
        raise UsageError(f"expected --prompts-file together with --batch, found --batch {request.batch} without", "leave it out for a single prompt")
    prompts = list(read_prompts(request))
    model = TriModeModel.from_pretrained(
        bundle, precision=request.precision, target=request.target, num_threads=request.threads, runtime_cache=request.runtime_cache,
        timings=request.timings,
    )  # fmt: skip
    num_right, num_known = 0, 0
    answers = _one_by_one(model, prompts, mode, request) if request.batch == 1 else _side_by_side(model, prompts, mode, request)
    for prompt, (result, text) in zip(prompts, answers, strict=True):
        if prompt.answers:
            num_known += 1
            num_right += text in prompt.answers
        if request.as_json:
            sys.stdout.write(json.dumps(as_record(result, text, prompt), ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            sys.stderr.write(summary(result) + "\n")
    model.close()
    if num_known:
        sys.stderr.write(f"exact match: {num_right} of {num_known}\n")


def parse_mode(text: str) -> Mode:
    """``linear-spec`` -> ``linear_spec``; raises :class:`UsageError` for anything that is no mode."""
    for mode in MODES:
        if text == mode.replace("_", "-"):
            return mode
    raise UsageError(f"expected --mode {', '.join(m.replace('_', '-') for m in MODES)}, found {text!r}", "choose one of these")


def read_prompts(request: RunRequest) -> Iterator[Prompt]:
    """The prompts of a request, checked for form."""
    given = [name for name in ("prompt", "token_ids", "prompts_file") if getattr(request, name) is not None]
    if len(given) != 1:
        raise UsageError(f"expected one of --prompt, --token-ids and --prompts-file, found {len(given)}", "pass exactly one of them")
    if request.raw and request.prompt is None:
        raise UsageError("expected --raw together with --prompt, found it alone", "token ids and prompt files say themselves what they are")
    if request.prompt is not None:
        if not request.prompt:
            raise UsageError("expected a prompt, found an empty one", "pass some text to --prompt")
        yield Prompt(text=request.prompt)
    elif request.token_ids is not None:
        yield Prompt(token_ids=parse_ints(request.token_ids))
    else:
        assert request.prompts_file is not None
        yield from read_prompts_file(request.prompts_file)


def read_prompts_file(path: Path) -> Iterator[Prompt]:
    """One JSON object a line; blank lines are skipped.

    Raises:
        UsageError: the file cannot be read, is empty, or a line is not of the form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a readable UTF-8 file, found: {error}", "check the path") from error
    number = 0
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse_line(line, f"{path}, line {number}")
    if not any(line.strip() for line in lines):
        raise UsageError(f"{path}: expected at least one prompt, found none", 'write one JSON object a line: {"prompt": "..."}')


def as_record(result: Generation, text: str | None, prompt: Prompt) -> dict[str, Any]:
    """The JSON object of one prompt."""
    record: dict[str, Any] = {
        "text": text,
        "token_ids": result.token_ids,
        "mode": result.mode.replace("_", "-"),
        "nfe": result.nfe,
        "prefill_forwards": result.prefill_forwards,
        "tokens_per_forward": round(result.tokens_per_forward, 4),
        "acceptance_length": None if result.acceptance_length is None else round(result.acceptance_length, 4),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "elapsed_s": round(result.elapsed_s, 6),
    }
    if result.picks is not None:
        record["picks"] = result.picks
    if result.logprobs is not None:
        record["logprobs"] = [{"token_id": t.token_id, "logprob": t.logprob, "top": [list(pair) for pair in t.top]} for t in result.logprobs]
    if prompt.answers:
        record["is_exact_match"] = text in prompt.answers
    return record


def summary(result: Generation) -> str:
    """One line about a generation for people."""
    count = len(result.token_ids)
    parts = [f"{result.mode.replace('_', '-')}: {count} tokens", f"nfe {result.nfe}", f"{result.tokens_per_forward:.2f} tokens per forward"]
    if result.acceptance_length is not None:
        parts.append(f"acceptance length {result.acceptance_length:.2f}")
    if result.picks:
        parts.append("steps " + ", ".join(f"{count} of {'AR' if length == AR_STEP else f'block {length}'}" for length, count in result.picks.items()))
    if result.seed is not None:
        parts.append(f"seed {result.seed}")
    speed = count / result.elapsed_s if result.elapsed_s else 0.0
    return ", ".join([*parts, f"{speed:.0f} tokens/s", f"finish {result.finish_reason}"])


def _parse_line(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: expected a JSON object, found {line[:40]!r}", _LINE_HINT) from error
    text, ids, answer = (value.get(k) for k in ("prompt", "token_ids", "answer")) if isinstance(value, dict) else (None, None, None)
    is_text, is_ids = isinstance(text, str) and bool(text), isinstance(ids, list) and all(isinstance(i, int) for i in ids)
    if is_text == is_ids:
        raise UsageError(f"{where}: expected either `prompt` (text) or `token_ids` (a list), found {line[:40]!r}", _LINE_HINT)
    answers = [] if answer is None else answer if isinstance(answer, list) else [answer]
    if answer == [] or not all(isinstance(one, str) for one in answers):
        raise UsageError(f"{where}: expected `answer` to be a text or a list of texts, found {answer!r}", "leave it out where it is not known")
    return Prompt(text, ids, tuple(answers))


def _one_by_one(model: TriModeModel, prompts: Sequence[Prompt], mode: Mode, request: RunRequest) -> Iterator[Answer]:
    """Answers as they are generated; without --json their text is shown while it comes."""
    for prompt in prompts:
        stream = model.stream([encode_prompt(model, prompt, raw=request.raw)], mode, **_options(request))
        text = _show_stream(model, stream, prompt) if not request.as_json else _drain(model, stream, prompt)
        yield stream.result, text


def _side_by_side(model: TriModeModel, prompts: Sequence[Prompt], mode: Mode, request: RunRequest) -> Iterator[Answer]:
    """Answers in the order of the prompts, each once those before it are there; without --json their text is shown then."""
    requests = [BatchRequest(encode_prompt(model, prompt, raw=request.raw), mode, _options(request)) for prompt in prompts]
    batch = model.new_batch(request.batch)
    pieces: dict[int, list[str]] = {}
    texts: dict[int, TextStream] = {}
    finished: dict[int, Answer] = {}
    following = 0
    for number, row, chunk in batch.answer_all(requests):
        if _has_text(model, prompts[number]):
            text = texts.setdefault(number, row.stream.new_text())
            pieces.setdefault(number, []).append(text.push(chunk.token_ids))
        if chunk.finish_reason is not None:
            whole = "".join([*pieces.pop(number), texts.pop(number).finish()]) if number in texts else None
            finished[number] = row.result, whole
        while following in finished:
            result, whole = finished.pop(following)
            if not request.as_json:
                sys.stdout.write((_join_ids(result.token_ids) if whole is None else whole) + "\n")
                sys.stdout.flush()
            yield result, whole
            following += 1


def encode_prompt(model: TriModeModel, prompt: Prompt, *, raw: bool = False) -> list[int]:
    """Token ids of a prompt; text goes through the chat template, unless it is to be taken as it is."""
    if prompt.token_ids is not None:
        return prompt.token_ids
    assert prompt.text is not None
    return model.codec.encode(prompt.text) if raw else model.codec.encode_chat([{"role": "user", "content": prompt.text}])


def _options(request: RunRequest) -> dict[str, Any]:
    chosen: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "use_drafter": request.use_drafter, **request.choices}
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
    return prompt.text is not None or (model.bundle.path / "tokenizer.json").is_file()

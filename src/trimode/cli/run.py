"""Implements ``trimode run``: answers prompts in text or JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimode.cli.options import run as options
from trimode.cli.options.shared import (
    BundlePath,
    Json,
    Raw,
    RunPrecision,
    RunTarget,
    RuntimeCache,
    System,
    Thinking,
    Threads,
)
from trimode.cli.parse import given, parse_biases, parse_mode
from trimode.cli.prompt_options import prompt_style
from trimode.cli.run_request import RunRequest, check_request, read_prompts
from trimode.cli.structured import structured_outputs

if TYPE_CHECKING:
    from trimode.cli.answers import Answer
    from trimode.runtime.text.prompts import BadLine


def run(
    bundle: BundlePath,
    *,
    mode: options.Mode = "linear-spec",
    prompt: options.PromptText = None,
    token_ids: options.TokenIds = None,
    prompts_file: options.PromptsFile = None,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    batch: options.BatchSize = 1,
    max_new_tokens: options.MaxNewTokens = 512,
    block_length: options.BlockLength = None,
    threshold: options.Threshold = None,
    sampler: options.Sampler = None,
    steps: options.Steps = None,
    no_drafter: options.NoDrafter = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    min_new_tokens: options.MinNewTokens = None,
    max_thinking_tokens: options.MaxThinkingTokens = None,
    end_think_token_id: options.EndThinkTokenId = None,
    logprobs: options.Logprobs = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    choice: options.Choice = None,
    grammar: options.GrammarFile = None,
    json_object: options.JsonObject = False,
    compact: options.Compact = False,
    after_thinking: options.AfterThinking = False,
    precision: RunPrecision = None,
    target: RunTarget = None,
    threads: Threads = None,
    runtime_cache: RuntimeCache = None,
    timings: options.TimingsFile = None,
    trace: options.TraceFile = None,
    as_json: Json = False,
) -> None:
    """Generate text or token ids.

    The exit code is 2 if a line of --prompts-file has no answer.
    """
    flags = {"json_object": json_object, "compact": compact, "after_thinking": after_thinking}
    asked = structured_outputs(json_schema, regex, choice, grammar, **flags)
    decoding = {
        "max_new_tokens": max_new_tokens,
        "use_drafter": not no_drafter,
        **given(block_length=block_length, threshold=threshold, sampler=sampler, steps=steps),
        **given(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed),
        **given(repetition_penalty=repetition_penalty, stop=stop, min_new_tokens=min_new_tokens),
        **given(presence_penalty=presence_penalty, frequency_penalty=frequency_penalty),
        **given(max_thinking_tokens=max_thinking_tokens, end_think_token_id=end_think_token_id),
        **given(logit_bias=parse_biases(logit_bias), logprobs=logprobs, structured_outputs=asked),
    }
    machine = {"num_threads": threads, "runtime_cache": runtime_cache, "timings": timings}
    request = RunRequest(
        mode,
        decoding,
        {"precision": precision, "target": target, **machine},
        prompt=prompt,
        token_ids=token_ids,
        prompts_file=prompts_file,
        style=prompt_style(raw, system, enable_thinking),
        batch=batch,
        as_json=as_json,
        trace=trace,
    )
    if not run_prompts(bundle, request):
        raise typer.Exit(2)


def run_prompts(bundle: Path, request: RunRequest) -> bool:
    """Answer the prompts of a request and print the answers.

    Returns:
        Whether every prompt has an answer.
    """
    from trimode.cli.answer_output import show_outcomes
    from trimode.cli.answers import encode_all, one_by_one, side_by_side
    from trimode.cli.trace_output import TraceFile
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.text.prompts import BadLine

    mode = parse_mode(request.mode)
    check_request(request)
    prompts = read_prompts(request)
    if all(isinstance(one, BadLine) for one in prompts):  # nothing to load a model for
        outcomes: Iterator[Answer | BadLine] = (one for one in prompts if isinstance(one, BadLine))
        return show_outcomes(outcomes, request)
    with TriModeModel.from_pretrained(bundle, **request.model) as model:
        questions = encode_all(model, prompts)
        answer = one_by_one if request.batch == 1 else side_by_side
        trace = None if request.trace is None else TraceFile(model, request.trace)
        is_whole = show_outcomes(answer(model, questions, mode, request, trace), request)
        if trace is not None:
            trace.save()
        return is_whole

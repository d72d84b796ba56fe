"""Declares the options of ``trimode run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Mode = Annotated[
    str,
    typer.Option(
        help="Decoding mode: ar, diffusion, linear-spec, or auto (the faster of ar and "
        "linear-spec)."
    ),
]
PromptText = Annotated[
    str | None, typer.Option(help="Prompt as text; the model's chat template is applied.")
]
TokenIds = Annotated[str | None, typer.Option(help="Prompt as token ids: 1,2,3.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        help="File of prompts, JSON lines with `prompt`, `messages` or `token_ids`; "
        "`answer` is optional."
    ),
]
BatchSize = Annotated[
    int, typer.Option(metavar="N", help="Prompts of --prompts-file to answer at the same time.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
MinNewTokens = Annotated[int | None, typer.Option(help="Fewest tokens to generate.")]
BlockLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens per block; an upper limit with --mode auto; default: the model's block size."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Probability from which a token is accepted; "
        "default: 0.9 for diffusion, 0 for linear-spec."
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Rule that fills slots in --mode diffusion: "
        "threshold (default), schedule, margin, leftmost or learned.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Denoising forwards per block with --sampler schedule; default: one per slot."
    ),
]
NoDrafter = Annotated[bool, typer.Option("--no-drafter", help="Draft without the adapter.")]
Temperature = Annotated[
    float | None,
    typer.Option(help="Temperature for sampling; default: 0, the most probable token."),
]
TopK = Annotated[int | None, typer.Option(help="Sample from the K most probable tokens.")]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the most probable tokens that together reach probability P."),
]
MinP = Annotated[
    float | None, typer.Option(help="Drop tokens below this share of the highest probability.")
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Divisor for the logits of tokens already in the text; 1 changes nothing."),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="Taken from the logits of tokens already in the answer; -2 to 2."
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="Taken from these logits once for each time the answer has the token."
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(metavar="ID=X", help="Added to the logit of this token, -100 to 100; repeatable."),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed for sampling, used for each prompt; default: random and reported."),
]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text; repeatable.")
]
MaxThinkingTokens = Annotated[
    int | None, typer.Option(help="Most thinking tokens; then thinking is ended.")
]
EndThinkTokenId = Annotated[
    int | None, typer.Option(metavar="ID", help="Token id that ends thinking; default: </think>.")
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Add to --json the log-probabilities of each token and of the N most probable ones.",
    ),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|JSON", help="JSON schema that the answer follows: a file, or the text of one."
    ),
]
Regex = Annotated[
    str | None, typer.Option(metavar="R", help="Regular expression that the whole answer matches.")
]
Choice = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Text that the answer may be; repeatable."),
]
GrammarFile = Annotated[
    Path | None,
    typer.Option(
        "--grammar", metavar="FILE", help="Grammar that the answer follows, in Lark's form or GBNF."
    ),
]
JsonObject = Annotated[bool, typer.Option("--json-object", help="Answer with any JSON object.")]
Compact = Annotated[bool, typer.Option("--compact", help="Answer with JSON without blanks.")]
AfterThinking = Annotated[
    bool,
    typer.Option(
        "--after-thinking", help="Let the schema or grammar begin after the token </think>."
    ),
]
TimingsFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Timings for --mode auto, written by `trimode bench -o`; "
        "default: those kept for this machine.",
    ),
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Write each forward and its effect to this file, as JSON lines for /watch.",
    ),
]

"""Holds what a caller can choose about decoding, and checks it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, get_args

from trimode.errors import UsageError
from trimode.formats.contract import TOP_K, Mode, ModelInfo
from trimode.runtime.auto.policy import StepCosts
from trimode.runtime.decode.arguments import (
    BIASES,
    FLAG,
    NUMBER,
    TEXT,
    TEXTS,
    TOKEN_IDS,
    WHOLE,
    Kind,
    check_names,
    checked,
    instance_of,
)
from trimode.runtime.decode.sampling import SamplingOptions, check_sampling
from trimode.runtime.decode.unmasking import SamplerName, Scorer
from trimode.runtime.grammar.spec import StructuredOutputs, read_structured_outputs

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
DEFAULT_THRESHOLDS: dict[Mode, float] = {
    "ar": 0.9,
    "diffusion": 0.9,
    "linear_spec": 0.0,
    "quadratic_spec": 0.0,
    "auto": 0.0,
}
DEFAULT_MARGIN = 0.8
"""Threshold of the sampler ``margin``."""
DEFAULT_QUADRATIC_LENGTH = 16
"""Block length of the reference: rows of a forward grow with the square."""


@dataclass(frozen=True)
class DecodeOptions:
    """Holds what a caller can choose.

    Attributes:
        max_new_tokens: Most tokens that any mode returns.
        block_length: Number of slots of a block, the first of which is always a token already
            decided. For ``auto`` the most that a block may have.
        threshold: Probability at which a masked slot is filled; the most probable slot always is. 0
            fills all at once. With the samplers ``margin`` and ``learned`` a margin or a score has
            to reach it.
        use_drafter: Whether to draft with the adapter where the bundle has one; changes speed,
            never tokens. Quadratic self-speculation never does.
        eos_token_ids: Tokens any of which ends a text; None = the model's.
        sampling: Options of how the next token is drawn.
        min_new_tokens: Least number of tokens: no end token, and no stop string, ends the text
            before it has as many.
        stop: Texts that end the answer when they appear in it; they are not part of it.
        max_thinking_tokens: Number of tokens after which ``end_think_token_id`` is the next one,
            where none has come by then; None = no budget.
        end_think_token_id: Token that ends thinking.
        logprobs: Number of most probable tokens whose log-probabilities are reported with each
            token's own; None = nothing is reported.
        costs: Step costs that ``auto`` chooses by; None = it does not choose, and speculates with
            ``block_length``.
        sampler: Name of the policy by which diffusion fills slots of a block after a forward
            (:mod:`trimode.runtime.decode.unmasking`).
        steps: Number of denoise forwards of a block, for the sampler ``schedule``; None = one a
            slot.
        scorer: Scorer that the sampler ``learned`` asks.
        structured_outputs: Form that the answer has to follow; None = any.
    """

    max_new_tokens: int = 128
    block_length: int = 32
    threshold: float = 0.9
    use_drafter: bool = True
    eos_token_ids: tuple[int, ...] | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    max_thinking_tokens: int | None = None
    end_think_token_id: int | None = None
    logprobs: int | None = None
    costs: StepCosts | None = None
    sampler: SamplerName = "threshold"
    steps: int | None = None
    scorer: Scorer | None = None
    structured_outputs: StructuredOutputs | None = None

    def end_tokens(self, model: ModelInfo) -> tuple[int, ...]:
        """Return the tokens that end a text."""
        return model.eos_token_ids if self.eos_token_ids is None else self.eos_token_ids

    @property
    def is_plain(self) -> bool:
        """Whether the ids that the graphs return are the tokens.

        Nothing is drawn, penalised, forbidden, forced or reported then, and no grammar is followed.
        """
        is_free = (
            self.min_new_tokens == 0
            and self.max_thinking_tokens is None
            and self.logprobs is None
            and self.structured_outputs is None
        )
        return is_free and not self.sampling.is_random and not self.sampling.changes_logits


class TokenChoices(TypedDict, total=False):
    """Names the keywords that every way to generate takes.

    See :class:`DecodeOptions` and :class:`~trimode.runtime.decode.sampling.SamplingOptions`.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    min_new_tokens: int
    stop: str | Seq[str]
    max_thinking_tokens: int | None
    end_think_token_id: int | None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None


KINDS: dict[str, Kind] = {
    "max_new_tokens": WHOLE,
    "block_length": WHOLE,
    "threshold": NUMBER,
    "use_drafter": FLAG,
    "eos_token_ids": TOKEN_IDS.or_none(),
    "min_new_tokens": WHOLE,
    "stop": TEXTS.or_none(),
    "max_thinking_tokens": WHOLE.or_none(),
    "end_think_token_id": WHOLE.or_none(),
    "logprobs": WHOLE.or_none(),
    "costs": instance_of(StepCosts, "step costs").or_none(),
    "sampler": TEXT,
    "steps": WHOLE.or_none(),
    "scorer": instance_of(Scorer, "a scorer").or_none(),
    "temperature": NUMBER,
    "top_k": WHOLE,
    "top_p": NUMBER,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "logit_bias": BIASES.or_none(),
    "seed": WHOLE.or_none(),
    "structured_outputs": Kind("what an answer follows", read_structured_outputs).or_none(),
}
"""What the attributes of :class:`DecodeOptions` and :class:`SamplingOptions` take, by name."""
MODE = {"mode": TEXT}

_SAMPLING = frozenset(f.name for f in fields(SamplingOptions))


def read_options(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords in plain types.

    ``stop`` may be one text or several, ``eos_token_ids`` one id or several, ``logit_bias`` a
    mapping.

    Raises:
        UsageError: an unknown keyword, or a value of the wrong type.
    """
    check_names(chosen, KINDS, "options")
    return checked(chosen, KINDS)


def make_options(**chosen: Any) -> DecodeOptions:
    """Make options from keywords, those of :class:`SamplingOptions` among them.

    Raises:
        UsageError: an unknown keyword, or a value of the wrong type.
    """
    read = read_options(chosen)
    for name in ("stop", "logit_bias"):
        if name in read:
            read[name] = read[name] or ()
    sampling = SamplingOptions(**{name: value for name, value in read.items() if name in _SAMPLING})
    rest = {name: value for name, value in read.items() if name not in _SAMPLING}
    return DecodeOptions(sampling=sampling, **rest)


def check_options(options: DecodeOptions, model: ModelInfo, mode: Mode) -> None:
    """Raise :class:`UsageError` for an option out of its range."""
    if not 1 <= options.block_length <= model.max_block_length:
        found = (
            f"expected a block length from 1 to {model.max_block_length}, "
            f"found {options.block_length}"
        )
        raise UsageError(found, f"the model was trained with {model.block_size}")
    if not 0 <= options.threshold <= 1:
        hint = "it is a probability; 0.9 is usual for diffusion, 0 for self-speculation"
        raise UsageError(f"expected a threshold from 0 to 1, found {options.threshold}", hint)
    if mode == "auto" and options.threshold != 0:
        hint = "leave it out: auto drafts in one forward, whose time is known beforehand"
        raise UsageError(f"expected no threshold in mode auto, found {options.threshold}", hint)
    _check_sampler(options, mode)
    check_sampling(options.sampling)
    _check_biases(options, model, mode)
    _check_limits(options, model, mode)
    _check_thinking(options, model)
    _check_structured(options)
    _check_logprobs(options, model, mode)
    if mode == "quadratic_spec":
        _check_plain(options)


def _check_sampler(options: DecodeOptions, mode: Mode) -> None:
    if options.sampler not in SAMPLERS:
        raise UsageError(
            f"expected a sampler among {', '.join(SAMPLERS)}, found {options.sampler!r}",
            "choose one of these",
        )
    if mode != "diffusion" and options.sampler != "threshold":
        raise UsageError(
            f"expected the sampler {options.sampler} in mode diffusion, "
            f"found mode {mode.replace('_', '-')}",
            "choose that mode, or leave the sampler out",
        )
    if options.steps is None:
        return
    if options.sampler != "schedule":
        raise UsageError(
            "expected steps together with the sampler schedule, "
            f"found them with {options.sampler} in mode {mode.replace('_', '-')}",
            "leave them out, or choose that sampler",
        )
    if not 1 <= options.steps <= options.block_length:
        raise UsageError(
            f"expected from 1 to {options.block_length} steps, "
            f"one for each slot of a block, found {options.steps}",
            "leave them out for one a slot",
        )


def _check_biases(options: DecodeOptions, model: ModelInfo, mode: Mode) -> None:
    for token, _ in options.sampling.logit_bias:
        _check_token("a token of logit_bias", token, model)
    if options.sampling.logit_bias and mode == "diffusion":
        raise UsageError(
            "expected no logit_bias in mode diffusion, found it",
            "a denoise forward names five candidates for a slot, and the token need not be among "
            "them; ar and linear_spec know all logits",
        )


def _check_limits(options: DecodeOptions, model: ModelInfo, mode: Mode) -> None:
    if options.max_new_tokens < 1:
        raise UsageError(
            f"expected max_new_tokens of at least 1, found {options.max_new_tokens}",
            "ask for at least one token",
        )
    if not 0 <= options.min_new_tokens <= options.max_new_tokens:
        found = (
            "expected min_new_tokens from 0 to max_new_tokens "
            f"({options.max_new_tokens}), found {options.min_new_tokens}"
        )
        raise UsageError(found, "ask for fewer, or raise max_new_tokens")
    if "" in options.stop:
        raise UsageError(
            "expected stop strings with text in them, found an empty one", "leave it out"
        )
    ends = options.end_tokens(model)
    for token in ends:
        _check_token("an end token", token, model)
    if model.mask_token_id in ends:
        raise UsageError(
            f"expected end tokens other than the mask token, found {model.mask_token_id}",
            "a slot that is still masked ends nothing",
        )
    if (
        mode == "diffusion"
        and options.min_new_tokens
        and len(set(ends)) >= min(TOP_K, model.vocab_size)
    ):
        found = (
            f"expected fewer than {min(TOP_K, model.vocab_size)} end tokens "
            f"together with min_new_tokens in diffusion, found {len(set(ends))}"
        )
        raise UsageError(
            found,
            "a denoise forward names five candidates for a slot, and one of them must be allowed",
        )


def _check_thinking(options: DecodeOptions, model: ModelInfo) -> None:
    if options.max_thinking_tokens is None:
        return
    if options.max_thinking_tokens < 0:
        raise UsageError(
            f"expected max_thinking_tokens of 0 or more, found {options.max_thinking_tokens}",
            "leave it out for no budget",
        )
    if options.end_think_token_id is None:
        raise UsageError(
            "expected end_think_token_id together with max_thinking_tokens, found none",
            "pass the id of the token that ends thinking",
        )
    _check_token("end_think_token_id", options.end_think_token_id, model)
    if options.end_think_token_id in options.end_tokens(model):
        found = (
            "expected an end_think_token_id that ends no text, "
            f"found {options.end_think_token_id}, which is among the end tokens"
        )
        raise UsageError(found, "the answer comes after it; pass other eos_token_ids")


def _check_structured(options: DecodeOptions) -> None:
    asked = options.structured_outputs
    if asked is None:
        return
    if options.max_thinking_tokens is not None and not asked.after_thinking:
        raise UsageError(
            "expected after_thinking in structured_outputs together with max_thinking_tokens, "
            "found it False",
            "set it, or leave max_thinking_tokens out",
        )
    if asked.after_thinking and options.end_think_token_id is None:
        raise UsageError(
            "expected end_think_token_id together with after_thinking, found none",
            "pass the id of the token that ends thinking",
        )


def _check_logprobs(options: DecodeOptions, model: ModelInfo, mode: Mode) -> None:
    most = min(TOP_K, model.vocab_size) if mode == "diffusion" else model.vocab_size
    if options.logprobs is not None and not 0 <= options.logprobs <= most:
        found = f"expected logprobs from 0 to {most}, found {options.logprobs}"
        raise UsageError(
            found,
            "0 reports the chosen tokens alone; a denoise forward names five candidates for a slot",
        )


def _check_plain(options: DecodeOptions) -> None:
    """Refuse options that quadratic self-speculation cannot follow.

    Its graph decides by itself which drafts are right, and drafts behind them in the same forward.
    """
    chosen = {
        "temperature": options.sampling.is_random,
        "repetition_penalty": options.sampling.repetition_penalty != 1,
        "presence_penalty": options.sampling.presence_penalty != 0,
        "frequency_penalty": options.sampling.frequency_penalty != 0,
        "logit_bias": bool(options.sampling.logit_bias),
        "min_new_tokens": options.min_new_tokens > 0,
        "max_thinking_tokens": options.max_thinking_tokens is not None,
        "logprobs": options.logprobs is not None,
        "structured_outputs": options.structured_outputs is not None,
    }
    if found := [name for name, is_chosen in chosen.items() if is_chosen]:
        raise UsageError(
            f"expected, for quadratic self-speculation, no {' and no '.join(found)}, "
            f"found {'it' if len(found) == 1 else 'them'}",
            "it takes the most probable token always; "
            "linear_spec does all of these in two forwards a cycle",
        )


def _check_token(what: str, token: int, model: ModelInfo) -> None:
    if not 0 <= token < model.vocab_size:
        raise UsageError(
            f"expected {what} from 0 to {model.vocab_size - 1}, found {token}",
            "check that the id comes from this model's tokenizer",
        )


def default_block_length(mode: Mode, model: ModelInfo) -> int:
    """Return the block length that a mode has by default."""
    return (
        min(DEFAULT_QUADRATIC_LENGTH, model.max_quadratic_length)
        if mode == "quadratic_spec"
        else model.block_size
    )

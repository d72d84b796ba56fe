"""The runtime's front door: open a bundle, generate in any mode, stream, continue a sequence in another mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np

from trimode.errors import UsageError
from trimode.graphs.contract import ModelInfo
from trimode.runtime.auto import StepCosts
from trimode.runtime.backends import PORTABLE, open_session
from trimode.runtime.bundle import Bundle, open_bundle
from trimode.runtime.chooser import TokenLogprob
from trimode.runtime.decode import MODES, Counters
from trimode.runtime.manifest import SamplerRecord
from trimode.runtime.options import DecodeOptions, Mode, TokenChoices, check_options, make_options
from trimode.runtime.policies import SamplerName, Scorer
from trimode.runtime.sequence import Forwards, Sequence
from trimode.runtime.session import Ids, Session, takes_block
from trimode.runtime.text import TextCodec, TextStream
from trimode.runtime.timings import Timings, find_timings, read_timings, subject_of

END_THINK = "</think>"
DEFAULT_THRESHOLDS: dict[Mode, float] = {"ar": 0.9, "diffusion": 0.9, "linear_spec": 0.0, "quadratic_spec": 0.0, "auto": 0.0}
DEFAULT_MARGIN = 0.8
"""Of the sampler ``margin``."""
DEFAULT_QUADRATIC_LENGTH = 16
"""The reference's: rows of a forward grow with the square."""


class Chunk(NamedTuple):
    """Tokens committed by one step; ``finish_reason`` is set on the last chunk."""

    token_ids: list[int]
    finish_reason: str | None


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        token_ids: new tokens, the end token included, or the token that completed a stop string.
        nfe: forward passes as the reference counts them (see :mod:`trimode.runtime.decode`).
        prefill_forwards: forwards that read the prompt.
        tokens_per_forward: new tokens / nfe.
        acceptance_length: tokens a draft-and-verify cycle yields on average; None in the other modes.
        forwards: executed forward passes by phase.
        finish_reason: ``stop`` (end token or stop string) or ``length`` (a limit).
        seed: of the draws; None where nothing was drawn.
        logprobs: one for each new token; None if not asked for.
        picks: of ``auto``: block length -> steps that had it, 1 being steps of AR; None in the other modes.
        elapsed_s: wall time, tokens in to tokens out.
    """

    token_ids: list[int]
    mode: Mode
    nfe: int
    prefill_forwards: int
    tokens_per_forward: float
    acceptance_length: float | None
    forwards: Forwards
    finish_reason: str
    seed: int | None
    logprobs: list[TokenLogprob] | None
    elapsed_s: float
    picks: dict[int, int] | None = None


class Stream:
    """Iterates over :class:`Chunk`; afterwards :attr:`result` tells the whole.

    Args:
        sequence: what to continue.
        mode: how.
        options: checked.
        codec: gives the tokenizer, when text is asked for or stop strings are given; without, neither may be.
    """

    def __init__(self, sequence: Sequence, mode: Mode, options: DecodeOptions, codec: Callable[[], TextCodec] | None = None) -> None:
        self._sequence, self._mode, self._options, self._codec = sequence, mode, options, codec
        self._watch = self._new_text() if options.stop else None
        self._counters = Counters()
        self._before = Forwards(**vars(sequence.forwards))
        self._token_ids: list[int] = []
        self._elapsed_s = 0.0
        self._steps = MODES[mode](sequence, options, self._counters)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        start = time.perf_counter()
        try:
            token_ids = next(self._steps)
        finally:
            self._elapsed_s += time.perf_counter() - start
        if self._watch is not None:
            token_ids = self._before_stop(self._watch, token_ids)
        self._token_ids += token_ids
        return Chunk(token_ids, self._counters.finish_reason)

    def text(self) -> Iterator[str]:
        """Iterate to the end, in pieces of text: as soon as they are certain, without special tokens, ending before a stop string.

        Raises:
            UsageError: the bundle has no tokenizer.
        """
        text = self._new_text()
        for chunk in self:
            yield text.push(chunk.token_ids)
        yield text.finish()

    def finish(self) -> Generation:
        """Iterate to the end; the result."""
        for _ in self:
            pass
        return self.result

    @property
    def result(self) -> Generation:
        """What has been generated; complete once the iteration has ended."""
        counters, count = self._counters, len(self._token_ids)
        forwards = Forwards(**{name: value - getattr(self._before, name) for name, value in vars(self._sequence.forwards).items()})
        return Generation(
            token_ids=list(self._token_ids),
            mode=self._mode,
            nfe=counters.nfe,
            prefill_forwards=forwards.prefill,
            tokens_per_forward=count / counters.nfe if counters.nfe else 0.0,
            acceptance_length=counters.cycle_tokens / counters.cycles if counters.cycles else None,
            forwards=forwards,
            finish_reason=counters.finish_reason or "length",
            seed=counters.seed,
            logprobs=None if self._options.logprobs is None else list(counters.logprobs),
            elapsed_s=self._elapsed_s,
            picks=dict(sorted(counters.picks.items())) if self._mode == "auto" else None,
        )

    def _new_text(self) -> TextStream:
        if self._codec is None:
            raise UsageError("expected a tokenizer for text and stop strings, found none", "give the stream the codec of the bundle")
        return TextStream(self._codec(), self._options.stop, self._options.min_new_tokens)

    def _before_stop(self, watch: TextStream, token_ids: list[int]) -> list[int]:
        """The tokens up to the one that completes a stop string; the rest is forgotten before anybody has seen it."""
        for count, token in enumerate(token_ids, 1):
            watch.push([token])
            if watch.is_stopped:
                self._end(len(token_ids) - count)
                return token_ids[:count]
        return token_ids

    def _end(self, surplus: int) -> None:
        """End here, without the last ``surplus`` tokens."""
        counters = self._counters
        self._steps.close()
        self._sequence.truncate(len(self._sequence.tokens) - surplus)
        counters.finish_reason = "stop"
        counters.cycle_tokens -= surplus if counters.cycles else 0
        if self._options.logprobs is not None:
            del counters.logprobs[len(counters.logprobs) - surplus :]


class TriModeModel:
    """A bundle ready to run. Calls from several threads are independent: each sequence has its own cache.

    Attributes:
        bundle: what was opened, in which precision.
        model: the model's facts.
        target: the bundle's target that runs, or ``portable`` for its portable graphs.
        session: the loaded graphs.
        num_threads: inside one operator on the CPU; None = the library's choice.
    """

    def __init__(
        self, bundle: Bundle, session: Session, target: str = PORTABLE, num_threads: int | None = None, timings: Timings | None = None
    ) -> None:
        self.bundle = bundle
        self.model = bundle.manifest.model
        self.target = target
        self.session = session
        self.num_threads = num_threads
        self._given_timings = timings

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        precision: str | None = None,
        target: str | None = None,
        num_threads: int | None = None,
        verify: bool = True,
        runtime_cache: str | Path | None = None,
        timings: str | Path | None = None,
    ) -> TriModeModel:
        """Open a bundle folder.

        Args:
            path: the folder that ``trimode build`` wrote.
            precision: one of the bundle's; None = the one that was built first.
            target: one of that precision's targets, or ``portable``: its portable graphs on the CPU. None or ``auto``: a TensorRT target for
                the GPU of this machine, else ONNX Runtime on the GPU, else the CPU; the logger ``trimode.runtime`` says what and why.
            num_threads: threads inside one operator on the CPU; None = one per physical core.
            verify: compare the sha256 of every file that the precision reads with the manifest.
            runtime_cache: folder for what is made for this machine while running: kernels that TensorRT-RTX compiles, written by :meth:`close`
                (None = not kept), and int4 weights as ONNX Runtime arranges them for the processor (None = the user's cache folder).
            timings: what mode ``auto`` chooses by, a file that ``trimode bench -o`` wrote; None = what it kept of this machine, if anything.

        Raises:
            UsageError: the bundle has no such precision or target, or ``timings`` is no such file.
            BundleError: the bundle is missing, damaged or of another schema than this library's, or the target was compiled by another version.
            DeviceError: the named target needs a GPU that is not here.
            DependencyError: the library that runs the target is not installed.
        """
        given = read_timings(Path(timings)) if timings else None
        bundle = open_bundle(path, precision, verify=verify)
        opened = open_session(bundle, target, num_threads, runtime_cache=Path(runtime_cache) if runtime_cache else None)
        return cls(bundle, opened.session, opened.target, num_threads, given)

    def close(self) -> None:
        """Give the memory of the weights back; nothing can be generated afterwards. Garbage collection does it, too, but later."""
        self.session.close()
        self.__dict__.pop("scorer", None)

    def __enter__(self) -> TriModeModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def codec(self) -> TextCodec:
        """The bundle's tokenizer and chat template; :class:`UsageError` where it has none."""
        return TextCodec(self.bundle.path)

    @cached_property
    def timings(self) -> Timings | None:
        """The table that mode ``auto`` chooses by: the one that was given, or that ``trimode bench`` kept; None where there is none."""
        return find_timings(subject_of(self.bundle, self.target, self.num_threads), self._given_timings)

    @cached_property
    def scorer(self) -> Scorer:
        """The bundle's learned sampler; :class:`UsageError` where it has none."""
        from trimode.runtime.learned import LearnedScorer  # ONNX Runtime is an optional extra, which a TensorRT target does without

        return LearnedScorer(self.bundle.path / self._sampler_record().file, self.num_threads)

    def ar_generate(
        self, ids: Any, max_new_tokens: int = 128, eos_token_id: int | Seq[int] | None = None, **choices: Unpack[TokenChoices]
    ) -> tuple[Ids, int]:
        """Autoregressive generation.

        Args:
            ids: array-like ``(1, n)``.
            max_new_tokens: most new tokens.
            eos_token_id: one or several that end the text; None = the model's.
            choices: see :class:`TokenChoices`; without any, the most probable token is taken.

        Returns:
            int64 ``(1, n + generated)``, and nfe: forwards as the reference counts them.

        Raises:
            UsageError: a value is out of its range.
        """
        return self._generate(ids, "ar", max_new_tokens=max_new_tokens, eos_token_ids=eos_token_id, **choices)

    def generate(
        self,
        ids: Any,
        max_new_tokens: int = 512,
        block_length: int = 32,
        threshold: float | None = None,
        eos_token_id: int | Seq[int] | None = None,
        *,
        sampler: SamplerName = "threshold",
        steps: int | None = None,
        **choices: Unpack[TokenChoices],
    ) -> tuple[Ids, int]:
        """Block-diffusion generation; otherwise like :meth:`ar_generate`.

        ``sampler`` decides which slots a forward fills (:mod:`trimode.runtime.policies`); ``threshold`` None = 0.9, or what belongs to the sampler.
        """
        blocks = {"block_length": block_length, "sampler": sampler, "steps": steps, **({} if threshold is None else {"threshold": threshold})}
        return self._generate(ids, "diffusion", max_new_tokens=max_new_tokens, eos_token_ids=eos_token_id, **blocks, **choices)

    def linear_spec_generate(
        self,
        ids: Any,
        max_new_tokens: int = 128,
        block_length: int = 32,
        threshold: float = 0.0,
        use_drafter: bool = True,
        eos_token_id: int | Seq[int] | None = None,
        **choices: Unpack[TokenChoices],
    ) -> tuple[Ids, int]:
        """Linear self-speculation: the tokens of :meth:`ar_generate`, or their distribution, in fewer forwards; otherwise like it."""
        blocks = {"block_length": block_length, "threshold": threshold, "use_drafter": use_drafter}
        return self._generate(ids, "linear_spec", max_new_tokens=max_new_tokens, eos_token_ids=eos_token_id, **blocks, **choices)

    def self_spec_generate(
        self,
        ids: Any,
        max_new_tokens: int = 128,
        block_length: int = DEFAULT_QUADRATIC_LENGTH,
        eos_token_id: int | Seq[int] | None = None,
        **choices: Unpack[TokenChoices],
    ) -> tuple[Ids, int]:
        """Quadratic self-speculation, under the reference's name: the tokens of :meth:`ar_generate`, verified and drafted in the same forwards.

        Otherwise like it, but always greedy: of ``choices``, ``stop`` alone may change anything.

        Raises:
            UsageError: the bundle lacks the graph (``trimode build --quadratic``), or the block is too long for it.
        """
        ends = {"eos_token_ids": eos_token_id, "block_length": block_length}
        return self._generate(ids, "quadratic_spec", max_new_tokens=max_new_tokens, **ends, **choices)

    quadratic_spec_generate = self_spec_generate

    def auto_generate(
        self,
        ids: Any,
        max_new_tokens: int = 128,
        block_length: int = 32,
        use_drafter: bool = True,
        eos_token_id: int | Seq[int] | None = None,
        **choices: Unpack[TokenChoices],
    ) -> tuple[Ids, int]:
        """Whichever of AR and linear self-speculation is fastest at each step, with blocks up to ``block_length``; otherwise like the latter."""
        return self._generate(
            ids, "auto", max_new_tokens=max_new_tokens, block_length=block_length, use_drafter=use_drafter, eos_token_ids=eos_token_id, **choices
        )

    def stream(self, ids: Any, mode: Mode = "linear_spec", **options: Any) -> Stream:
        """Yield :class:`Chunk` as tokens are committed.

        Keyword arguments are the attributes of :class:`DecodeOptions` and :class:`~trimode.runtime.sampling.SamplingOptions`.
        """
        return self.continue_sequence(self.new_sequence(ids), mode, **options)

    def new_sequence(self, ids: Any) -> Sequence:
        """A sequence that starts with the prompt ``ids (1, n)``; see :meth:`continue_sequence`.

        Raises:
            UsageError: no tokens, ids out of range, more than one row, or a prompt that leaves no room.
        """
        return Sequence(self.session, self.model, self._check_ids(ids))

    def continue_sequence(self, sequence: Sequence, mode: Mode, **options: Any) -> Stream:
        """Go on from where ``sequence`` stands, in any mode; what is cached is not read again."""
        if mode not in MODES:
            raise UsageError(f"expected a mode among {', '.join(MODES)}, found {mode!r}", "see the README for what each mode does")
        defaults = {"threshold": DEFAULT_THRESHOLDS[mode], "block_length": default_block_length(mode, self.model)}
        chosen = make_options(**{**defaults, **self._for_sampler(mode, options), **self._with_end_think(options)})
        check_options(chosen, self.model, mode)
        if mode == "auto" and chosen.costs is None:
            chosen = replace(chosen, costs=self._costs(chosen))
        if mode == "quadratic_spec":
            self._check_quadratic(chosen.block_length)
        elif mode != "ar" and chosen.costs is None:
            self.session.check_block_length(chosen.block_length)
        return Stream(sequence, mode, chosen, lambda: self.codec)

    def _generate(self, ids: Any, mode: Mode, **options: Any) -> tuple[Ids, int]:
        if "logprobs" in options:
            raise UsageError("expected no logprobs here, where only tokens are returned, found them", "use stream(...).finish().logprobs")
        sequence = self.new_sequence(ids)
        result = self.continue_sequence(sequence, mode, **options).finish()
        return np.array([sequence.tokens], np.int64), result.nfe

    def _costs(self, options: DecodeOptions) -> StepCosts | None:
        """What mode ``auto`` chooses by."""
        if self.timings is None:
            return None
        costs = self.timings.costs(use_drafter=options.use_drafter and self.model.has_drafter)
        usable = costs.only(lambda length: length <= options.block_length and takes_block(self.session, length))
        if not usable.cycle_ms:
            found = f"expected timings of a block of at most {options.block_length} that the graphs take, found {', '.join(map(str, costs.cycle_ms))}"
            raise UsageError(found, f"measure it: trimode bench BUNDLE --rows 1,{options.block_length}")
        return usable

    def _for_sampler(self, mode: Mode, options: dict[str, Any]) -> dict[str, Any]:
        """What the sampler that the options name needs and they leave open."""
        sampler = options.get("sampler") if mode == "diffusion" else None  # that of another mode is refused with the other options
        if sampler == "learned":
            record = self._sampler_record()
            return {"threshold": record.threshold, "scorer": self.scorer}
        if sampler in ("schedule", "leftmost") and "threshold" in options:
            raise UsageError(f"expected no threshold with the sampler {sampler}, found {options['threshold']}", "leave it out: nothing is compared")
        return {"threshold": DEFAULT_MARGIN} if sampler == "margin" else {}

    def _sampler_record(self) -> SamplerRecord:
        record = self.bundle.manifest.sampler
        if record is None:
            hint = "train one with `trimode calibrate sampler` and add it with `trimode build CHECKPOINT -o BUNDLE --sampler SAMPLER`"
            raise UsageError("expected a bundle with a learned sampler, found one without", hint)
        return record

    def _with_end_think(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options, with the tokenizer's ``</think>`` where a thinking budget names no token."""
        if options.get("max_thinking_tokens") is None or options.get("end_think_token_id") is not None:
            return options
        return {**options, "end_think_token_id": self.codec.token_id(END_THINK)}

    def _check_quadratic(self, block_length: int) -> None:
        if "quadratic" not in self.bundle.manifest.contracts:
            raise UsageError("expected a bundle with the graph of quadratic self-speculation, found one without", "build it with --quadratic")
        if block_length > self.model.max_quadratic_length:
            found = f"expected, for quadratic self-speculation, a block length from 1 to {self.model.max_quadratic_length}, found {block_length}"
            raise UsageError(found, f"the reference takes {DEFAULT_QUADRATIC_LENGTH}; a text that may be longer (--max-length) allows up to 32")
        self.session.check_block_length(block_length, ("draft", "quadratic"))

    def _check_ids(self, ids: Any) -> list[int]:
        try:
            array = np.asarray(ids)
        except ValueError as error:
            raise UsageError("expected token ids of shape (1, n), found rows of different length", "pass one sequence a call, as [[...]]") from error
        if array.ndim != 2 or array.shape[0] != 1:
            raise UsageError(f"expected token ids of shape (1, n), found {array.shape}", "pass one sequence a call, as [[...]]")
        if array.size == 0:
            raise UsageError("expected at least one token, found an empty prompt", "start a text from the bos token if there is nothing to say")
        if not np.issubdtype(array.dtype, np.integer):
            raise UsageError(f"expected whole numbers as token ids, found {array.dtype}", "pass int64 ids")
        wrong = array[(array < 0) | (array >= self.model.vocab_size)]
        if wrong.size:
            found = f"expected token ids from 0 to {self.model.vocab_size - 1}, found {wrong[0]}"
            raise UsageError(found, "check that the ids come from this model's tokenizer")
        if array.shape[1] >= self.model.max_length:
            raise UsageError(f"expected a prompt shorter than {self.model.max_length} tokens, found {array.shape[1]}",
                             "shorten the prompt, or build with a larger --max-length")  # fmt: skip
        return array[0].tolist()  # type: ignore[no-any-return]


def default_block_length(mode: Mode, model: ModelInfo) -> int:
    """The block length that a mode has where none is asked for."""
    return min(DEFAULT_QUADRATIC_LENGTH, model.max_quadratic_length) if mode == "quadratic_spec" else model.block_size

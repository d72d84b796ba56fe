"""Runs an algorithm over a sequence, as whoever asked sees it.

They see chunks of tokens or pieces of text, and a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from trimode.errors import UsageError
from trimode.formats.contract import Mode
from trimode.formats.texts import reason_of
from trimode.runtime.decode.algorithms import MODES, Counters
from trimode.runtime.decode.forward import Forward, Outputs
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Forwards, Sequence
from trimode.runtime.decode.token_choice import TokenLogprob
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.stream import TextStream


class Chunk(NamedTuple):
    """Holds the tokens committed by one step.

    ``finish_reason`` is set on the last chunk.
    """

    token_ids: list[int]
    finish_reason: str | None


@dataclass(frozen=True)
class Generation:
    """Holds what was generated.

    It is finished but where its ``finish_reason`` is None.

    Attributes:
        token_ids: New tokens, the end token included, or the token that completed a stop string.
        nfe: Number of forward passes as the reference counts them (see
            :mod:`trimode.runtime.decode.algorithms`).
        prefill_forwards: Number of forwards that read the prompt.
        tokens_per_forward: Number of new tokens / nfe.
        acceptance_length: Number of tokens a draft-and-verify cycle yields on average; None in the
            other modes.
        forwards: Number of executed forward passes by phase.
        finish_reason: Reason of the end: ``stop`` (end token or stop string) or ``length`` (a
            limit); None of a batch's row that is at work, or was given up.
        seed: Seed of the draws; None where nothing was drawn.
        logprobs: Log-probabilities, one for each new token; None if not asked for.
        picks: Block length -> steps of ``auto`` that had it, 1 being steps of AR; None in the other
            modes.
        elapsed_s: Wall time, tokens in to tokens out.
        forced_tokens: Number of new tokens that a grammar decided, which need no forward of their
            own; None without a grammar.
        drafted: Number of drafts that were verified; 0 in the modes without drafts.
        accepted: Number of those of each draft-and-verify cycle that are part of the text.
        denoised_slots: Number of slots of blocks in denoise forwards; 0 outside of diffusion.
    """

    token_ids: list[int]
    mode: Mode
    nfe: int
    prefill_forwards: int
    tokens_per_forward: float
    acceptance_length: float | None
    forwards: Forwards
    finish_reason: str | None
    seed: int | None
    logprobs: list[TokenLogprob] | None
    elapsed_s: float
    picks: dict[int, int] | None = None
    forced_tokens: int | None = None
    drafted: int = 0
    accepted: tuple[int, ...] = ()
    denoised_slots: int = 0


class Step(NamedTuple):
    """Shows one turn of an algorithm to whoever observes it.

    Attributes:
        sequence: Text of the algorithm, as it is after the turn.
        counters: Counters of the algorithm.
        outputs: Outputs that it was given, good until the observer returns; None = none.
        result: Forward that it needs next, or what it has committed; None before its first turn.
    """

    sequence: Sequence
    counters: Counters
    outputs: Outputs | None
    result: Forward | Chunk | None


Observer = Callable[[Step], object]


class Stream:
    """Iterates over :class:`Chunk`, once; afterwards :attr:`result` tells the whole.

    A stream that cannot go on says so at every further read, rather than ending as if it was whole:
    when the model is closed, when something else has continued its sequence, or after an error.

    Args:
        sequence: Sequence to continue.
        mode: Mode to decode in.
        options: Checked options.
        codec: Function that gives the tokenizer, when text is asked for or stop strings are given;
            without, neither may be.

    Attributes:
        observer: Observer that is told of each turn of the algorithm; None = nobody is.
    """

    def __init__(
        self,
        sequence: Sequence,
        mode: Mode,
        options: DecodeOptions,
        codec: Callable[[], TextCodec] | None = None,
    ) -> None:
        self._sequence, self._mode, self._options, self._codec = sequence, mode, options, codec
        self.observer: Observer | None = None
        self._watch = self.new_text() if options.stop else None
        self._counters = Counters()
        self._before = Forwards(**vars(sequence.forwards))
        self._token_ids: list[int] = []
        self._elapsed_s = 0.0
        self._steps = MODES[mode].steps(sequence, options, self._counters)
        self._is_begun = self._is_read_out = False
        self._length = len(sequence.tokens)  # as this stream left it
        self._broken: str | None = None  # why it cannot go on
        self._ticket = object()  # not the stream itself: a cycle would keep the cache in memory

    def __iter__(self) -> Iterator[Chunk]:
        if self._is_read_out:
            raise UsageError(
                "expected a stream that has something to read, found one that was read to its end",
                "ask for its result",
            )
        return self

    def __next__(self) -> Chunk:
        start = time.perf_counter()
        try:
            step = self.advance()
            while isinstance(step, Forward):
                step = self.advance(self._answer(step))
        finally:
            self.spend(time.perf_counter() - start)
        if step is None:
            raise StopIteration
        return step

    def advance(self, outputs: Outputs | None = None) -> Forward | Chunk | None:
        """Go on to the next forward, chunk or end.

        It is for whoever runs the forwards. It returns one that is needed, whose outputs the next
        call brings, a chunk, or None, the end.

        Raises:
            UsageError: the stream cannot go on.
        """
        if self._is_read_out or self.finish_reason is not None:
            self._is_read_out = True
            return None
        self._check_usable()
        self._begin()
        try:
            step = next(self._steps) if outputs is None else self._steps.send(outputs)
            if isinstance(step, Forward):
                self._tell(outputs, step)
                return step
            token_ids = step if self._watch is None else self._before_stop(self._watch, step)
        except StopIteration:
            self._is_read_out = True
            return None
        except BaseException as error:
            self.break_off(error)
            raise
        self._token_ids += token_ids
        self._length = len(self._sequence.tokens)
        chunk = Chunk(token_ids, self._counters.finish_reason)
        self._tell(outputs, chunk)
        return chunk

    def _tell(self, outputs: Outputs | None, result: Forward | Chunk | None) -> None:
        if self.observer is not None:
            self.observer(Step(self._sequence, self._counters, outputs, result))

    def break_off(self, error: BaseException) -> None:
        """Let the stream go no further, because of an error.

        The error is in it or in a forward that it asked for.
        """
        self._broken = f"one that an error has ended: {reason_of(error)}"
        self._steps.close()

    @property
    def finish_reason(self) -> str | None:
        """Reason of the text's end: ``stop`` or ``length``.

        None where it has not ended.
        """
        return self._counters.finish_reason

    @property
    def options(self) -> DecodeOptions:
        """Checked options."""
        return self._options

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Log-probabilities of the tokens so far; None if not asked for.

        It is the list itself, which grows.
        """
        return None if self._options.logprobs is None else self._counters.logprobs

    def spend(self, seconds: float) -> None:
        """Count time towards the result's ``elapsed_s``."""
        self._elapsed_s += seconds

    def text(self) -> Iterator[str]:
        """Iterate to the end, in pieces of text.

        They come as soon as they are certain, without special tokens, and end before a stop string.

        Raises:
            UsageError: the bundle has no tokenizer, or the first tokens have been read already.
        """
        if self._is_begun:
            raise UsageError(
                "expected a stream that nobody has read, "
                f"found one that was read up to token {len(self._token_ids)}",
                "turn its chunks into text with new_text(), from the first one on",
            )
        return self._pieces(self.new_text())

    def _pieces(self, text: TextStream) -> Iterator[str]:
        for chunk in self:
            yield text.push(chunk.token_ids)
        yield text.finish()

    def finish(self) -> Generation:
        """Iterate to the end, from wherever the stream is; return the result."""
        while next(self, None) is not None:
            pass
        return self.result

    @property
    def result(self) -> Generation:
        """Everything that has been generated.

        Raises:
            UsageError: the text has not ended yet.
        """
        if self.finish_reason is None:
            self._check_usable()
            raise UsageError(
                "expected a stream that was read to its end, "
                f"found one that was read up to token {len(self._token_ids)}",
                "read the rest with finish()",
            )
        return self.so_far

    @property
    def so_far(self) -> Generation:
        """Everything that has been generated until now, the text ended or not."""
        counters, count = self._counters, len(self._token_ids)
        forwards = Forwards(
            **{
                name: value - getattr(self._before, name)
                for name, value in vars(self._sequence.forwards).items()
            }
        )
        return Generation(
            token_ids=list(self._token_ids),
            mode=self._mode,
            nfe=counters.nfe,
            prefill_forwards=forwards.prefill,
            tokens_per_forward=count / counters.nfe if counters.nfe else 0.0,
            acceptance_length=counters.cycle_tokens / counters.cycles if counters.cycles else None,
            forwards=forwards,
            finish_reason=counters.finish_reason,
            seed=counters.seed,
            logprobs=None if self._options.logprobs is None else list(counters.logprobs),
            elapsed_s=self._elapsed_s,
            picks=dict(sorted(counters.picks.items())) if self._mode == "auto" else None,
            forced_tokens=counters.forced,
            drafted=counters.drafted,
            accepted=tuple(counters.accepted),
            denoised_slots=counters.denoised_slots,
        )

    def new_text(self) -> TextStream:
        """Make what turns this stream's tokens into text.

        Raises:
            UsageError: the bundle has no tokenizer.
        """
        if self._codec is None:
            raise UsageError(
                "expected a tokenizer for text and stop strings, found none",
                "give the stream the codec of the bundle",
            )
        return TextStream(self._codec(), self._options.stop, self._options.min_new_tokens)

    def _answer(self, forward: Forward) -> Outputs:
        try:
            return self._sequence.answer(forward)
        except BaseException as error:
            self.break_off(error)
            raise

    def _begin(self) -> None:
        """Become the one who continues the sequence."""
        if not self._is_begun:
            self._is_begun, self._sequence.reader = True, self._ticket
            self._before, self._length = (
                Forwards(**vars(self._sequence.forwards)),
                len(self._sequence.tokens),
            )
            self._tell(None, None)

    def _check_usable(self) -> None:
        """Raise :class:`UsageError` where the text cannot be continued."""
        found, hint = self._broken, "continue the sequence by another stream"
        is_other = self._is_begun and (
            self._sequence.reader is not self._ticket or len(self._sequence.tokens) != self._length
        )
        if found is None and is_other:
            token = f"after token {len(self._token_ids)}"
            found = f"one whose sequence was changed or continued by another {token}"
            hint = "read one stream at a time"
        if found is not None:
            raise UsageError(f"expected a stream that can go on, found {found}", hint)
        self._sequence.check_open()

    def _before_stop(self, watch: TextStream, token_ids: list[int]) -> list[int]:
        """Return the tokens up to the one that completes a stop string.

        The rest is forgotten before anybody has seen it.
        """
        for count, token in enumerate(token_ids, 1):
            watch.push([token])
            if watch.is_stopped:
                self._end(count, len(token_ids) - count)
                return token_ids[:count]
        return token_ids

    def _end(self, count: int, surplus: int) -> None:
        """End here, with ``count`` tokens of the last step.

        Its last ``surplus`` tokens are dropped.
        """
        counters = self._counters
        self._steps.close()
        self._sequence.truncate(len(self._sequence.tokens) - surplus)
        counters.finish_reason = "stop"
        if surplus and counters.cycles:
            counters.cycle_tokens -= surplus
            is_known = self._mode == "quadratic_spec"  # the first draft of a block is no guess
            counters.accepted[-1] = min(counters.accepted[-1], count - is_known)
        if self._options.logprobs is not None:
            del counters.logprobs[len(counters.logprobs) - surplus :]

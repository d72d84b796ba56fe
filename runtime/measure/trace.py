"""Traces decodings: what each forward was for, and what became of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import get_args

from trimode.formats.contract import Mode
from trimode.formats.manifest import Manifest
from trimode.formats.texts import reason_of
from trimode.formats.trace import (
    ForwardRecord,
    Phase,
    RunEnd,
    RunStart,
    StepRecord,
    TokenTexts,
    TraceHeader,
    TraceRecord,
)
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.stream import Generation, Step
from trimode.runtime.measure.step_trace import StepTrace
from trimode.runtime.request.parts import BundleParts
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.stream import TextStream

Sink = Callable[[TraceRecord], object]
"""Takes the lines of a trace, on the thread that decodes."""


def header_of(manifest: Manifest, precision: str, target: str) -> TraceHeader:
    """Make the header of a trace of this model."""
    return TraceHeader(
        trimode_version=manifest.trimode_version,
        model=manifest.source.name,
        target=target,
        precision=precision,
        mask_token_id=manifest.model.mask_token_id,
        eos_token_ids=tuple(manifest.model.eos_token_ids),
    )


def codec_of(model: BundleParts) -> TextCodec | None:
    """Return the tokenizer of a bundle; None where it has none."""
    return model.codec if (model.bundle.path / "tokenizer.json").is_file() else None


class TraceWriter:
    """Writes the runs of one trace.

    They may be at work at the same time.

    Args:
        header: First line.
        codec: Tokenizer; None = the trace has token ids only.
        sink: Function that takes the lines.
    """

    def __init__(self, header: TraceHeader, codec: TextCodec | None, sink: Sink) -> None:
        self._codec, self._sink = codec, sink
        self._named: set[int] = set()
        self._num_runs = 0
        sink(header)

    def begin(
        self,
        mode: Mode,
        prompt_ids: Sequence[int],
        options: DecodeOptions,
        plan_reason: Callable[[], str] = str,
    ) -> RunTrace:
        """Begin a run, and return the observer of its stream.

        The caller makes it the stream's observer.

        Args:
            mode: Mode of the run.
            prompt_ids: Token ids of the prompt.
            options: Options of the run.
            plan_reason: Function that gives the reason of the plan that mode ``auto`` follows in an
                engine.
        """
        start = RunStart(
            run=self._num_runs,
            mode=mode,
            prompt_ids=tuple(prompt_ids),
            max_new_tokens=options.max_new_tokens,
            block_length=1 if mode == "ar" else options.block_length,
            threshold=options.threshold,
            temperature=options.sampling.temperature,
        )
        self._num_runs += 1
        self.write(start, start.prompt_ids)
        text = None
        if self._codec is not None:
            text = TextStream(self._codec, options.stop, options.min_new_tokens)
        return RunTrace(self, start.run, text, plan_reason)

    def write(self, record: TraceRecord, token_ids: Iterable[int] = ()) -> None:
        """Write a line, after the new texts of its tokens.

        New are those that no line has given.
        """
        new = sorted(set(token_ids) - self._named)
        if self._codec is not None and new:
            self._named.update(new)
            self._sink(TokenTexts(texts={token: self._codec.token_text(token) for token in new}))
        self._sink(record)


class RunTrace:
    """Observes the stream of one run, and writes its lines.

    Args:
        writer: Writer of its lines.
        run: Number of the run.
        text: Text of the run; None without a tokenizer.
        plan_reason: Function that gives the reason of an engine's plan.
    """

    def __init__(
        self,
        writer: TraceWriter,
        run: int,
        text: TextStream | None,
        plan_reason: Callable[[], str],
    ) -> None:
        self._writer, self._run, self._text = writer, run, text
        self._observe = StepTrace(run, self._took, plan_reason)
        self._is_over, self._lock = False, threading.Lock()

    def __call__(self, step: Step) -> None:
        """Take note of a turn of the algorithm."""
        self._observe(step)

    def end(self, result: Generation | None, error: BaseException | None = None) -> None:
        """Write the end of the run, on any thread.

        Nothing of it is written afterwards.

        Args:
            result: Generation so far, the text ended or not; None where that is not known.
            error: Error that ended the run.
        """
        record = RunEnd(run=self._run, error=None if error is None else reason_of(error))
        if self._text is not None and error is None:
            record = record.model_copy(update={"text": self._text.finish()})
        if result is not None:
            record = record.model_copy(update=_facts(result))
        with self._lock:
            self._is_over = True
            self._writer.write(record)

    def _took(self, record: StepRecord) -> None:
        if self._text is not None:
            text = self._text.push(list(record.committed))
            record = record.model_copy(update={"text": text})
        with self._lock:
            if not self._is_over:
                self._writer.write(record, _named(record))


def _facts(result: Generation) -> dict[str, object]:
    phases: tuple[Phase, ...] = get_args(Phase)
    counts = {name: getattr(result.forwards, name) for name in phases}
    return {
        "finish_reason": result.finish_reason,
        "num_tokens": len(result.token_ids),
        "nfe": result.nfe,
        "forwards": {name: count for name, count in counts.items() if count},
        "tokens_per_forward": result.tokens_per_forward,
        "acceptance_length": result.acceptance_length,
        "seed": result.seed,
        "elapsed_s": result.elapsed_s,
    }


def _named(record: StepRecord) -> Iterator[int]:
    """Tokens that a line names."""
    yield from record.committed
    if isinstance(record, ForwardRecord):
        yield from record.input_ids
        for one in record.positions:
            if one.token_id is not None:
                yield one.token_id
            yield from (candidate.token_id for candidate in one.top)

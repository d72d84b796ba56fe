"""Opens a bundle, and generates with it in every mode."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from trimode.errors import UsageError
from trimode.formats.contract import Mode
from trimode.runtime.auto.timings import Timings, read_timings
from trimode.runtime.bundle.open import Bundle, open_bundle
from trimode.runtime.decode.arguments import FLAG, PATH, TEXT, WHOLE, checks_arguments, instance_of
from trimode.runtime.decode.options import (
    DEFAULT_QUADRATIC_LENGTH,
    KINDS,
    MODE,
    DecodeOptions,
    TokenChoices,
)
from trimode.runtime.decode.sequence import Sequence
from trimode.runtime.decode.stream import Generation, Stream
from trimode.runtime.decode.unmasking import SamplerName
from trimode.runtime.engine.batch import Batch, BatchRequest
from trimode.runtime.request.batches import check_batches, check_max_rows, options_by_prompt
from trimode.runtime.request.choices import ChoiceReader
from trimode.runtime.request.parts import BundleParts
from trimode.runtime.request.prompts import check_row, check_rows, check_single
from trimode.runtime.request.step_costs import StepCostTable
from trimode.runtime.sessions.base import Closable, Ids, Session
from trimode.runtime.sessions.select import PORTABLE, open_session

_OPENING = {
    "path": PATH,
    "precision": TEXT.or_none(),
    "target": TEXT.or_none(),
    "num_threads": WHOLE.or_none(),
    "verify": FLAG,
    "runtime_cache": PATH.or_none(),
    "timings": PATH.or_none(),
}
_GENERATING = {**KINDS, "eos_token_id": KINDS["eos_token_ids"]}
_STREAMING = {
    **MODE,
    "sequence": instance_of(Sequence, "a sequence of new_sequence"),
    "max_rows": WHOLE.or_none(),
}
_CHOICES = (*TokenChoices.__annotations__, "logprobs")


class TriModeModel(BundleParts, Closable):
    """Runs one bundle.

    Calls from several threads are independent: each sequence has its own cache.

    Attributes:
        bundle: Opened bundle, in one of its precisions.
        model: Facts about the model.
        target: Name of the target that runs; ``portable`` = the portable graphs.
        session: Loaded graphs.
        num_threads: Threads inside one operator on the CPU; None = the library's choice.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        target: str = PORTABLE,
        num_threads: int | None = None,
        timings: Timings | None = None,
    ) -> None:
        super().__init__(bundle, target, num_threads, timings)
        self.model = bundle.manifest.model
        self.session = session
        self._step_costs = StepCostTable(session, self.model)

    @classmethod
    @checks_arguments(_OPENING)
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
            path: Folder that ``trimode build`` wrote.
            precision: Name of one of the bundle's precisions; None = the one built first.
            target: Name of one of that precision's targets. ``portable`` = its portable graphs on
                the CPU. None or ``auto`` = a TensorRT target for this machine's GPU, else ONNX
                Runtime on the GPU, else the CPU. The logger ``trimode.runtime`` gives the reason.
            num_threads: Threads inside one operator on the CPU; None = one per physical core.
            verify: Compare the sha256 of every file that the precision reads with the manifest.
            runtime_cache: Folder for files that running makes for this machine. Kernels that
                TensorRT-RTX compiles are written by :meth:`close` (None = not kept). ONNX Runtime
                arranges int4 weights for the processor (None = the user's cache folder).
            timings: File from ``trimode bench -o`` that mode ``auto`` uses. None = the table that
                ``trimode bench`` kept on this machine, if any.

        Raises:
            UsageError: the bundle has no such precision or target, or ``timings`` is no such file.
            BundleError: the bundle is missing, damaged or of another schema than this library's,
                or the target was compiled by another version.
            DeviceError: the named target needs a GPU that is not here.
            DependencyError: the library that runs the target is not installed.
        """
        given = read_timings(Path(timings)) if timings else None
        bundle = open_bundle(path, precision, verify=verify)
        opened = open_session(
            bundle,
            target,
            num_threads,
            runtime_cache=Path(runtime_cache) if runtime_cache else None,
        )
        return cls(bundle, opened.session, opened.target, num_threads, given)

    def close(self) -> None:
        """Give the memory of the weights back.

        Nothing can be generated afterwards. An unfinished stream raises :class:`UsageError`.
        Garbage collection closes a model too, but later. Closing twice is fine.
        """
        if self.is_closed:
            return
        self.is_closed = True
        self.session.close()
        self.forget_scorer()

    def __enter__(self) -> TriModeModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @checks_arguments(_GENERATING, options=_CHOICES)
    def ar_generate(
        self,
        ids: Any,
        max_new_tokens: int = 128,
        eos_token_id: int | Seq[int] | None = None,
        **choices: Unpack[TokenChoices],
    ) -> tuple[Ids, int]:
        """Generate one token a forward.

        Args:
            ids: Prompt, array-like ``(1, n)``.
            max_new_tokens: Largest number of new tokens.
            eos_token_id: One or several tokens that end the text; None = the model's.
            choices: See :class:`TokenChoices`. Without any, the most probable token is taken.

        Returns:
            Tokens, int64 ``(1, n + generated)``, and nfe: forwards as the reference counts them.

        Raises:
            UsageError: a value is out of its range.
        """
        return self._generate(
            ids, "ar", max_new_tokens=max_new_tokens, eos_token_ids=eos_token_id, **choices
        )

    @checks_arguments({**_GENERATING, "threshold": KINDS["threshold"].or_none()}, options=_CHOICES)
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
        """Generate by block diffusion.

        ``sampler`` decides which slots a forward fills (:mod:`trimode.runtime.decode.unmasking`).
        ``threshold`` None = 0.9, or the default of the sampler.
        Everything else is as in :meth:`ar_generate`.
        """
        blocks = {
            "block_length": block_length,
            "sampler": sampler,
            "steps": steps,
            **({} if threshold is None else {"threshold": threshold}),
        }
        return self._generate(
            ids,
            "diffusion",
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_id,
            **blocks,
            **choices,
        )

    @checks_arguments(_GENERATING, options=_CHOICES)
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
        """Generate by linear self-speculation.

        The tokens, or their distribution, are those of :meth:`ar_generate`, in fewer forwards.
        """
        blocks = {"block_length": block_length, "threshold": threshold, "use_drafter": use_drafter}
        return self._generate(
            ids,
            "linear_spec",
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_id,
            **blocks,
            **choices,
        )

    @checks_arguments(_GENERATING, options=_CHOICES)
    def self_spec_generate(
        self,
        ids: Any,
        max_new_tokens: int = 128,
        block_length: int = DEFAULT_QUADRATIC_LENGTH,
        eos_token_id: int | Seq[int] | None = None,
        **choices: Unpack[TokenChoices],
    ) -> tuple[Ids, int]:
        """Generate by quadratic self-speculation, under the reference's name.

        Each forward verifies a block and drafts the next. The tokens are those of
        :meth:`ar_generate`, always greedy: of ``choices``, ``stop`` alone may change anything.

        Raises:
            UsageError: the bundle lacks the graph (``trimode build --quadratic``), or the block is
                too long for it.
        """
        ends = {"eos_token_ids": eos_token_id, "block_length": block_length}
        return self._generate(
            ids, "quadratic_spec", max_new_tokens=max_new_tokens, **ends, **choices
        )

    quadratic_spec_generate = self_spec_generate

    @checks_arguments(_GENERATING, options=_CHOICES)
    def auto_generate(
        self,
        ids: Any,
        max_new_tokens: int = 128,
        block_length: int = 32,
        use_drafter: bool = True,
        eos_token_id: int | Seq[int] | None = None,
        **choices: Unpack[TokenChoices],
    ) -> tuple[Ids, int]:
        """Generate by AR or linear self-speculation, whichever is faster at each step.

        Blocks have up to ``block_length`` slots. Everything else is as in
        :meth:`linear_spec_generate`.
        """
        return self._generate(
            ids,
            "auto",
            max_new_tokens=max_new_tokens,
            block_length=block_length,
            use_drafter=use_drafter,
            eos_token_ids=eos_token_id,
            **choices,
        )

    @checks_arguments(_STREAMING, options=KINDS)
    def stream(self, ids: Any, mode: Mode = "linear_spec", **options: Any) -> Stream:
        """Yield :class:`Chunk` as tokens are committed.

        Keyword arguments are the attributes of :class:`DecodeOptions` and
        :class:`~trimode.runtime.decode.sampling.SamplingOptions`.
        """
        return self.continue_sequence(self.new_sequence(ids), mode, **options)

    @checks_arguments({})
    def new_sequence(self, ids: Any) -> Sequence:
        """Start a sequence with the prompt ``ids (1, n)``; see :meth:`continue_sequence`.

        Raises:
            UsageError: no tokens, ids out of range, more than one row, or a prompt that leaves no
                room.
        """
        self.check_open()
        return Sequence(self.session, self.model, check_single(ids, self.model))

    @checks_arguments(_STREAMING, options=KINDS)
    def continue_sequence(self, sequence: Sequence, mode: Mode, **options: Any) -> Stream:
        """Go on from where ``sequence`` stands, in any mode.

        Tokens that are cached are not read again.
        """
        return self._open_stream(1, sequence, mode, **options)

    def _open_stream(self, batch: int, sequence: Sequence, mode: Mode, **options: Any) -> Stream:
        """Continue a sequence that runs side by side with others.

        Together they are ``batch`` at most.
        """
        self.check_open()
        chosen = self.with_grammar(self.read_options(mode, options, batch))
        return Stream(sequence, mode, chosen, lambda: self.codec)

    def read_options(self, mode: Mode, options: dict[str, Any], batch: int = 1) -> DecodeOptions:
        """Check keywords of :meth:`stream`, and fill in what they leave open.

        Args:
            mode: Name of the mode.
            options: Keywords of the call.
            batch: Number of texts that run side by side.

        Raises:
            UsageError: an unknown mode or keyword, or a value out of its range.
        """
        return self._reader().read(mode, options, batch)

    def _reader(self) -> ChoiceReader:
        # Made for each call: kept, it would hold the model in a cycle, and its memory with it
        return ChoiceReader(self.session, self, self._step_costs)

    @checks_arguments(_STREAMING)
    def new_batch(self, max_rows: int | None = None) -> Batch:
        """Make room for several texts side by side, in any modes.

        See :class:`~trimode.runtime.engine.batch.Batch`. ``max_rows`` None = 8, or the number that
        the target was built for.

        Raises:
            UsageError: ``max_rows`` is below 1, or more than the target was built for; or the
                session runs single texts only.
        """
        return self._new_batch(max_rows)

    def _new_batch(self, max_rows: int | None, num_texts: int | None = None) -> Batch:
        """Make a batch with no more rows than ``num_texts``."""
        self.check_open()
        session = check_batches(self.session)
        max_rows = check_max_rows(max_rows, session.max_batch, self.target)
        num_rows = max_rows if num_texts is None else min(max_rows, num_texts)
        return Batch(
            session,
            self.model,
            partial(self._open_stream, num_rows),
            partial(check_row, model=self.model),
            num_rows,
        )

    @checks_arguments(_STREAMING, options=KINDS)
    def generate_batch(
        self,
        prompts: Iterable[Any],
        mode: Mode = "linear_spec",
        *,
        max_rows: int | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Answer prompts of any lengths side by side.

        Each result is that of the prompt's own single run.

        Args:
            prompts: Token ids of each prompt, ``(n,)``.
            mode: Mode of all prompts.
            max_rows: Number of prompts that run at a time; None = 8, or the number that the target
                was built for. The next prompt takes the place of a finished one.
            options: Keywords as for :meth:`stream`. ``seed`` and ``max_new_tokens`` may be lists
                with one entry a prompt.

        Returns:
            One result a prompt, in their order.

        Raises:
            UsageError: a value is out of its range. Nothing has run then, unless a text outgrows
                the cache of a target that fixes it.
        """
        self.check_open()
        rows = check_rows(prompts, self.model)
        requests = [
            BatchRequest(ids, mode, chosen)
            for ids, chosen in zip(rows, options_by_prompt(options, len(rows)), strict=True)
        ]
        for request in requests:
            self.with_grammar(self._reader().read(mode, request.options))
        batch = self._new_batch(max_rows, max(1, len(requests)))
        results = {number: row for number, row, _ in batch.answer_all(requests)}
        return [results[number].result for number in range(len(requests))]

    def _generate(self, ids: Any, mode: Mode, **options: Any) -> tuple[Ids, int]:
        if "logprobs" in options:
            raise UsageError(
                "expected no logprobs here, where only tokens are returned, found them",
                "use stream(...).finish().logprobs",
            )
        sequence = self.new_sequence(ids)
        result = self.continue_sequence(sequence, mode, **options).finish()
        return np.array([sequence.tokens], np.int64), result.nfe

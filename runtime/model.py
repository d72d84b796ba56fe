"""The runtime's front door: open a bundle, generate in any mode, stream, continue a sequence in
another mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from trimode.errors import UsageError
from trimode.formats.contract import Mode
from trimode.formats.hints import TRAIN_SAMPLER
from trimode.formats.manifest import SamplerRecord
from trimode.formats.texts import reason_of
from trimode.runtime.auto.policy import StepCosts
from trimode.runtime.auto.timings import Timings, find_timings, read_timings, subject_of
from trimode.runtime.bundle.open import Bundle, open_bundle
from trimode.runtime.decode.algorithms import MODES
from trimode.runtime.decode.arguments import FLAG, PATH, TEXT, WHOLE, checks_arguments, instance_of
from trimode.runtime.decode.options import (
    DEFAULT_MARGIN,
    DEFAULT_QUADRATIC_LENGTH,
    DEFAULT_THRESHOLDS,
    KINDS,
    MODE,
    DecodeOptions,
    TokenChoices,
    check_options,
    default_block_length,
    make_options,
    read_options,
)
from trimode.runtime.decode.sequence import Sequence
from trimode.runtime.decode.stream import Generation, Stream
from trimode.runtime.decode.unmasking import SamplerName, Scorer
from trimode.runtime.engine.batch import Batch, BatchRequest
from trimode.runtime.sessions.base import BatchSession, Closable, Ids, Session, takes_block
from trimode.runtime.sessions.select import PORTABLE, open_session
from trimode.runtime.text.codec import TextCodec

END_THINK = "</think>"
DEFAULT_BATCH = 8
_ROW_OPTIONS = ("seed", "max_new_tokens")
"""Of these each prompt of a batch may have its own."""
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


class TriModeModel(Closable):
    """A bundle ready to run. Calls from several threads are independent: each sequence has its own
    cache.

    Attributes:
        bundle: what was opened, in which precision.
        model: the model's facts.
        target: the bundle's target that runs, or ``portable`` for its portable graphs.
        session: the loaded graphs.
        num_threads: inside one operator on the CPU; None = the library's choice.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        target: str = PORTABLE,
        num_threads: int | None = None,
        timings: Timings | None = None,
    ) -> None:
        self.bundle = bundle
        self.model = bundle.manifest.model
        self.target = target
        self.session = session
        self.num_threads = num_threads
        self._given_timings = timings
        self._costs_by: dict[tuple[bool, int, int], StepCosts] = {}

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
            path: the folder that ``trimode build`` wrote.
            precision: one of the bundle's; None = the one that was built first.
            target: one of that precision's targets, or ``portable``: its portable graphs on the
                CPU. None or ``auto``: a TensorRT target for the GPU of this machine, else ONNX
                Runtime on the GPU, else the CPU; the logger ``trimode.runtime`` says what and why.
            num_threads: threads inside one operator on the CPU; None = one per physical core.
            verify: compare the sha256 of every file that the precision reads with the manifest.
            runtime_cache: folder for what is made for this machine while running: kernels that
                TensorRT-RTX compiles, written by :meth:`close` (None = not kept), and int4 weights
                as ONNX Runtime arranges them for the processor (None = the user's cache folder).
            timings: what mode ``auto`` chooses by, a file that ``trimode bench -o`` wrote; None =
                what it kept of this machine, if anything.

        Raises:
            UsageError: the bundle has no such precision or target, or ``timings`` is no such file.
            BundleError: the bundle is missing, damaged or of another schema than this library's, or
            the target was compiled by another version.
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
        """Give the memory of the weights back; nothing can be generated afterwards, and streams
        that are not finished say so.

        Garbage collection does it, too, but later. Closing twice is fine.
        """
        if self.is_closed:
            return
        self.is_closed = True
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
        """The table that mode ``auto`` chooses by: the one that was given, or that ``trimode
        bench`` kept; None where there is none.
        """
        return find_timings(
            subject_of(self.bundle, self.target, self.num_threads), self._given_timings
        )

    @cached_property
    def scorer(self) -> Scorer:
        """The bundle's learned sampler; :class:`UsageError` where it has none."""
        # ONNX Runtime is an optional extra, which a TensorRT target does without
        from trimode.runtime.decode.learned_sampler import LearnedScorer

        return LearnedScorer(self.bundle.path / self._sampler_record().file, self.num_threads)

    @checks_arguments(_GENERATING, options=_CHOICES)
    def ar_generate(
        self,
        ids: Any,
        max_new_tokens: int = 128,
        eos_token_id: int | Seq[int] | None = None,
        **choices: Unpack[TokenChoices],
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
        """Block-diffusion generation; otherwise like :meth:`ar_generate`.

        ``sampler`` decides which slots a forward fills (:mod:`trimode.runtime.decode.unmasking`);
        ``threshold`` None = 0.9, or what belongs to the sampler.
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
        """Linear self-speculation: the tokens of :meth:`ar_generate`, or their distribution, in
        fewer forwards; otherwise like it.
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
        """Quadratic self-speculation, under the reference's name: the tokens of
        :meth:`ar_generate`, verified and drafted in the same forwards.

        Otherwise like it, but always greedy: of ``choices``, ``stop`` alone may change anything.

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
        """Whichever of AR and linear self-speculation is fastest at each step, with blocks up to
        ``block_length``; otherwise like the latter.
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
        """A sequence that starts with the prompt ``ids (1, n)``; see :meth:`continue_sequence`.

        Raises:
            UsageError: no tokens, ids out of range, more than one row, or a prompt that leaves no
                room.
        """
        self.check_open()
        return Sequence(self.session, self.model, self._check_ids(ids))

    @checks_arguments(_STREAMING, options=KINDS)
    def continue_sequence(self, sequence: Sequence, mode: Mode, **options: Any) -> Stream:
        """Go on from where ``sequence`` stands, in any mode; what is cached is not read again."""
        return self._open_stream(1, sequence, mode, **options)

    def _open_stream(self, batch: int, sequence: Sequence, mode: Mode, **options: Any) -> Stream:
        """For a sequence that runs side by side with others, ``batch`` of them at most."""
        self.check_open()
        return Stream(sequence, mode, self._check_choices(mode, options, batch), lambda: self.codec)

    def _check_choices(self, mode: Mode, options: dict[str, Any], batch: int = 1) -> DecodeOptions:
        options = read_options(options)
        if mode not in MODES:
            raise UsageError(
                f"expected a mode among {', '.join(MODES)}, found {mode!r}",
                "see the README for what each mode does",
            )
        defaults = {
            "threshold": DEFAULT_THRESHOLDS[mode],
            "block_length": default_block_length(mode, self.model),
        }
        chosen = make_options(
            **{**defaults, **self._for_sampler(mode, options), **self._with_end_think(options)}
        )
        check_options(chosen, self.model, mode)
        if mode == "auto" and chosen.costs is None:
            chosen = replace(chosen, costs=self._costs(chosen, batch))
        if mode == "quadratic_spec":
            self._check_quadratic(chosen.block_length)
        elif mode != "ar" and chosen.costs is None:
            self.session.check_block_length(chosen.block_length)
        return chosen

    @checks_arguments(_STREAMING)
    def new_batch(self, max_rows: int | None = None) -> Batch:
        """Room for so many texts side by side, in any modes; see
        :class:`~trimode.runtime.engine.batch.Batch`. None = 8, or what the target was built for.

        Raises:
            UsageError: ``max_rows`` is below 1, or more than the target was built for; or the
                session runs single texts only.
        """
        return self._new_batch(max_rows)

    def _new_batch(self, max_rows: int | None, num_texts: int | None = None) -> Batch:
        """With a row for each of ``num_texts``, if that are fewer."""
        self.check_open()
        if not isinstance(self.session, BatchSession):
            raise UsageError(
                "expected a session that runs several texts in one forward, found one that does not",
                "open the bundle's targets instead",
            )
        most = self.session.max_batch
        if max_rows is None:
            max_rows = DEFAULT_BATCH if most is None else min(DEFAULT_BATCH, most)
        if max_rows < 1:
            raise UsageError(
                f"expected a batch of at least 1 row, found {max_rows}",
                "ask for as many rows as texts are to run side by side",
            )
        if most is not None and max_rows > most:
            raise UsageError(
                f"expected a batch of at most {most} rows, which target {self.target} was built for, found {max_rows}",
                "build the target with a larger --max-batch, or choose one that runs on ONNX Runtime",
            )
        num_rows = max_rows if num_texts is None else min(max_rows, num_texts)
        return Batch(
            self.session,
            self.model,
            partial(self._open_stream, num_rows),
            self._check_row,
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
        """Answer prompts of any lengths side by side; each result is that of its own single run.

        Args:
            prompts: token ids, each ``(n,)``.
            mode: of all.
            max_rows: how many at a time; the next prompt takes the place of one that is finished.
            None = 8, or what the target was built for.
            options: as for :meth:`stream`; ``seed`` and ``max_new_tokens`` may be lists, with one
                entry a prompt.

        Returns:
            One result a prompt, in their order.

        Raises:
            UsageError: a value is out of its range. Nothing has run then, unless a text outgrows
                the cache of a target that fixes it.
        """
        self.check_open()
        rows = [self._check_row(ids) for ids in _listed(prompts)]
        requests = [
            BatchRequest(ids, mode, chosen)
            for ids, chosen in zip(rows, _each(options, len(rows)), strict=True)
        ]
        for request in requests:
            self._check_choices(mode, request.options)
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

    def _costs(self, options: DecodeOptions, batch: int) -> StepCosts | None:
        """What mode ``auto`` chooses by, where so many texts run side by side."""
        if self.timings is None:
            return None
        key = (options.use_drafter and self.model.has_drafter, batch, options.block_length)
        if key not in self._costs_by:
            self._costs_by[key] = self._usable_costs(self.timings, *key)
        return self._costs_by[key]

    def _usable_costs(
        self, timings: Timings, use_drafter: bool, batch: int, block_length: int
    ) -> StepCosts:
        costs = timings.costs(use_drafter=use_drafter, batch=batch)
        usable = costs.only(
            lambda length: length <= block_length and takes_block(self.session, length)
        )
        if not usable.lengths:
            found = f"expected timings of a block of at most {block_length} that the graphs take, found {', '.join(map(str, costs.lengths))}"
            raise UsageError(found, f"measure it: trimode bench BUNDLE --rows 1,{block_length}")
        return usable

    def _for_sampler(self, mode: Mode, options: dict[str, Any]) -> dict[str, Any]:
        """What the sampler that the options name needs and they leave open."""
        # that of another mode is refused with the other options
        sampler = options.get("sampler") if mode == "diffusion" else None
        if sampler == "learned":
            record = self._sampler_record()
            return {"threshold": record.threshold, "scorer": self.scorer}
        if sampler in ("schedule", "leftmost") and "threshold" in options:
            raise UsageError(
                f"expected no threshold with the sampler {sampler}, found {options['threshold']}",
                "leave it out: nothing is compared",
            )
        return {"threshold": DEFAULT_MARGIN} if sampler == "margin" else {}

    def _sampler_record(self) -> SamplerRecord:
        record = self.bundle.manifest.sampler
        if record is None:
            hint = f"{TRAIN_SAMPLER}, and add it: `trimode build CHECKPOINT -o BUNDLE --sampler FOLDER`"
            raise UsageError("expected a bundle with a learned sampler, found one without", hint)
        return record

    def _with_end_think(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options, with the tokenizer's ``</think>`` where a thinking budget names no token."""
        if (
            options.get("max_thinking_tokens") is None
            or options.get("end_think_token_id") is not None
        ):
            return options
        return {**options, "end_think_token_id": self.codec.token_id(END_THINK)}

    def _check_quadratic(self, block_length: int) -> None:
        if "quadratic" not in self.bundle.manifest.contracts:
            raise UsageError(
                "expected a bundle with the graph of quadratic self-speculation, found one without",
                "build the bundle again: `trimode build CHECKPOINT -o BUNDLE --quadratic --force`",
            )
        if block_length > self.model.max_quadratic_length:
            found = f"expected, for quadratic self-speculation, a block length from 1 to {self.model.max_quadratic_length}, found {block_length}"
            raise UsageError(
                found,
                f"the reference takes {DEFAULT_QUADRATIC_LENGTH}; a text that may be longer (--max-length) allows up to 32",
            )
        self.session.check_block_length(block_length, ("draft", "quadratic"))

    def _check_ids(self, ids: Any) -> list[int]:
        hint = "pass one sequence a call, as [[...]]; generate_batch takes several"
        array = _as_array(ids, "(1, n)", hint)
        if array.ndim != 2 or array.shape[0] != 1:
            raise UsageError(f"expected token ids of shape (1, n), found {array.shape}", hint)
        return self._check_tokens(array[0])

    def _check_row(self, ids: Any) -> list[int]:
        hint = "pass one list of token ids a row, as [1, 2]"
        array = _as_array(ids, "(n,)", hint)
        if array.ndim != 1:
            raise UsageError(f"expected token ids of shape (n,), found {array.shape}", hint)
        return self._check_tokens(array)

    def _check_tokens(self, array: NDArray[Any]) -> list[int]:
        if array.size == 0:
            raise UsageError(
                "expected at least one token, found an empty prompt",
                "start a text from the bos token if there is nothing to say",
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise UsageError(
                f"expected whole numbers as token ids, found {array.dtype}", "pass int64 ids"
            )
        wrong = array[(array < 0) | (array >= self.model.vocab_size)]
        if wrong.size:
            found = f"expected token ids from 0 to {self.model.vocab_size - 1}, found {wrong[0]}"
            raise UsageError(found, "check that the ids come from this model's tokenizer")
        if array.size >= self.model.max_length:
            raise UsageError(
                f"expected a prompt shorter than {self.model.max_length} tokens, found {array.size}",
                "shorten the prompt, or build with a larger --max-length",
            )
        return array.tolist()  # type: ignore[no-any-return]


def _as_array(ids: Any, shape: str, hint: str) -> NDArray[Any]:
    try:
        return np.asarray(ids)
    except ValueError as error:
        raise UsageError(
            f"expected token ids of shape {shape}, found rows of different length", hint
        ) from error
    except (
        TypeError,
        RuntimeError,
    ) as error:  # of arrays of other libraries: on a GPU, or of a type that numpy lacks
        raise UsageError(
            f"expected token ids of shape {shape}, found {type(ids).__name__}: {reason_of(error)}",
            hint,
        ) from error


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping):
        return list(prompts)
    raise UsageError(
        f"prompts: expected a list of prompts, found {type(prompts).__name__}",
        "pass token ids, as [[1, 2], [3]]",
    )


def _each(options: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each of ``count`` prompts."""
    chosen = [dict(options) for _ in range(count)]
    for name in _ROW_OPTIONS:
        if isinstance(options.get(name), list | tuple | np.ndarray):
            if np.ndim(options[name]) != 1:
                raise UsageError(
                    f"{name}: expected one number a prompt, found {np.ndim(options[name])} dimensions",
                    "pass a flat list",
                )
            if len(options[name]) != count:
                raise UsageError(
                    f"expected one {name}, or one a prompt ({count}), found {len(options[name])}",
                    "pass as many as there are prompts",
                )
            for row, value in zip(chosen, options[name], strict=True):
                row[name] = value
    return chosen

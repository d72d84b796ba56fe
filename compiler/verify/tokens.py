"""Compares each mode's tokens with the trunk's, and modes with ar.

The same algorithms run over the target's session and over the torch trunk.

In float32 tokens must be equal. In 16-bit types two runs may part, and what follows then has
nothing to do with each other; so only the first divergence is judged, by how much the reference
prefers its own choice there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.calib.reference.torch_session import TorchSession
from trimode.compiler.verify.rounding import SPREAD_FACTOR
from trimode.compiler.verify.runners import CachedText
from trimode.compiler.verify.tolerance import Tolerance
from trimode.formats.contract import GRAPH_NAMES, GraphName, Mode, ModelInfo
from trimode.formats.finite import finite_or, is_within, largest
from trimode.formats.verification import TokenParity
from trimode.runtime.decode.algorithms import ALGORITHMS, Counters
from trimode.runtime.decode.forward import NotFiniteError
from trimode.runtime.decode.options import DEFAULT_THRESHOLDS, DecodeOptions, default_block_length
from trimode.runtime.decode.sequence import Sequence as TextSequence
from trimode.runtime.sessions.base import Array, Ids, KVCache, Session, SessionView

SPECULATIVE: tuple[Mode, ...] = ("linear_spec", "quadratic_spec")
"""Modes whose tokens are those of ar."""


@dataclass(frozen=True)
class TokenPrompt:
    """Holds a prompt and what ends its text.

    ``eos_token_ids`` is None for the model's, () where nothing ends the text.
    """

    token_ids: list[int]
    eos_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DenoiseForward:
    """Records one denoise forward.

    It has the input and the best candidates of every slot, ``(L,)`` and ``(L, 5)``.
    """

    past_length: int
    block: Ids
    ids: Array
    probabilities: Array

    def has_input_of(self, other: DenoiseForward) -> bool:
        """Whether both forwards were given the same tokens at the same place."""
        return self.past_length == other.past_length and np.array_equal(self.block, other.block)


@dataclass(frozen=True)
class Run:
    """Records a generation.

    It has tokens, forward passes, and the denoise forwards in order, kept for diffusion only.

    ``is_whole`` is False where a graph returned what is no number; the tokens are those before it.
    """

    token_ids: list[int]
    nfe: int
    denoised: list[DenoiseForward]
    is_whole: bool = True


class Witness(SessionView):
    """Remembers the denoise forwards of a session."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.denoised: list[DenoiseForward] = []

    def run(
        self,
        graph_name: GraphName,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        """Run a graph, and remember what it drafted."""
        outputs = super().run(graph_name, cache, input_ids, past_length, drafter_scale)
        if graph_name == "draft":
            ids, probabilities = (np.array(output[0]) for output in outputs)
            self.denoised.append(
                DenoiseForward(past_length, input_ids[0].copy(), ids, probabilities)
            )
        return outputs


def compare_tokens(
    reference: TorchSession,
    target: Session,
    model: ModelInfo,
    prompts: Sequence[TokenPrompt],
    max_new_tokens: int,
    tolerance: Tolerance,
    *,
    perturbed: Sequence[TorchSession] = (),
    graph_names: Sequence[GraphName] = GRAPH_NAMES,
) -> Iterator[TokenParity]:
    """Compare every mode's tokens with the reference's.

    Self-speculation is also compared with the target's own ar.

    Args:
        reference: Session of the trunk.
        target: Session of the target.
        model: Facts of the bundle's model.
        prompts: Prompts to continue.
        max_new_tokens: Most tokens of each generation.
        tolerance: Tolerance of the target.
        perturbed: Sessions of the trunk that round inputs at random within the bound; where there
            are any, tokens may part at near-ties.
        graph_names: Graphs of the bundle, which decide the modes.
    """
    for number, prompt in enumerate(prompts):
        judge = Judge(reference, model, prompt.token_ids, tolerance, perturbed)
        own_ar: Run | None = None
        for mode, use_drafter in _ways(model, graph_names):
            block_length = default_block_length(mode, model)
            options = DecodeOptions(
                max_new_tokens,
                block_length,
                DEFAULT_THRESHOLDS[mode],
                use_drafter is not False,
                prompt.eos_token_ids,
            )
            expected = _generate(reference, model, prompt, mode, options)
            found = _generate(target, model, prompt, mode, options)
            yield _record(judge, number, mode, use_drafter, "reference", expected, found)
            if mode == "ar":
                own_ar = found
            if mode in SPECULATIVE:
                assert own_ar is not None
                yield _record(judge, number, mode, use_drafter, "ar", own_ar, found)


class Verdict(NamedTuple):
    """Says how much the reference prefers its own choice.

    It concerns the place where two runs part; ``tolerance`` is what the preference may be.
    """

    preference: float | None
    tolerance: float

    @property
    def is_near_tie(self) -> bool:
        """Whether the other choice is one that rounding explains."""
        return is_within(self.preference, self.tolerance)


class Judge:
    """Asks the reference about the place where two runs part.

    Both runs are over one prompt.

    Args:
        reference: Session of the trunk.
        model: Facts of the bundle's model.
        prompt: Token ids of the prompt.
        tolerance: Tolerance of the target.
        perturbed: Sessions of the trunk that round inputs at random. How far that takes them from
            the reference, times :data:`SPREAD_FACTOR`, is allowed beyond the tolerance.
    """

    def __init__(
        self,
        reference: TorchSession,
        model: ModelInfo,
        prompt: list[int],
        tolerance: Tolerance,
        perturbed: Sequence[TorchSession] = (),
    ) -> None:
        self._reference, self._model, self.prompt, self.tolerance = (
            reference,
            model,
            prompt,
            tolerance,
        )
        self._dithered = perturbed
        self.block_length = model.block_size

    @property
    def must_equal(self) -> bool:
        """Whether tokens may not part at all."""
        return self.tolerance.must_equal and not self._dithered

    def causal(self, before: list[int], choices: Sequence[int]) -> Verdict:
        """Judge two next tokens after the prompt and ``before``.

        The verdict is about the one that the reference likes less.
        """
        logits = self._next_logits(self._reference, before)
        spread = SPREAD_FACTOR * largest(
            [np.abs(self._next_logits(other, before) - logits).max() for other in self._dithered]
        )
        return Verdict(
            float(logits.max() - logits[list(choices)].min()),
            self.tolerance.near_tie(float(np.abs(logits).max())) + 2 * spread,
        )

    def denoised(self, expected: Run, found: Run, start: int) -> Verdict:
        """Judge the last denoise forward that both runs began alike.

        It is the last that both gave the same block, in the block that begins at token ``start``.
        The verdict compares its probabilities on both sides.

        A slot is filled by comparing probabilities with each other and with the threshold. Where
        they agree within the bound, so do the decisions, but for near-ties.
        """
        before = expected.token_ids[:start]
        bound = 2 * self.tolerance.probabilities(
            float(np.abs(self._next_logits(self._reference, before)).max())
        )
        last: tuple[DenoiseForward, DenoiseForward] | None = None
        for pair in zip(
            *(_of_block(run, len(self.prompt) + start) for run in (expected, found)), strict=False
        ):
            if not pair[0].has_input_of(pair[1]):
                break
            last = pair
        if last is None:
            return Verdict(None, bound)
        spread = SPREAD_FACTOR * largest(
            [
                _largest_gap(
                    last[0], self._denoise(other, before, last[0]), self._model.mask_token_id
                )
                for other in self._dithered
            ]
        )
        return Verdict(_largest_gap(*last, self._model.mask_token_id), bound + 2 * spread)

    def _denoise(
        self, session: TorchSession, before: list[int], like: DenoiseForward
    ) -> DenoiseForward:
        """The same denoise forward by another session."""
        text = CachedText(session, np.array(self.prompt + before, np.int64))
        text.read_to(like.past_length)
        ids, probabilities = session.run("draft", text.cache, like.block[None], like.past_length)
        return DenoiseForward(
            like.past_length, like.block, np.array(ids[0]), np.array(probabilities[0])
        )

    def _next_logits(self, session: TorchSession, before: list[int]) -> NDArray[Any]:
        text = CachedText(session, np.array(self.prompt + before, np.int64))
        text.read_to(len(text.token_ids) - 1)
        _, logits = session.run("ar", text.cache, text.token_ids[None, -1:], text.length)
        return np.array(logits[0])


def _record(
    judge: Judge,
    number: int,
    mode: Mode,
    use_drafter: bool | None,
    against: Literal["reference", "ar"],
    expected: Run,
    found: Run,
) -> TokenParity:
    pairs = list(zip(expected.token_ids, found.token_ids, strict=False))
    length = max(len(expected.token_ids), len(found.token_ids))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    is_whole = expected.is_whole and found.is_whole
    verdict = Verdict(None, 0.0)
    if first < len(pairs) and is_whole:
        start = first - first % judge.block_length
        if mode == "diffusion" and first > start:
            verdict = judge.denoised(expected, found, start)
        else:
            verdict = judge.causal(expected.token_ids[:first], pairs[first])
    is_equal = first == length and is_whole
    return TokenParity(
        mode=mode,
        against=against,
        use_drafter=use_drafter,
        prompt=number,
        prompt_length=len(judge.prompt),
        num_tokens=length,
        num_equal=sum(a == b for a, b in pairs),
        first_divergence=None if is_equal else first,
        preference=None if is_equal else finite_or(None, verdict.preference),
        tolerance=None if is_equal or judge.must_equal else finite_or(0.0, verdict.tolerance),
        nfe=found.nfe,
        other_nfe=expected.nfe,
        passed=is_equal or (not judge.must_equal and verdict.is_near_tie),
    )


def _of_block(run: Run, past_length: int) -> list[DenoiseForward]:
    return [forward for forward in run.denoised if forward.past_length == past_length]


def _largest_gap(expected: DenoiseForward, found: DenoiseForward, mask_token_id: int) -> float:
    """Largest gap of two denoise forwards over the masked slots.

    It is how far the two best probabilities are apart. Where the best ids differ, it is how much
    less probable the other is.
    """
    gaps = [0.0]
    for slot in np.flatnonzero(expected.block == mask_token_id):
        best, other = expected.ids[slot, 0], found.ids[slot, 0]
        if best == other:
            gaps.append(
                abs(float(expected.probabilities[slot, 0]) - float(found.probabilities[slot, 0]))
            )
        else:
            is_it = expected.ids[slot] == other
            # None of the candidates: at most as probable as the last of them.
            theirs = expected.probabilities[slot][is_it if is_it.any() else slice(-1, None)]
            gaps.append(float(expected.probabilities[slot, 0] - theirs[0]))
    return largest(gaps)


def count_generations(
    model: ModelInfo, num_prompts: int, graph_names: Sequence[GraphName] = GRAPH_NAMES
) -> int:
    """How many records :func:`compare_tokens` yields."""
    return num_prompts * sum(
        2 if mode in SPECULATIVE else 1 for mode, _ in _ways(model, graph_names)
    )


def _ways(model: ModelInfo, graph_names: Sequence[GraphName]) -> Iterator[tuple[Mode, bool | None]]:
    """Yield modes with the drafter on, off or None; ar comes first."""
    yield from (("ar", None), ("diffusion", None))
    yield from (
        (("linear_spec", True), ("linear_spec", False))
        if model.has_drafter
        else (("linear_spec", None),)
    )
    if "quadratic" in graph_names:
        yield "quadratic_spec", None


def _generate(
    session: Session, model: ModelInfo, prompt: TokenPrompt, mode: Mode, options: DecodeOptions
) -> Run:
    witness, counters = Witness(session), Counters()
    sequence = TextSequence(witness, model, prompt.token_ids)
    is_whole = True
    try:
        for _ in ALGORITHMS[mode](sequence, options, counters):
            pass
    except NotFiniteError:  # the record of the graph says which, and where
        is_whole = False
    return Run(
        sequence.tokens[len(prompt.token_ids) :],
        counters.nfe,
        witness.denoised if mode == "diffusion" else [],
        is_whole,
    )

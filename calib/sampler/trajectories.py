"""Denoises blocks state by state, beside the *targets* of their slots.

The text goes on with the targets.

Targets are what denoising ends with that fills one slot a forward: the most probable one (*serial*,
as in the report), or the *leftmost*, which is often the better text; or what the model writes
autoregressively. The first two are what denoising can reach and bold filling misses. The last may
be better still, but where it leaves what denoising writes, there is no way to it.

The runtime's own decoder denoises each block of a text several times, more or less boldly, over a
session that takes notes. It does so with confidence thresholds, down to careless ones; then as a
sampler that is never wrong, which fills every slot whose candidate is the target; and as one that
misses half of these. A trained sampler will pass through states like those, and no threshold does.

A slot's label is whether its best candidate is the target. Two kinds of states are left out: those
that have been seen in the same block, and those in which a slot has been filled with something else
than the target, because nobody knows what should become of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimode.formats.contract import GraphName, ModelInfo
from trimode.runtime.decode.algorithms import Counters, decode_ar, decode_diffusion
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence as DecodedSequence
from trimode.runtime.decode.unmasking import SamplerName, Slots
from trimode.runtime.sessions.base import Array, Ids, KVCache, Session, SessionView
from trimode.runtime.text.prompts import Text

Target = Literal["serial", "leftmost", "ar"]
ONE_BY_ONE: dict[Target, SamplerName] = {"serial": "schedule", "leftmost": "leftmost"}
"""The policies of denoising whose text is a target."""
THRESHOLDS = (0.99, 0.9, 0.6, 0.3)
HIT_RATES = (1.0, 0.5)
"""Shares of the right slots that samplers fill which are never wrong."""


_State = tuple[Ids, Array, Array, Ids]
"""A block, its candidates, their probabilities, and the targets."""


class States(NamedTuple):
    """Holds N states of blocks of L slots.

    Attributes:
        blocks: Blocks that the denoise forward saw, ``(N, L)`` int32.
        ids: Candidates of the forward, ``(N, L, 5)`` int32.
        probabilities: Probabilities of the candidates, ``(N, L, 5)`` float32.
        targets: Targets, ``(N, L)`` int32; the mask token behind the end of the text.
    """

    blocks: Tensor
    ids: Tensor
    probabilities: Tensor
    targets: Tensor

    def labels(self, mask_token_id: int) -> tuple[Tensor, Tensor]:
        """Tell whether each slot's best candidate is right, and which slots count.

        Masked ones with a target count. Both are ``(N, L)`` bool.
        """
        return self.ids[..., 0] == self.targets, (self.blocks == mask_token_id) & (
            self.targets != mask_token_id
        )


@dataclass
class _Notes:
    """Holds what the forwards of one block took and returned."""

    denoised: dict[bytes, tuple[Ids, Array, Array]] = field(default_factory=dict)
    causal: dict[tuple[int, bytes], tuple[Array, ...]] = field(default_factory=dict)
    last_causal: Ids | None = None


class StateRecorder(SessionView):
    """Records the states of blocks, and runs nothing twice until :meth:`forget`.

    It is right only where one sequence denoises, from the same place, again and again, and is
    rolled back to that place before every :meth:`forget`: what a forward that is left out would
    have written into the cache is then either there or not read again.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._notes = _Notes()

    def forget(self) -> None:
        """Begin another block."""
        self._notes = _Notes()

    @property
    def denoised(self) -> list[tuple[Ids, Array, Array]]:
        """States of the block so far, in order.

        A state is a block ``(L,)``, candidates and probabilities ``(L, 5)``.
        """
        return list(self._notes.denoised.values())

    @property
    def committed(self) -> Ids:
        """Input ``(T,)`` of the last causal forward."""
        assert self._notes.last_causal is not None
        return self._notes.last_causal

    def run(
        self,
        graph_name: GraphName,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        """Run a graph, or give back what the same forward returned before."""
        key = input_ids.tobytes()
        if graph_name != "draft":
            self._notes.last_causal = input_ids[0].copy()
            if (past_length, key) not in self._notes.causal:
                self._notes.causal[past_length, key] = self._session.run(
                    graph_name, cache, input_ids, past_length, drafter_scale
                )
            return self._notes.causal[past_length, key]
        if key not in self._notes.denoised:
            ids, probabilities = self._session.run(
                graph_name, cache, input_ids, past_length, drafter_scale
            )
            self._notes.denoised[key] = (
                input_ids[0].copy(),
                ids[0].copy(),
                probabilities[0].copy(),
            )
        _, ids, probabilities = self._notes.denoised[key]
        return ids[None], probabilities[None]


class _KnowsTargets:
    """Scores slots without a mistake, and misses some right ones."""

    def __init__(self, targets: Ids, hit_rate: float, rng: random.Random) -> None:
        self._targets, self._hit_rate, self._rng = targets, hit_rate, rng

    def score(
        self,
        block: Ids,  # noqa: ARG002
        masked: Slots,  # noqa: ARG002
        ids: Array,
        probabilities: Array,
    ) -> NDArray[np.float32]:
        """Score 1 for a slot that may be filled.

        Of the others, and if there is none, the most confident right slot has the highest score.
        """
        right = ids[:, 0] == self._targets
        is_hit = np.array([self._rng.random() < self._hit_rate for _ in right])
        rest = np.where(right, probabilities[:, 0].astype(np.float32) / 2, 0)
        return np.where(right & is_hit, 1.0, rest).astype(np.float32)


def write_states(
    session: StateRecorder,
    model: ModelInfo,
    prompt: Text,
    block_length: int,
    max_new_tokens: int,
    target: Target,
    rng: random.Random,
) -> States:
    """Denoise the blocks of one text; return all their states.

    Args:
        session: Session over the model.
        model: Facts that decoding needs.
        prompt: Tokens that the text begins with.
        block_length: Slots of a block, L.
        max_new_tokens: Longest answer, in tokens.
        target: Kind of the targets.
        rng: Source of the misses of a sampler.
    """
    sequence = DecodedSequence(session, model, prompt)
    end = len(prompt) + min(max_new_tokens, sequence.room)
    found: list[_State] = []
    while len(sequence.tokens) < end and not (
        len(sequence.tokens) > len(prompt) and sequence.tokens[-1] in model.eos_token_ids
    ):
        session.forget()
        limit = min(block_length, end - len(sequence.tokens))
        limits = DecodeOptions(max_new_tokens=limit, block_length=block_length)
        kept, targets = (
            _autoregressive(sequence, limits)
            if target == "ar"
            else _one_by_one(session, sequence, limits, ONE_BY_ONE[target])
        )
        _pass_through(sequence, limits, targets, rng)
        found += [
            (*state, targets)
            for state in session.denoised
            if _agrees(state[0], targets, model.mask_token_id)
        ]
        sequence.append(kept)
    return _stack(found, block_length)


def _pass_through(
    sequence: DecodedSequence, limits: DecodeOptions, targets: Ids, rng: random.Random
) -> None:
    """Denoise a block by thresholds, and by samplers that know targets."""
    start = len(sequence.tokens)
    for threshold in THRESHOLDS:
        _denoise(sequence, start, limits, threshold=threshold)
    for hit_rate in HIT_RATES:
        scorer = _KnowsTargets(targets, hit_rate, rng)
        _denoise(sequence, start, limits, sampler="learned", threshold=0.75, scorer=scorer)


def join(parts: Sequence[States]) -> States:
    """Join the states of several texts."""
    return States(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def batches(states: States, batch_size: int, generator: torch.Generator) -> Iterator[States]:
    """Yield batches without end, drawn with repetition."""
    while True:
        chosen = torch.randint(len(states.blocks), (batch_size,), generator=generator)
        yield States(*(tensor[chosen] for tensor in states))


def _one_by_one(
    session: StateRecorder,
    sequence: DecodedSequence,
    limits: DecodeOptions,
    sampler: SamplerName,
) -> tuple[Text, Ids]:
    """Denoise a block; return what would be kept, and all of it.

    It may end before it comes to what follows the end of the text.
    """
    kept = _denoise(sequence, len(sequence.tokens), limits, sampler=sampler)
    return kept, session.committed


def _autoregressive(sequence: DecodedSequence, limits: DecodeOptions) -> tuple[Text, Ids]:
    """Write a block autoregressively; pad the targets with the mask token."""
    start = len(sequence.tokens)
    kept = [token for tokens in decode_ar(sequence, limits, Counters()) for token in tokens]
    sequence.truncate(start)
    targets = np.full(limits.block_length, sequence.model.mask_token_id, np.int64)
    targets[: len(kept)] = kept
    return kept, targets


def _denoise(
    sequence: DecodedSequence, start: int, limits: DecodeOptions, **policy: Any
) -> list[int]:
    """Denoise one block and forget it; return what would be kept."""
    options = DecodeOptions(limits.max_new_tokens, limits.block_length, **policy)
    kept = [token for tokens in decode_diffusion(sequence, options, Counters()) for token in tokens]
    sequence.truncate(start)
    return kept


def _agrees(block: Ids, targets: Ids, mask_token_id: int) -> bool:
    """Tell whether every filled slot has its target, where it has one."""
    return bool(((block == targets) | (block == mask_token_id) | (targets == mask_token_id)).all())


def _stack(found: list[_State], block_length: int) -> States:
    columns = [torch.from_numpy(np.stack(column)) for column in zip(*found, strict=True)]
    blocks, ids, probabilities, targets = columns
    assert blocks.shape[1] == block_length
    return States(blocks.int(), ids.int(), probabilities.float(), targets.int())

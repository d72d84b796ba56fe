"""Tells what to expect of a text by its prompt's beginning.

Texts whose prompts begin alike have shown it before. Mode ``auto`` expects the same before it has
seen any of the text.

A service mostly sees a few kinds of prompts, each with its own instructions in front, and texts of
one kind resemble each other: in how often their drafts are accepted, slot by slot, and in how long
they are. Prompts that were measured are therefore put into a tree by their first tokens, and a new
prompt is expected to do what those did that share the longest beginning with it.

A kind keeps a digest of its beginning, not the tokens, so a table tells nobody's prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trimode.formats.record import Record

PRIOR_ACCEPTANCE = 0.93
"""Acceptance of a slot whose predecessors were accepted, where nothing was measured."""
PRIOR_SLOTS = 4.0
"""Drafts that this weighs as much as."""
GREATEST_RATE = 0.999
"""Rate that is expected at most: no number of accepted drafts makes the next certain."""
KIND_TRIALS = 4.0
"""Trials of one slot that weigh as much as what the shorter beginning says of it."""
LEAST_PROMPTS, LEAST_SHARE = 8, 0.01
"""Least prompts of a kind, and their least share of all."""
LEAST_WEIGHT, GREATEST_WEIGHT = 0.25, 8.0
"""Weights of what a kind says against what a text shows, in rejections."""
SILVERMAN = 0.9
"""Bandwidth of a kernel estimate over the standard deviation, times the fifth root of the number of
values (Silverman 1986, eq. 3.31).
"""


class PromptGroup(Record):
    """Groups prompts that begin with the same tokens, with what followed.

    Attributes:
        num_tokens: Number of tokens that they have in common.
        sha256: Digest of these tokens, as little-endian int64.
        tried: Number of times that all drafts before a slot were accepted, per slot of the block.
        accepted: Number of times that its own draft was, too.
        weight: Rejections of its own that a text must show to count as much as the kind. The more
            the texts of a kind differ, the fewer.
        lengths: Lengths of the texts that ended by themselves, in tokens, ascending.
    """

    num_tokens: int = Field(ge=0)
    sha256: str
    num_prompts: int = Field(ge=1)
    tried: tuple[int, ...]
    accepted: tuple[int, ...]
    weight: float = Field(gt=0)
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class FinishedText:
    """Records how the drafts of a written text fared.

    Attributes:
        prompt: Token ids of the prompt.
        tried: Number of times that each slot's draft was tried, ``(num_slots,)``.
        accepted: Number of times that it was accepted, ``(num_slots,)``.
        length: Length of the text if it ended by itself, else None.
    """

    prompt: Sequence[int]
    tried: NDArray[np.int64]
    accepted: NDArray[np.int64]
    length: int | None


@dataclass(frozen=True)
class Prior:
    """Holds what is expected of a text.

    Attributes:
        rejection: Probability, per slot, that its draft is rejected where those before it are
            accepted.
        weight: Weight, as in :class:`PromptGroup`.
        ends: Probability at index ``n`` that a text of ``n`` tokens or more has no more; the last
            one goes for all longer ones. Empty = not known.
    """

    rejection: tuple[float, ...]
    weight: float
    ends: tuple[float, ...] = ()


@dataclass(frozen=True)
class AcceptanceHistory:
    """Holds what is known of kinds of prompts.

    Attributes:
        rate: Acceptance to expect where there are no kinds.
        kinds: Kinds of prompts.
    """

    rate: float = PRIOR_ACCEPTANCE
    kinds: tuple[PromptGroup, ...] = ()

    def prior(self, kinds: Sequence[PromptGroup], num_slots: int) -> Prior:
        """Return what to expect of a text of these kinds.

        Each kind contains the next one and is corrected by it.
        """
        rate = min(self.rate, GREATEST_RATE)
        rates, weight = np.full(num_slots, rate), (1 - rate) * PRIOR_SLOTS
        for kind in kinds:
            count = min(num_slots, len(kind.tried))
            tried, accepted = np.array(kind.tried[:count]), np.array(kind.accepted[:count])
            rates[:count] = (accepted + KIND_TRIALS * rates[:count]) / (tried + KIND_TRIALS)
            weight = kind.weight
        return Prior(
            tuple((1 - rates).tolist()),
            weight,
            ends_of(kinds[-1].lengths, kinds[-1].num_prompts) if kinds else (),
        )

    def kinds_of(self, prompt: Sequence[int]) -> Iterator[PromptGroup]:
        """Yield the kinds of a prompt, from the shortest beginning on."""
        digest, done = hashlib.sha256(), 0
        for num_tokens, kinds in self._by_length:
            if num_tokens > len(prompt):
                return
            digest.update(_as_bytes(prompt[done:num_tokens]))
            done = num_tokens
            kind = kinds.get(digest.hexdigest())
            if kind is not None:
                yield kind

    @cached_property
    def _by_length(self) -> list[tuple[int, dict[str, PromptGroup]]]:
        ordered = sorted(self.kinds, key=lambda kind: kind.num_tokens)
        return [
            (length, {kind.sha256: kind for kind in group})
            for length, group in groupby(ordered, key=lambda kind: kind.num_tokens)
        ]


def ends_of(lengths: Sequence[int], num_texts: int) -> tuple[float, ...]:
    """Compute how likely a text ends, by its number of tokens.

    Index ``n`` is for a text of ``n`` tokens. The last entry counts for all longer texts.

    A kernel estimate (normal, Silverman's bandwidth), and beside the texts that were written one
    that is longer than all, since there may be such. Behind what is known lengths have no memory,
    and as many tokens are to be expected as such texts have on the average.
    """
    if not lengths:
        return ()
    known = np.array(lengths, float)
    width = max(SILVERMAN * float(known.std()) * len(known) ** -0.2, 1e-3)
    at = np.arange(int(known.max() + 3 * width) + 2)
    weights = np.exp(-0.5 * ((at - known[:, None]) / width) ** 2)
    weights[:, 0] = 0
    ended = (weights / weights.sum(1, keepdims=True)).sum(0)
    reached = ended[::-1].cumsum()[::-1] + num_texts - len(known) + 1
    return (*(ended / reached).tolist(), 1 / float(known.mean()))


def tell_apart(texts: Sequence[FinishedText]) -> tuple[PromptGroup, ...]:
    """Find the beginnings that enough of the prompts share.

    They are a tree: one kind where prompts part, each way on. They come from the shortest to the
    longest.
    """
    least = max(LEAST_PROMPTS, LEAST_SHARE * len(texts))
    kinds, open_groups = [], [list(texts)]
    while open_groups:
        group = open_groups.pop()
        if len(group) < least:
            continue
        first, last = min(group, key=_tokens).prompt, max(group, key=_tokens).prompt
        shared = next(
            (i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other),
            min(len(first), len(last)),
        )
        kinds.append(_kind(group, shared))
        by_next: dict[int, list[FinishedText]] = {}
        for text in group:
            if len(text.prompt) > shared:
                by_next.setdefault(text.prompt[shared], []).append(text)
        open_groups.extend(by_next.values())
    return tuple(sorted(kinds, key=lambda kind: (kind.num_tokens, kind.sha256)))


def _kind(group: Sequence[FinishedText], num_tokens: int) -> PromptGroup:
    tried, accepted = sum(text.tried for text in group), sum(text.accepted for text in group)
    assert isinstance(tried, np.ndarray)
    assert isinstance(accepted, np.ndarray)
    return PromptGroup(
        num_tokens=num_tokens,
        sha256=hashlib.sha256(_as_bytes(group[0].prompt[:num_tokens])).hexdigest(),
        num_prompts=len(group),
        tried=tuple(tried.tolist()),
        accepted=tuple(accepted.tolist()),
        weight=_weight(group, tried, accepted),
        lengths=tuple(sorted(text.length for text in group if text.length is not None)),
    )


def _weight(
    group: Sequence[FinishedText], tried: NDArray[np.int64], accepted: NDArray[np.int64]
) -> float:
    """Estimate the weight of a kind from how its texts differ.

    It is the shape of the gamma distribution that multiplies the rate of rejections from one text
    to the next (shared frailty), by its moments.

    A text that is expected to have ``e`` rejections has ``r`` of them, with variance ``e + e * e /
    weight``.
    """
    rejection = 1 - (accepted + 1) / (tried + 2)
    expected = np.array([text.tried @ rejection for text in group])
    found = np.array([(text.tried - text.accepted).sum() for text in group])
    surplus = ((found - expected) ** 2 - expected).sum()
    weight = (expected**2).sum() / surplus if surplus > 0 else GREATEST_WEIGHT
    return float(np.clip(weight, LEAST_WEIGHT, GREATEST_WEIGHT))


def _tokens(text: FinishedText) -> list[int]:
    return list(text.prompt)


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, "<i8").tobytes()


def acceptance_rate(texts: Sequence[FinishedText]) -> float | None:
    """Compute the share of accepted drafts whose predecessors were accepted.

    It is None where no draft was judged.
    """
    tried = sum(int(text.tried.sum()) for text in texts)
    return sum(int(text.accepted.sum()) for text in texts) / tried if tried else None

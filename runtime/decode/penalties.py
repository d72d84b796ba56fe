"""Changes the logits of some tokens, as text and caller ask.

In the order of vLLM: bias (OpenAI's ``logit_bias``), repetition penalty (Keskar et al. 2019, CTRL;
as transformers has it), frequency and presence penalty (OpenAI's). The repetition penalty concerns
the tokens of the prompt and of the answer, the other two those of the answer alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.decode.sampling import SamplingOptions
from trimode.runtime.decode.vocabulary_row import Row
from trimode.runtime.sessions.base import Array, Ids

_NONE = np.empty(0, np.int64)


class Penalties:
    """Knows which tokens a text has, and changes logits accordingly.

    Args:
        sampling: Penalties and biases.
        vocab_size: Number V of tokens in the vocabulary.
        prompt: Tokens of the prompt.
    """

    def __init__(self, sampling: SamplingOptions, vocab_size: int, prompt: list[int]) -> None:
        self._sampling = sampling
        self._seen, self._counts = np.zeros(vocab_size, bool), np.zeros(vocab_size, np.int32)
        self._seen[prompt] = True
        self._bias = np.zeros(vocab_size) if sampling.logit_bias else None
        # whose logits are not the model's
        self._is_changed = np.zeros(vocab_size, bool)
        if sampling.repetition_penalty != 1:
            self._is_changed |= self._seen
        for token, bias in sampling.logit_bias:
            assert self._bias is not None
            self._bias[token], self._is_changed[token] = bias, True

    def add(self, token: int) -> None:
        """Take note of a token of the answer."""
        self._seen[token] = True
        self._counts[token] += 1
        if self._sampling.repetition_penalty != 1 or self._sampling.counts_tokens:
            self._is_changed[token] = True

    def take_back(self, token: int) -> None:
        """Count a token once less; the repetition penalty still knows it."""
        self._counts[token] -= 1

    def row(self, logits: NDArray[np.float32], forbidden: Ids = _NONE) -> Row:
        """Return a row ``(V,)`` as the penalties leave it.

        Args:
            logits: Logits of the model.
            forbidden: Tokens that must not come.
        """
        ids = np.flatnonzero(self._is_changed)
        if forbidden.size:
            ids = np.union1d(ids, forbidden)
        scores = self.changed(ids, logits[ids])
        scores[np.isin(ids, forbidden)] = -np.inf
        return Row(logits, ids, scores)

    def changed(self, ids: Array, scores: NDArray[Any], more: Ids = _NONE) -> NDArray[np.float64]:
        """Return logits or log-probabilities as the penalties leave them.

        The repetition penalty is another one to log-probabilities; the rest is the same.

        Args:
            ids: Tokens, of any shape.
            scores: Logits or log-probabilities of these, of the same shape.
            more: Tokens ``(m,)`` that the text has besides.
        """
        s, result = self._sampling, scores.astype(np.float64)
        if self._bias is not None:
            result += self._bias[ids]
        if s.repetition_penalty != 1:
            seen = self._seen[ids] | np.isin(ids, more)
            result = np.where(seen, _repeated(result, s.repetition_penalty), result)
        if s.counts_tokens:
            counts = self._counts[ids] + (ids[..., None] == more).sum(-1)
            result -= s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
        return result


def _repeated(scores: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        penalised = np.where(scores < 0, scores * penalty, scores / penalty)
    # What overflows is still a score; -inf stays what must not be drawn.
    most = np.finfo(np.float64).max
    return np.where(np.isinf(scores), scores, np.clip(penalised, -most, most))

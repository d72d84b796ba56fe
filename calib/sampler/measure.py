"""Measures a sampler: its scores on states, and texts denoised by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trimode.calib.sampler.training import score_states
from trimode.calib.sampler.trajectories import ONE_BY_ONE, States, Target
from trimode.formats.contract import ModelInfo
from trimode.formats.sampler import DenoisingRecord, ScoresRecord
from trimode.graphs.sampler.network import BlockSampler
from trimode.runtime.decode.algorithms import Algorithm, Counters, decode_ar, decode_diffusion
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence as DecodedSequence
from trimode.runtime.decode.unmasking import SamplerName, Scorer
from trimode.runtime.sessions.base import Session
from trimode.runtime.text.prompts import Text

CONFIDENCES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
SCORES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
USUAL_CONFIDENCE = 0.9
_POLICIES: tuple[tuple[SamplerName, float], ...] = (
    *(("threshold", value) for value in CONFIDENCES),
    *(("learned", value) for value in SCORES),
)
NUM_BINS = 10
LEAST_PROBABILITY = 1e-7

Values = NDArray[np.float64]


def measure_scores(sampler: BlockSampler, states: States, mask_token_id: int) -> ScoresRecord:
    """Compare scores and probabilities of the same slots with the truth."""
    labels, counts = (tensor.numpy() for tensor in states.labels(mask_token_id))
    right = labels[counts]
    scores = score_states(sampler, states, mask_token_id).double().numpy()[counts]
    confidence = states.probabilities[..., 0].double().numpy()[counts]
    return ScoresRecord(
        block_length=states.blocks.shape[1],
        num_slots=len(right),
        share_right=float(right.mean()),
        auc=auc(scores, right),
        loss=cross_entropy(scores, right),
        calibration_error=calibration_error(scores, right),
        confidence_auc=auc(confidence, right),
        confidence_loss=cross_entropy(confidence, right),
        confidence_calibration_error=calibration_error(confidence, right),
    )


def auc(values: Values, right: NDArray[np.bool_]) -> float | None:
    """Compute the area under the ROC curve by ranks (Mann-Whitney).

    Equal values count half.

    Returns:
        None if all are right, or none.
    """
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    if not num_right or not num_wrong:
        return None
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[right].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def cross_entropy(values: Values, right: NDArray[np.bool_]) -> float:
    """Compute the mean cross-entropy, in nats a slot."""
    p = np.clip(values, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return float(-np.where(right, np.log(p), np.log1p(-p)).mean())


def calibration_error(values: Values, right: NDArray[np.bool_]) -> float:
    """Compute the expected calibration error over :data:`NUM_BINS` equal bins."""
    bins = np.minimum((values * NUM_BINS).astype(int), NUM_BINS - 1)
    members = [bins == one for one in np.unique(bins)]
    gaps = [abs(float(values[i].mean() - right[i].mean())) * int(i.sum()) for i in members]
    return sum(gaps) / len(values)


def measure_texts(
    session: Session,
    model: ModelInfo,
    prompts: Sequence[Text],
    *,
    block_length: int,
    max_new_tokens: int,
    target: Target,
    scorer: Scorer,
    is_right: Callable[[Text, Text], bool | None],
    advance: Callable[[int], None],
) -> tuple[DenoisingRecord, ...]:
    """Count how often each policy writes the target, or a right text.

    The policies are thresholds on the probability and on the score.

    Args:
        session: Session over the model.
        model: Facts that decoding needs.
        prompts: Prompts to answer.
        block_length: Slots of a block, L.
        max_new_tokens: Longest answer, in tokens.
        target: Kind of text that counts as the target.
        scorer: Scorer of the slots.
        is_right: Function that judges an answer to a prompt; None if that is not known.
        advance: Function that is called with 1 after each prompt.
    """
    counts = [_Count(*policy) for policy in _POLICIES]
    num_known = 0
    for prompt in prompts:
        expected = _target_text(session, model, prompt, block_length, max_new_tokens, target)
        num_known += is_right(prompt, expected) is not None
        for count in counts:
            options = DecodeOptions(
                max_new_tokens,
                block_length,
                count.threshold,
                sampler=count.sampler,
                scorer=scorer,
            )
            text, nfe = _decode(decode_diffusion, session, model, prompt, options)
            count.add(text, nfe, is_target=text == expected, verdict=is_right(prompt, text))
        advance(1)
    return tuple(
        count.record(block_length, len(prompts), knows_answers=num_known > 0) for count in counts
    )


@dataclass
class _Count:
    """Counts the texts of a policy, its tokens and its forwards."""

    sampler: SamplerName
    threshold: float
    same: int = 0
    right: int = 0
    tokens: int = 0
    forwards: int = 0

    def add(self, text: Text, nfe: int, *, is_target: bool, verdict: bool | None) -> None:
        """Add a text; without a verdict, the target's text is right."""
        self.same += is_target
        self.right += is_target if verdict is None else verdict
        self.tokens += len(text)
        self.forwards += nfe

    def record(self, block_length: int, num_texts: int, *, knows_answers: bool) -> DenoisingRecord:
        return DenoisingRecord(
            block_length=block_length,
            sampler=self.sampler,
            threshold=self.threshold,
            num_texts=num_texts,
            same_as_target=self.same / num_texts,
            exact_match=self.right / num_texts if knows_answers else None,
            num_tokens=self.tokens,
            num_forwards=self.forwards,
            tokens_per_forward=self.tokens / self.forwards,
        )


def choose_threshold(measured: Sequence[DenoisingRecord]) -> float:
    """Choose the score from which a bundle fills slots by default.

    It is the fastest of those under which, over all block lengths, as many texts are right as under
    the best score, less one standard error of that share (the rule by which Breiman et al.,
    Classification and Regression Trees, 1984, choose a tree's size), and at least as many as under
    the usual threshold on the probability. A text is right that is a known answer; if no answer is
    known, the target's. If the sampler is no good, it is the highest score.
    """

    def over_lengths(sampler: str, threshold: float) -> tuple[float, float]:
        rows = [row for row in measured if (row.sampler, row.threshold) == (sampler, threshold)]
        right = sum(share_right(row) * row.num_texts for row in rows) / sum(
            row.num_texts for row in rows
        )
        return right, sum(row.num_tokens for row in rows) / sum(row.num_forwards for row in rows)

    shares = {value: over_lengths("learned", value)[0] for value in SCORES}
    best = max(shares.values())
    first = ("learned", SCORES[0])
    num_texts = sum(row.num_texts for row in measured if (row.sampler, row.threshold) == first)
    wanted = max(
        over_lengths("threshold", USUAL_CONFIDENCE)[0],
        best - math.sqrt(best * (1 - best) / num_texts),
    )
    able = [value for value, share in shares.items() if share >= wanted]
    return max(able, key=lambda value: over_lengths("learned", value)[1], default=max(SCORES))


def share_right(row: DenoisingRecord) -> float:
    """Return the share of right texts; if none is known, the target's."""
    return row.same_as_target if row.exact_match is None else row.exact_match


def _target_text(
    session: Session,
    model: ModelInfo,
    prompt: Text,
    block_length: int,
    max_new_tokens: int,
    target: Target,
) -> Text:
    if target == "ar":
        return _decode(decode_ar, session, model, prompt, DecodeOptions(max_new_tokens))[0]
    options = DecodeOptions(max_new_tokens, block_length, sampler=ONE_BY_ONE[target])
    return _decode(decode_diffusion, session, model, prompt, options)[0]


@torch.inference_mode()
def _decode(
    decode: Algorithm, session: Session, model: ModelInfo, prompt: Text, options: DecodeOptions
) -> tuple[Text, int]:
    counters, sequence = Counters(), DecodedSequence(session, model, prompt)
    text = [token for tokens in decode(sequence, options, counters) for token in tokens]
    return text, counters.nfe

"""Which slots a forward fills: each policy against its definition in plain lists, and the decoder
under each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Built
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trimode.errors import UsageError
from trimode.runtime.decode.algorithms import Counters, decode_diffusion
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.unmasking import Denoised, fill_policy

MASK = 100
PROMPT = [20, 30]


class Oracle:
    """Scores that a test gives."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def score(self, *_: Any) -> NDArray[np.float32]:
        return np.array(self.scores, np.float32)


@st.composite
def denoised(draw: st.DrawFn) -> tuple[Denoised, list[float]]:
    """A block of 1 to 9 slots; probabilities of few values, so that ties come up, and drawn tokens
    that are not the best candidate.
    """
    length, rng = draw(st.integers(1, 9)), np.random.default_rng(draw(st.integers(0, 9999)))
    masked = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    ids = np.stack([rng.permutation(np.arange(MASK - 4, MASK + 4))[:5] for _ in range(length)])
    probabilities = -np.sort(-rng.integers(0, 5, (length, 5)) / 8, axis=1)
    column = rng.integers(0, 5, length) if draw(st.booleans()) else np.zeros(length, int)
    rows = np.arange(length)
    block = np.where(masked, MASK, 7)
    one = Denoised(
        block,
        masked,
        ids,
        probabilities,
        ids[rows, column],
        probabilities[rows, column],
        MASK,
        draw(st.integers(0, 3)),
    )
    return one, (rng.integers(0, 5, length) / 4).tolist()


def best_or_above(slots: list[int], values: list[float], threshold: float) -> set[int]:
    if not slots:
        return set()
    return {max(slots, key=lambda i: (values[i], -i))} | {
        i for i in slots if values[i] >= threshold
    }


def expected(
    name: str, one: Denoised, threshold: float, steps: int, scores: list[float]
) -> set[int]:
    """By the table of the module, a slot at a time."""
    masked = [i for i, is_masked in enumerate(one.masked.tolist()) if is_masked]
    open_ = [i for i in masked if one.tokens[i] != MASK]
    confidence = one.confidence.tolist()
    if name == "threshold":
        return best_or_above(masked, confidence, threshold)
    if name == "schedule":
        left = max(1, steps - one.step)
        count = len(masked) // left + (len(masked) % left > 0)
        return set(sorted(open_, key=lambda i: (-confidence[i], i))[:count])
    if name == "margin":
        margins = []
        for i, row in enumerate(one.probabilities.tolist()):
            margins.append(
                confidence[i]
                - max(p for token, p in zip(one.ids[i], row, strict=True) if token != one.tokens[i])
            )
        return best_or_above(open_, margins, threshold)
    if name == "leftmost":
        return {i for i in masked[:1] if i in open_}
    judged = [
        scores[i] if one.tokens[i] == one.ids[i][0] else confidence[i]
        for i in range(len(confidence))
    ]
    return best_or_above(open_, judged, threshold)


@settings(max_examples=300, deadline=None)
@given(case=denoised(), threshold=st.sampled_from([0.0, 0.25, 0.5, 1.0]), steps=st.integers(1, 9))
@pytest.mark.parametrize("name", ["threshold", "schedule", "margin", "leftmost", "learned"])
def test_a_policy_is_its_definition(
    name: Any, case: tuple[Denoised, list[float]], threshold: float, steps: int
) -> None:
    one, scores = case
    chosen = fill_policy(name, threshold, steps, Oracle(scores))(one)
    assert chosen.dtype == bool
    assert set(np.flatnonzero(chosen).tolist()) == expected(name, one, threshold, steps, scores)


# In the decoder


class ByConfidence:
    """A learned sampler that any Python function stands in for: the square of the probability."""

    def score(self, block: Any, masked: Any, ids: Any, probabilities: Any) -> NDArray[np.float32]:
        return np.asarray(probabilities[:, 0] ** 2, np.float32)


def slow_text(
    it: Built, length: int, count: int, name: str, threshold: float, steps: int
) -> tuple[list[int], int]:
    """Block diffusion over the independent model, slot by slot in Python; end tokens are 11."""
    out: list[int] = []
    nfe = 0
    while len(out) < count and 11 not in out:
        block = [it.reference.pick(it.reference.logits(PROMPT + out)[-1])] + [MASK] * (length - 1)
        for step in range(length):
            if MASK not in block:
                break
            nfe += 1
            best = (
                it.reference.logits(PROMPT + out + block, block=length)[-length:]
                .softmax(-1)
                .topk(5)
            )
            p, ids = best.values.double().numpy(), best.indices.numpy()
            masked = np.array([token == MASK for token in block])
            one = Denoised(np.array(block), masked, ids, p, ids[:, 0], p[:, 0], MASK, step)
            chosen = expected(name, one, threshold, steps, (p[:, 0] ** 2).tolist())
            if not chosen:
                break
            for slot in chosen:
                block[slot] = int(ids[slot, 0])
            if 11 in block and MASK not in block[: block.index(11)]:
                break
        nfe += 1
        out += block
    return out[: min(count, out.index(11) + 1 if 11 in out else count)], nfe


@pytest.mark.parametrize("length", [1, 3, 8, 32])
@pytest.mark.parametrize(
    ("name", "threshold", "steps"),
    [
        ("schedule", 0, 3),
        ("schedule", 0, None),
        ("margin", 0.2, None),
        ("leftmost", 0, None),
        ("learned", 0.1, None),
    ],
)
def test_the_decoder_follows_it(
    built: Callable[[str], Built], name: Any, threshold: float, steps: int | None, length: int
) -> None:
    it = built("three_kv_heads")
    steps = None if steps is None else min(steps, length)
    options = DecodeOptions(21, length, threshold, sampler=name, steps=steps, scorer=ByConfidence())
    sequence, counters = it.model.new_sequence([PROMPT]), Counters()
    tokens = [token for kept in decode_diffusion(sequence, options, counters) for token in kept]
    assert (tokens, counters.nfe) == slow_text(it, length, 21, name, threshold, steps or length)


def test_a_schedule_keeps_to_its_steps_and_a_step_a_slot_is_serial(
    built: Callable[[str], Built],
) -> None:
    model = built("plain").model  # whose text below has neither end nor mask token
    for steps in (1, 2, 5):
        result = model.stream(
            [PROMPT],
            "diffusion",
            max_new_tokens=16,
            block_length=8,
            sampler="schedule",
            steps=steps,
            eos_token_ids=(),
        ).finish()
        assert (len(result.token_ids), result.forwards.denoise, result.forwards.commit) == (
            16,
            2 * steps,
            2,
        )
    serial = model.stream(
        [PROMPT],
        "diffusion",
        max_new_tokens=16,
        block_length=8,
        sampler="schedule",
        eos_token_ids=(),
    ).finish()
    unreachable = DecodeOptions(16, 8, 2.0, eos_token_ids=())  # a probability is 1 at most
    sequence, counters = model.new_sequence([PROMPT]), Counters()
    assert [
        t for kept in decode_diffusion(sequence, unreachable, counters) for t in kept
    ] == serial.token_ids
    assert counters.nfe == serial.nfe == 16


def test_generate_takes_a_sampler(built: Callable[[str], Built]) -> None:
    model = built("plain").model
    chosen = model.stream(
        [PROMPT], "diffusion", max_new_tokens=20, block_length=8, sampler="leftmost"
    ).finish()
    tokens, nfe = model.generate([PROMPT], max_new_tokens=20, block_length=8, sampler="leftmost")
    assert (tokens[0, 2:].tolist(), nfe) == (chosen.token_ids, chosen.nfe)
    usual = model.generate([PROMPT], max_new_tokens=20, block_length=8)
    assert np.array_equal(
        usual[0], model.generate([PROMPT], max_new_tokens=20, block_length=8, threshold=0.9)[0]
    )


@pytest.mark.parametrize("name", ["schedule", "margin", "leftmost"])
def test_rules_and_draws_go_with_every_policy(built: Callable[[str], Built], name: Any) -> None:
    options = {
        "max_new_tokens": 24,
        "block_length": 8,
        "sampler": name,
        "temperature": 1.0,
        "seed": 5,
        "min_new_tokens": 20,
        "logprobs": 2,
    }
    first, again = (
        built("plain").model.stream([PROMPT], "diffusion", **options).finish() for _ in range(2)
    )
    assert first.token_ids == again.token_ids
    assert 20 <= len(first.token_ids) <= 24
    assert MASK not in first.token_ids[:20]


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": (
        "diffusion",
        {"sampler": "best"},
        "a sampler among threshold, schedule, margin, leftmost, learned, found 'best'",
    ),
    "no sampler in the bundle": ("diffusion", {"sampler": "learned"}, "trimode calibrate sampler"),
    "other mode": (
        "linear_spec",
        {"sampler": "margin"},
        "in mode diffusion, found mode linear-spec",
    ),
    "learned in another mode": ("ar", {"sampler": "learned"}, "in mode diffusion, found mode ar"),
    "steps alone": ("diffusion", {"steps": 3}, "steps together with the sampler schedule"),
    "steps of another": (
        "diffusion",
        {"sampler": "margin", "steps": 3},
        "steps together with the sampler schedule",
    ),
    "no steps": ("diffusion", {"sampler": "schedule", "steps": 0}, "from 1 to 8 steps"),
    "more steps than slots": (
        "diffusion",
        {"sampler": "schedule", "steps": 9},
        "from 1 to 8 steps",
    ),
    "threshold for a schedule": (
        "diffusion",
        {"sampler": "schedule", "threshold": 0.5},
        "no threshold with the sampler schedule",
    ),
    "threshold for leftmost": (
        "diffusion",
        {"sampler": "leftmost", "threshold": 0.5},
        "no threshold with the sampler leftmost",
    ),
    "threshold of a margin": (
        "diffusion",
        {"sampler": "margin", "threshold": 1.5},
        "a threshold from 0 to 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(built: Callable[[str], Built], case: str) -> None:
    mode, options, message = BAD[case]
    with pytest.raises(UsageError) as caught:
        built("plain").model.stream([PROMPT], mode, block_length=8, **options)
    assert message in str(caught.value)
    assert caught.value.hint

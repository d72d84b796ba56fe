"""Token for token and forward for forward against the independent model and decoders."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
from checkpoints import SHAPES
from conftest import Built

PROMPT_LENGTHS = (1, 7, 150)  # 150 is more than twice the original rope length of 64
LEAST_MARGIN = 2e-5  # decisions closer than this could fall either way in float32


def prompt_of(length: int, vocab_size: int) -> list[int]:
    return np.random.default_rng(length).integers(12, vocab_size, length).tolist()


@pytest.mark.parametrize("length", [*PROMPT_LENGTHS, 600])
@pytest.mark.parametrize("shape", SHAPES)
def test_ar_equals_ministral3(built: Callable[[str], Built], shape: str, length: int) -> None:
    it = built(shape)
    prompt = prompt_of(length, it.model.model.vocab_size)
    expected, nfe = reference.ar(it.reference, prompt, 40)
    assert it.reference.least_margin > LEAST_MARGIN
    out, got_nfe = it.model.ar_generate([prompt], max_new_tokens=40)
    assert out.tolist() == [prompt + expected]
    assert (out.dtype, got_nfe) == (np.int64, nfe)


@pytest.mark.parametrize("threshold", [0.3, 0.9])
@pytest.mark.parametrize("block_length", [1, 2, 8, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_diffusion_equals_reference(
    built: Callable[[str], Built], shape: str, block_length: int, threshold: float
) -> None:
    it = built(shape)
    for length in PROMPT_LENGTHS:
        prompt = prompt_of(length, it.model.model.vocab_size)
        expected, nfe = reference.diffusion(it.reference, prompt, 37, block_length, threshold)
        out, got_nfe = it.model.generate(
            [prompt], max_new_tokens=37, block_length=block_length, threshold=threshold
        )
        assert out.tolist() == [prompt + expected]
        assert got_nfe == nfe


@pytest.mark.parametrize("use_drafter", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("block_length", [1, 2, 8, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_spec_equals_reference_and_ar(
    built: Callable[[str], Built],
    shape: str,
    block_length: int,
    threshold: float,
    use_drafter: bool,
) -> None:
    it = built(shape)
    for length in PROMPT_LENGTHS[1:]:
        prompt = prompt_of(length, it.model.model.vocab_size)
        expected, nfe = reference.linear_spec(
            it.reference, prompt, 20, block_length, threshold, use_drafter
        )
        options = {
            "max_new_tokens": 20,
            "block_length": block_length,
            "threshold": threshold,
            "use_drafter": use_drafter,
        }
        out, got_nfe = it.model.linear_spec_generate([prompt], **options)
        assert out.tolist() == [prompt + expected]
        assert got_nfe == nfe
        assert out.tolist() == it.model.ar_generate([prompt], max_new_tokens=20)[0].tolist()


def test_drafter_changes_drafts(built: Callable[[str], Built]) -> None:
    """The branch is really there: the same block drafts differently with it, and as the reference
    says.
    """
    it = built("three_kv_heads")
    prompt = prompt_of(50, it.model.model.vocab_size)
    sequence = it.model.new_sequence([prompt])
    sequence.append([sequence.run(sequence.predict())])
    block = np.full(8, it.model.model.mask_token_id)
    block[0] = sequence.tokens[-1]
    on = [a.copy() for a in sequence.run(sequence.draft(block, use_drafter=True))]
    off = [a.copy() for a in sequence.run(sequence.draft(block, use_drafter=False))]
    for got, drafter in ((on, True), (off, False)):
        expected = (
            it.reference.logits(prompt + block.tolist(), block=8, drafter=drafter)[-8:]
            .softmax(-1)
            .topk(5)
        )
        np.testing.assert_array_equal(got[0], expected.indices.numpy())
        np.testing.assert_allclose(got[1], expected.values.numpy(), rtol=1e-4, atol=1e-6)
    assert np.abs(on[1] - off[1]).max() > 1e-3

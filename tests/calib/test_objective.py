from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.calib.training.objective import Corruption, corrupt, joint_loss, joint_mask
from trimode.graphs.decoder.attention import GrowingCacheAttention, MaskedAttention
from trimode.graphs.decoder.trunk import TriModeTrunk


@settings(max_examples=60, deadline=None)
@given(
    num_noisy=st.integers(1, 17),
    num_clean=st.integers(1, 19),
    first=st.integers(0, 23),
    lead=st.integers(-5, 5),
    block_size=st.integers(1, 9),
)
def test_joint_mask_follows_the_rule_of_every_pair(
    num_noisy: int, num_clean: int, first: int, lead: int, block_size: int
) -> None:
    noisy = [first + lead + i for i in range(num_noisy)]
    clean = list(range(num_clean))
    mask = joint_mask(
        torch.tensor([noisy]), torch.tensor([clean]), torch.tensor([[first]]), block_size
    )

    def block(position: int) -> int:
        return (position - first) // block_size

    def sees(query: int, key: int) -> bool:
        if query < num_noisy and key < num_noisy:
            return block(noisy[query]) == block(noisy[key])
        if query < num_noisy:
            return block(noisy[query]) > block(clean[key - num_noisy])
        return key >= num_noisy and clean[query - num_noisy] >= clean[key - num_noisy]

    size = num_noisy + num_clean
    assert mask.shape == (1, 1, size, size)
    assert mask[0, 0].tolist() == [[sees(q, k) for k in range(size)] for q in range(size)]


def test_joint_mask_takes_a_boundary_per_sequence() -> None:
    noisy, clean = torch.tensor([[3, 4, 5, 6], [5, 6, 7, 8]]), torch.arange(9).expand(2, -1)
    together = joint_mask(noisy, clean, torch.tensor([[3], [5]]), 2)
    apart = [
        joint_mask(noisy[i : i + 1], clean[i : i + 1], boundary, 2)
        for i, boundary in enumerate((3, 5))
    ]
    assert torch.equal(together, torch.cat(apart))


def test_both_halves_compute_what_inference_computes(small_trunk: TriModeTrunk) -> None:
    ids, first, block_size = torch.randint(20, 100, (1, 21)), 5, 8
    positions = torch.arange(21)[None]
    noisy_positions = first + torch.arange(2 * block_size)[None]
    noisy_ids = ids[:, first:].masked_fill(torch.rand(1, 16) < 0.5, 100)
    mask = joint_mask(noisy_positions, positions, first, block_size)
    joint = small_trunk(
        torch.cat((noisy_ids, ids), 1),
        torch.cat((noisy_positions, positions), 1),
        MaskedAttention(mask),
    )

    cache = GrowingCacheAttention()
    causal = small_trunk(ids, positions, cache)
    torch.testing.assert_close(joint[:, 16:], causal, atol=1e-5, rtol=1e-4)
    cache.is_causal = cache.writes_cache = False
    for begin in (block_size, 0):
        cache.crop(first + begin)
        block = slice(begin, begin + block_size)
        torch.testing.assert_close(
            joint[:, block],
            small_trunk(noisy_ids[:, block], noisy_positions[:, block], cache),
            atol=1e-5,
            rtol=1e-4,
        )


def test_joint_loss_against_float64_sums() -> None:
    torch.manual_seed(1)
    noisy_logits, clean_logits = torch.randn(3, 7, 11), torch.randn(3, 9, 11)
    noisy_targets, clean_ids = torch.randint(11, (3, 7)), torch.randint(11, (3, 9))
    rate, weights = torch.rand(3, 1).clamp(0.2).expand(3, 7), torch.rand(3, 9)
    corruption = Corruption(torch.rand(3, 7) < 0.5, rate)
    loss = joint_loss(
        noisy_logits,
        noisy_targets,
        corruption,
        clean_logits,
        clean_ids,
        weights,
        diffusion_weight=0.3,
    )

    noisy = noisy_logits.double().log_softmax(-1)
    clean = clean_logits.double().log_softmax(-1)
    diffusion = autoregressive = total_weight = 0.0
    count = 0
    for row in range(3):
        for slot in range(7):
            if corruption.masked[row, slot]:
                diffusion -= float(
                    noisy[row, slot, noisy_targets[row, slot]] / rate[row, slot].double()
                )
                count += 1
        for token in range(1, 9):
            autoregressive -= float(
                weights[row, token].double() * clean[row, token - 1, clean_ids[row, token]]
            )
            total_weight += float(weights[row, token])
    assert loss.total.item() == pytest.approx(
        (0.3 * diffusion + autoregressive) / (count + total_weight), rel=1e-5
    )
    assert loss.autoregressive.item() == pytest.approx(autoregressive / total_weight, rel=1e-5)
    assert loss.diffusion.item() == pytest.approx(diffusion / count, rel=1e-5)


def test_joint_loss_without_masked_slots_is_finite() -> None:
    corruption = Corruption(torch.zeros(1, 2, dtype=torch.bool), torch.full((1, 2), 0.5))
    loss = joint_loss(
        torch.zeros(1, 2, 4),
        torch.zeros(1, 2).long(),
        corruption,
        torch.zeros(1, 3, 4),
        torch.zeros(1, 3).long(),
        torch.ones(1, 3),
    )
    assert loss.diffusion == 0
    assert loss.total == loss.autoregressive


def test_corruption_masks_at_its_rate_and_only_where_it_may() -> None:
    trainable = torch.ones(64, 4000, dtype=torch.bool)
    trainable[:, ::4] = False
    masked, rate = corrupt(trainable, torch.Generator().manual_seed(0), least_rate=0.1)
    assert not masked[~trainable].any()
    assert bool((rate >= 0.1).all() and (rate < 1).all())
    assert torch.equal(rate, rate[:, :1].expand_as(rate))
    torch.testing.assert_close(masked.sum(1) / trainable.sum(1), rate[:, 0], atol=0.04, rtol=0)
    assert rate[:, 0].mean().item() == pytest.approx(0.55, abs=0.1)


def test_corruption_at_rate_one_masks_everything_trainable() -> None:
    trainable = torch.rand(5, 30) < 0.5
    masked, rate = corrupt(trainable, torch.Generator().manual_seed(0), least_rate=1.0)
    assert torch.equal(masked, trainable)
    assert bool((rate == 1).all())

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, repeat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimode.calib.demo.data import Chats
from trimode.calib.drafter.training import DrafterSettings, reset_adapter, train_drafter
from trimode.calib.drafter.windows import (
    DraftForward,
    counted_slots,
    draft_forward,
    draft_mask,
    drafter_loss,
    window_lengths,
    window_starts,
)
from trimode.calib.training.budget import Budget, rate_at
from trimode.calib.training.objective import joint_mask
from trimode.errors import UsageError
from trimode.graphs.decoder.attention import GrowingCacheAttention
from trimode.graphs.decoder.trunk import TriModeTrunk

EXACT = DrafterSettings(autocast=False, noisy_slots=32)


def chats(*rows: list[int], start: int, end: int) -> Chats:
    return Chats(
        torch.tensor(rows), torch.full((len(rows), 1), start), torch.full((len(rows), 1), end)
    )


def random_chats(seed: int = 0) -> Chats:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 100, (4, 30), generator=generator)
    return Chats(ids, torch.full((4, 1), 6), torch.tensor([[29], [25], [15], [8]]))


def adapters(trunk: TriModeTrunk) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trunk.named_parameters() if "lora_" in name}


def base(trunk: TriModeTrunk) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trunk.named_parameters() if "lora_" not in name}


@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(0, 12),
    length=st.integers(2, 7),
    num_blocks=st.integers(1, 3),
    num_clean=st.integers(1, 20),
)
def test_draft_mask_is_the_joint_mask_where_both_apply(
    start: int, length: int, num_blocks: int, num_clean: int
) -> None:
    starts = start + length * torch.arange(num_blocks)[None]
    noisy = start + torch.arange(num_blocks * length)[None]
    expected = joint_mask(noisy, torch.arange(num_clean)[None], start, length)
    assert torch.equal(draft_mask(starts, length, num_clean), expected)


def test_overlapping_windows_do_not_see_each_other() -> None:
    mask = draft_mask(torch.tensor([[2, 3]]), 3, 5)[0, 0]
    assert mask[0].tolist() == [True] * 3 + [False] * 3 + [True, True, False, False, False]
    assert mask[5].tolist() == [False] * 3 + [True] * 3 + [True, True, True, False, False]
    assert mask[6].tolist() == [False] * 6 + [True] + [False] * 4


def test_a_window_computes_what_a_draft_and_a_verify_forward_compute(
    small_trunk: TriModeTrunk,
) -> None:
    texts = random_chats()
    starts = torch.tensor([[6, 13, 14]] * 4)
    forward = draft_forward(small_trunk, texts, starts, 8)
    assert forward.draft_logits.shape == (4, 3, 7, 120)

    cache = GrowingCacheAttention()
    causal = small_trunk.head(small_trunk(texts.ids, texts.positions, cache))
    cache.is_causal = cache.writes_cache = False
    for window, start in ((2, 14), (1, 13), (0, 6)):
        cache.crop(start)
        block = texts.ids[:, start : start + 8].clone()
        block[:, 1:] = small_trunk.config.mask_token_id
        drafted = small_trunk.head(
            small_trunk(block, texts.positions[:, start : start + 8], cache, 1.0)
        )
        torch.testing.assert_close(
            forward.draft_logits[:, window], drafted[:, 1:], atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            forward.verifier_logits[:, window], causal[:, start : start + 7], atol=1e-5, rtol=1e-4
        )
        assert torch.equal(forward.written[:, window], texts.ids[:, start + 1 : start + 8])
    assert forward.inside[2].tolist() == [
        [True] * 7,
        [True, True, *[False] * 5],
        [True, *[False] * 6],
    ]


def test_what_counts_is_the_accepted_prefix_and_the_first_rejection() -> None:
    verified = torch.tensor([[[1, 2, 3, 4, 5]]])
    inside = torch.ones_like(verified, dtype=torch.bool)

    def count(drafted: list[int], written: list[int] | None = None, slots: int = 5) -> list[int]:
        text = verified if written is None else torch.tensor([[written]])
        return (
            counted_slots(
                torch.tensor([[drafted]]), verified, text, inside & (torch.arange(5) < slots)
            )[0, 0]
            .int()
            .tolist()
        )

    assert count([1, 2, 9, 4, 5]) == [1, 1, 1, 0, 0]
    assert count([9, 2, 3, 4, 5]) == [1, 0, 0, 0, 0]
    assert count([1, 2, 3, 4, 5]) == [1, 1, 1, 1, 1]
    assert count([1, 2, 3, 4, 9]) == [1, 1, 1, 1, 1]
    assert count([1, 2, 9, 9, 5], slots=2) == [1, 1, 0, 0, 0]
    assert count([1, 2, 3, 4, 5], written=[1, 9, 3, 4, 5]) == [1, 1, 0, 0, 0]


def test_drafter_loss_against_float64_sums() -> None:
    torch.manual_seed(3)
    verifier_logits = torch.randn(2, 3, 4, 6)
    draft_logits = torch.where(
        torch.rand(2, 3, 4, 1) < 0.7, verifier_logits, torch.randn(2, 3, 4, 6)
    ) + 0.1 * torch.randn(2, 3, 4, 6)
    inside = torch.tensor([True, True, True, False]).expand(2, 3, 4)
    forward = DraftForward(draft_logits, verifier_logits, verifier_logits.argmax(-1), inside)
    loss = drafter_loss(forward, token_weight=10.0, distribution_weight=2.0)

    token = distribution = 0.0
    count = accepted = 0
    for b in range(2):
        for k in range(3):
            for slot in range(3):
                p, q = (
                    verifier_logits[b, k, slot].double().softmax(-1),
                    draft_logits[b, k, slot].double().softmax(-1),
                )
                token -= float(q[p.argmax()].log())
                distribution += float((p * (p / q).log()).sum())
                count += 1
                if p.argmax() != q.argmax():
                    break
                accepted += 1
    assert 6 < count < 18
    assert loss.token.item() == pytest.approx(token / count, rel=1e-4)
    assert loss.distribution.item() == pytest.approx(distribution / count, rel=1e-4)
    assert loss.total.item() == pytest.approx((10 * token + 2 * distribution) / count, rel=1e-4)
    assert loss.accepted.item() == pytest.approx(accepted / 6)


def test_only_the_adapter_learns_and_its_loss_falls(small_trunk: TriModeTrunk) -> None:
    small_trunk.diffusion_head.requires_grad_(False)
    before, texts = base(small_trunk), random_chats()
    written = Chats(greedy_rows(small_trunk, texts.ids), texts.answer_start, texts.end)
    losses = []
    progress = train_drafter(
        small_trunk,
        repeat(written),
        Budget(steps=60),
        EXACT,
        lambda p, _share: losses.append(p.loss),
    )
    assert progress.step == len(losses) == 60
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(before[name], weight) for name, weight in base(small_trunk).items())
    assert all(weight.any() for weight in adapters(small_trunk).values())
    assert small_trunk.encoder.embed_tokens.weight.requires_grad
    assert not small_trunk.diffusion_head.weight.requires_grad
    assert all(p.grad is None for p in small_trunk.parameters())


def greedy_rows(trunk: TriModeTrunk, ids: Tensor) -> Tensor:
    """Texts whose tokens after the sixth are the trunk's own."""
    with torch.no_grad():
        for position in range(6, ids.shape[1]):
            known = ids[:, :position]
            positions = torch.arange(position).expand(known.shape)
            ids[:, position] = trunk.head(
                trunk(known, positions, GrowingCacheAttention())[:, -1]
            ).argmax(-1)
    return ids


def test_training_is_deterministic_and_starts_from_a_fresh_adapter(
    small_trunk: TriModeTrunk,
) -> None:
    def run() -> dict[str, Tensor]:
        train_drafter(small_trunk, (random_chats(i) for i in range(9)), Budget(steps=3), EXACT)
        return adapters(small_trunk)

    first = run()
    assert all(torch.equal(first[name], weight) for name, weight in run().items())


def test_a_fresh_adapter_changes_nothing(small_trunk: TriModeTrunk) -> None:
    weights = reset_adapter(small_trunk, 0)
    assert len(weights) == 4
    texts = random_chats()
    plain = small_trunk(texts.ids, texts.positions, GrowingCacheAttention())
    assert torch.equal(small_trunk(texts.ids, texts.positions, GrowingCacheAttention(), 1.0), plain)


def test_a_trunk_without_adapter_is_refused(small_trunk: TriModeTrunk) -> None:
    bare = TriModeTrunk(small_trunk.config, 64)
    with pytest.raises(UsageError, match="adapter"):
        train_drafter(bare, iter(()), Budget(steps=1))


def test_windows_begin_inside_the_answers() -> None:
    texts = chats(list(range(40)), list(range(40)), start=7, end=20)
    starts = torch.cat(
        [window_starts(texts, 50, torch.Generator().manual_seed(i)) for i in range(20)], 1
    )
    assert starts[:, 0].tolist() == [7, 7]
    assert set(starts.flatten().tolist()) == set(range(7, 20))


def test_window_lengths_are_mostly_the_block() -> None:
    assert window_lengths(32).count(32) > len(window_lengths(32)) / 2
    assert min(window_lengths(2)) == 2


def test_a_budget_ends_at_whichever_limit_comes_first() -> None:
    assert Budget(steps=4).progress(1e9, 1) == 0.25
    assert Budget(seconds=10, steps=100).progress(5, 10) == 0.5
    assert Budget(seconds=10).progress(30, 0) == 1
    assert Budget().progress(0, 0) == 1


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    def rates(shares: Iterator[int]) -> list[float]:
        return [rate_at(share / 100, warm_up=0.1, decay=0.4) for share in shares]

    up, level, down = (
        rates(iter(range(10))),
        rates(iter(range(10, 60))),
        rates(iter(range(60, 101))),
    )
    assert up == sorted(up)
    assert up[0] > 0
    assert list(islice(level, 50)) == [1.0] * 50
    assert down == sorted(down, reverse=True)
    assert down[-1] == 0

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from trimode.calib.demo.data import encode
from trimode.calib.demo.refine import (
    DIFFUSION_WEIGHT,
    NUM_BLOCKS,
    THRESHOLDS,
    RefinementTraining,
    revealed,
)
from trimode.calib.demo.tokenizer import IM_END, MASK, SPECIAL_IDS
from trimode.calib.demo.training import Settings
from trimode.calib.training.budget import Budget
from trimode.graphs.decoder.attention import GrowingCacheAttention
from trimode.graphs.decoder.trunk import TriModeTrunk

SIZE = 8


@pytest.fixture
def training(small_trunk: TriModeTrunk, tokenizer: Tokenizer, tmp_path: Path) -> RefinementTraining:
    training = RefinementTraining(
        small_trunk, tokenizer, Settings(batch_size=6, learning_rate=1e-3), tmp_path / "state.pt"
    )
    training._begin(3)
    return training


def test_what_is_revealed_is_what_a_decoder_would_fill() -> None:
    confidence = torch.tensor(
        [
            [[0.99, 0.5, 0.95, 0.91], [0.6, 0.5, 0.7, 0.99]],
            [[0.3, 0.2, 0.1, 0.4], [0.9, 0.9, 0.9, 0.9]],
        ]
    )
    logits = torch.stack((confidence, 1 - confidence), -1).log()
    # a third token, so that 0.5 and less can be the best
    logits = torch.cat((logits, torch.full((2, 2, 4, 1), -30.0)), -1)
    masked = torch.tensor([[[0, 1, 1, 1], [1, 1, 1, 0]], [[0, 0, 0, 0], [1, 1, 0, 1]]]).bool()
    thresholds = torch.tensor([[[0.9], [0.9]], [[0.5], [0.99]]])
    slots = revealed(logits, masked, thresholds).int().tolist()
    assert slots[0] == [[0, 0, 1, 1], [0, 0, 1, 0]]
    assert slots[1][0] == [0, 0, 0, 0]
    assert sum(slots[1][1]) == 1
    assert slots[1][1][2] == 0


def test_a_batch_is_blocks_of_answers_and_its_loss_that_of_separate_forwards(
    training: RefinementTraining,
) -> None:
    """Against a denoise forward a block over a cache, a causal one a text, and float64 sums."""
    rows, trunk, texts = training._rows, training.trunk, next(training._texts)
    training._texts = iter([texts])
    chats = encode([row.example for row in rows], training.tokenizer)
    visits = [[(v.start, v.masked.clone(), v.rate) for v in row.visits] for row in rows]
    with torch.no_grad():
        loss = training._loss(0.5)

    diffusion = autoregressive = 0.0
    num_masked, weights = 0, texts.target_weights()[:, 1:]
    for i in range(len(texts.ids)):
        ids = texts.ids[i : i + 1]
        with torch.no_grad():
            causal = (
                trunk.head(trunk(ids, texts.positions[i : i + 1], GrowingCacheAttention()))[0]
                .double()
                .log_softmax(-1)
            )
        autoregressive -= float((causal[:-1].gather(1, ids[0, 1:, None])[:, 0] * weights[i]).sum())
    for i in range(len(rows)):
        ids, end, answer = chats.ids[i : i + 1], int(chats.end[i]), int(chats.answer_start[i])
        assert len(visits[i]) == NUM_BLOCKS
        cache = GrowingCacheAttention()
        with torch.no_grad():
            trunk(ids, chats.positions[i : i + 1], cache)
        for start, masked, rate in sorted(visits[i], key=lambda v: -v[0]):
            first = answer + start
            assert answer <= first < end
            assert not masked[0]
            true = [
                int(ids[0, p]) if p <= end else SPECIAL_IDS[IM_END]
                for p in range(first, first + SIZE)
            ]
            block = torch.tensor([true]).masked_fill(masked, SPECIAL_IDS[MASK])
            cache.crop(first)
            cache.is_causal = cache.writes_cache = False
            with torch.no_grad():
                denoised = (
                    trunk.head(trunk(block, torch.arange(first, first + SIZE)[None], cache))[0]
                    .double()
                    .log_softmax(-1)
                )
            diffusion -= sum(float(denoised[j, true[j]]) / rate for j in range(SIZE) if masked[j])
            num_masked += int(masked.sum())
    assert loss.diffusion.item() == pytest.approx(diffusion / num_masked, rel=1e-4)
    assert loss.autoregressive.item() == pytest.approx(
        autoregressive / float(weights.sum()), rel=1e-4
    )
    expected = (DIFFUSION_WEIGHT * diffusion + autoregressive) / (num_masked + float(weights.sum()))
    assert loss.total.item() == pytest.approx(expected, rel=1e-4)


def test_blocks_go_on_until_they_are_decided_and_then_make_room(
    training: RefinementTraining,
) -> None:
    went_on = arrived = new_chats = 0
    for _ in range(25):
        before = [
            (row, list(row.visits), [v.masked.clone() for v in row.visits])
            for row in training._rows
        ]
        with torch.no_grad():
            training._loss(0.5)
        for (row, visits, masks), now in zip(before, training._rows, strict=True):
            new_chats += now is not row
            for old, was, visit in zip(visits, masks, row.visits, strict=True):
                left = old.masked
                assert not (left & ~was).any()
                assert left.sum() < was.sum() or not was.any()
                decided = not left[: row.length - old.start].any()
                assert decided == (visit is not old)
                arrived += decided
                went_on += not decided
                assert old.rate == 1
                assert THRESHOLDS[0] <= visit.threshold <= THRESHOLDS[1]
            assert (now is not row) == (not row.waiting)
    assert min(went_on, arrived, new_chats) > 5


def test_training_lowers_the_loss_and_leaves_the_drafter_alone(
    training: RefinementTraining,
) -> None:
    drafter = {n: p.detach().clone() for n, p in training.trunk.named_parameters() if "lora_" in n}
    losses: list[float] = []
    done = training.run(
        Budget(steps=40), lambda p, _share: losses.append(p.losses["autoregressive"])
    )
    assert done.step == 40
    assert done.processor_seconds > 0
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(p, drafter[n]) for n, p in training.trunk.named_parameters() if n in drafter
    )

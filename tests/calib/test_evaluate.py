from __future__ import annotations

import pytest
import torch

from trimode.calib.demo.evaluate import (
    THRESHOLD,
    Diffusion,
    Speculation,
    acceptance_length,
    block_diffusion,
    evaluate,
    greedy_answers,
    held_out,
    linear_speculation,
)
from trimode.calib.demo.tasks import FAMILIES
from trimode.calib.demo.tokenizer import build_tokenizer
from trimode.graphs.decoder.attention import MaskedAttention
from trimode.graphs.decoder.trunk import TriModeTrunk

TOKENIZER = build_tokenizer()


def greedy_without_cache(trunk: TriModeTrunk, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and 11 not in tokens[len(prompt) :]:
        n = len(tokens)
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        hidden = trunk(torch.tensor([tokens]), torch.arange(n)[None], MaskedAttention(causal))
        tokens.append(int(trunk.head(hidden)[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.inference_mode()
def test_greedy_answers_come_back_in_order_and_are_those_without_a_cache(
    small_trunk: TriModeTrunk,
) -> None:
    prompts = [[1, 30, 40], [1, 50], [20, 21, 22], [60, 61]]
    assert greedy_answers(small_trunk, prompts, 12) == [
        greedy_without_cache(small_trunk, p, 12) for p in prompts
    ]


@pytest.mark.parametrize("block_length", [1, 2, 8, 32])
@pytest.mark.parametrize("drafter", [False, True])
@torch.inference_mode()
def test_speculation_writes_the_greedy_text(
    small_trunk: TriModeTrunk, block_length: int, drafter: bool
) -> None:
    prompt = [1, 30, 40, 50, 21]
    written = linear_speculation(
        small_trunk, prompt, block_length, drafter=drafter, max_new_tokens=20
    )
    assert written.tokens == greedy_without_cache(small_trunk, prompt, 20)
    if block_length == 1:
        assert written.num_cycles == len(written.tokens) - 1


def diffusion_without_cache(
    trunk: TriModeTrunk, prompt: list[int], size: int, count: int
) -> tuple[list[int], int]:
    """Every forward over the whole text: causal before the block, all of the block seen by the
    block.
    """
    tokens, nfe = list(prompt), 0
    while len(tokens) < len(prompt) + count and 11 not in tokens[len(prompt) :]:
        past = len(tokens)
        block = [greedy_without_cache(trunk, tokens, 1)[0]] + [100] * (size - 1)
        while 100 in block and not (11 in block and 100 not in block[: block.index(11)]):
            sees = torch.ones(past + size, past + size, dtype=torch.bool).tril()
            sees[past:] = True
            hidden = trunk(
                torch.tensor([tokens + block]),
                torch.arange(past + size)[None],
                MaskedAttention(sees),
            )
            probabilities = trunk.head(hidden)[0, past:].softmax(-1).tolist()
            best = {i: max(probabilities[i]) for i in range(size) if block[i] == 100}
            for i, p in best.items():
                if p >= THRESHOLD or p == max(best.values()):
                    block[i] = probabilities[i].index(p)
            nfe += 1
        nfe += 1
        tokens += block[: block.index(11) + 1] if 11 in block else block
    return tokens[len(prompt) :][:count], nfe


@pytest.mark.parametrize("block_length", [4, 7])
@torch.inference_mode()
def test_diffusion_writes_what_it_writes_without_a_cache(
    small_trunk: TriModeTrunk, block_length: int
) -> None:
    prompt = [1, 30, 40, 50, 21]
    assert block_diffusion(small_trunk, prompt, block_length, 16) == diffusion_without_cache(
        small_trunk, prompt, block_length, 16
    )


def test_acceptance_length_is_tokens_per_cycle() -> None:
    assert acceptance_length([Speculation([5] * 9, 2), Speculation([5] * 3, 2)]) == 2.5
    assert acceptance_length([Speculation([11], 0)]) == 0


def test_evaluation_covers_every_family_and_takes_any_right_answer(
    small_trunk: TriModeTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {
        tuple(q.prompt): q.expected[-1]
        for family in FAMILIES
        for q in held_out(family, 2, 4, TOKENIZER)
    }
    monkeypatch.setattr(
        "trimode.calib.demo.evaluate.greedy_answers",
        lambda _trunk, prompts: [right[tuple(p)] for p in prompts],
    )
    monkeypatch.setattr(
        "trimode.calib.demo.evaluate.linear_speculation",
        lambda _trunk, prompt, _length, *, drafter: Speculation(
            right[tuple(prompt)], 2 if drafter else 4
        ),
    )
    monkeypatch.setattr(
        "trimode.calib.demo.evaluate.block_diffusion",
        lambda _trunk, prompt, _length: Diffusion(right[tuple(prompt)][:-1], 5),
    )
    result = evaluate(small_trunk, TOKENIZER, num_questions=2, seed=4)
    assert result.exact_match == dict.fromkeys(FAMILIES, 1.0)
    assert result.diffusion_exact_match == dict.fromkeys(FAMILIES, 0.0)  # each lacks its end token
    assert result.diffusion_tokens_per_forward == pytest.approx(
        (sum(map(len, right.values())) - len(right)) / (5 * len(right))
    )
    assert result.num_unlike == 0
    assert result.acceptance_length == pytest.approx(2 * result.acceptance_length_base)
    assert set(result.acceptance_length_per_family) == set(FAMILIES)

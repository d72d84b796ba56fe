from __future__ import annotations

from itertools import islice

import torch
from tokenizers import Tokenizer

from trimode.calib.demo.data import (
    LENGTH_STEP,
    NUM_BLOCKS,
    PROMPT_WEIGHT,
    TAIL_WEIGHT,
    Chats,
    encode,
    noisy_window,
)
from trimode.calib.demo.tasks import Example, examples
from trimode.calib.demo.tokenizer import IM_END, SPECIAL_IDS, render_prompt

END = SPECIAL_IDS[IM_END]


def some_chats(tokenizer: Tokenizer, count: int = 36) -> Chats:
    return encode(list(islice(examples(1, "train"), count)), tokenizer)


def test_a_chat_is_frame_question_answer_end(tokenizer: Tokenizer) -> None:
    chats = encode(
        [Example("json", "Q?", "ab", ("ab",)), Example("json", "Longer?", "abcd", ("abcd",))],
        tokenizer,
    )
    assert chats.ids.shape[1] % LENGTH_STEP == 0
    for row, (prompt, answer) in enumerate((("Q?", "ab"), ("Longer?", "abcd"))):
        start, end = int(chats.answer_start[row]), int(chats.end[row])
        assert tokenizer.decode(
            chats.ids[row, :start].tolist(), skip_special_tokens=False
        ) == render_prompt(prompt)
        assert (
            tokenizer.decode(chats.ids[row, start:end].tolist(), skip_special_tokens=False)
            == answer
        )
        assert chats.ids[row, end:].eq(END).all()


def test_target_weights_favour_the_answer(tokenizer: Tokenizer) -> None:
    chats = encode([Example("json", "Q?", "ab", ("ab",))], tokenizer)
    start, end = int(chats.answer_start), int(chats.end)
    weights = chats.target_weights()[0].tolist()
    assert weights[start : end + 1] == [1.0] * 3
    assert set(weights[:start]) == {torch.tensor(PROMPT_WEIGHT).item()}
    assert set(weights[end + 1 :]) == {torch.tensor(TAIL_WEIGHT).item()}


def test_windows_hold_the_text_and_never_mask_a_first_slot(tokenizer: Tokenizer) -> None:
    chats, size = some_chats(tokenizer), 8
    for seed in range(10):
        window = noisy_window(chats, size, torch.Generator().manual_seed(seed))
        first = window.first_boundary
        assert bool((first >= chats.answer_start).all() and (first < chats.end).all())
        assert torch.equal(window.positions, first + torch.arange(NUM_BLOCKS * size))
        is_start = (window.positions - first) % size == 0
        assert not window.trainable[is_start].any()
        starts_late = window.positions - (window.positions - first) % size >= chats.end
        assert torch.equal(window.trainable, ~is_start & ~starts_late)
        for row, column in ((0, 0), (3, 5), (20, 15), (35, 9)):
            position = int(window.positions[row, column])
            expected = int(chats.ids[row, position]) if position <= int(chats.end[row]) else END
            assert int(window.targets[row, column]) == expected


def test_half_of_the_windows_are_wholly_masked(tokenizer: Tokenizer) -> None:
    chats = some_chats(tokenizer, 720)
    generator = torch.Generator().manual_seed(0)
    window = noisy_window(chats, 32, generator)
    masked, rate = window.corrupt(generator)
    drafting = (rate == 1).all(1)
    assert 0.4 < drafting.float().mean() < 0.6
    assert torch.equal(masked[drafting], window.trainable[drafting])
    assert not masked[~window.trainable].any()

"""Decodes held-out questions in eager torch, and counts right answers and forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from trimode.calib.demo.joint import device_of
from trimode.calib.demo.tasks import FAMILIES, Example, examples
from trimode.calib.demo.tokenizer import BOS, IM_END, SPECIAL_IDS, render_prompt
from trimode.calib.reference.torch_session import TorchSession
from trimode.formats.contract import ModelInfo
from trimode.graphs.decoder.attention import GrowingCacheAttention
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.runtime.decode.algorithms import Counters, decode_diffusion
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence as DecodedSequence

MAX_NEW_TOKENS = 128
THRESHOLD = 0.9


@dataclass(frozen=True)
class EncodedExample:
    """Holds an example as token ids.

    ``expected`` are all right answers, each with its end token.
    """

    family: str
    prompt: list[int]
    expected: list[list[int]]


class Diffusion(NamedTuple):
    """Holds the tokens of block diffusion, and the forwards it took.

    The prompt is left out. Denoise and commit forwards are counted.
    """

    tokens: list[int]
    nfe: int


class Speculation(NamedTuple):
    """Holds the tokens of self-speculation, and its draft-and-verify cycles.

    The prompt is left out.
    """

    tokens: list[int]
    num_cycles: int


@dataclass(frozen=True)
class Evaluation:
    """Holds the results on held-out questions.

    Attributes:
        num_questions: Questions per family.
        exact_match: Share of the questions answered exactly right, greedily and one token at a
        time, per family.
        diffusion_exact_match: Same share by block diffusion at :data:`THRESHOLD`.
        diffusion_tokens_per_forward: Ratio over all questions.
        acceptance_length: Tokens per cycle of linear self-speculation, with the drafter.
        acceptance_length_base: Same number without the drafter.
        acceptance_length_per_family: Both numbers by family, without and with the drafter.
        num_unlike: Number of answers that self-speculation wrote differently.
    """

    num_questions: int
    exact_match: dict[str, float]
    diffusion_exact_match: dict[str, float]
    diffusion_tokens_per_forward: float
    acceptance_length: float
    acceptance_length_base: float
    acceptance_length_per_family: dict[str, tuple[float, float]]
    num_unlike: int


def evaluate(
    trunk: TriModeTrunk,
    tokenizer: Tokenizer,
    *,
    num_questions: int = 20,
    seed: int = 0,
    block_length: int | None = None,
) -> Evaluation:
    """Decode ``num_questions`` held-out questions of each family in every mode.

    The modes are one token at a time, block diffusion, and linear self-speculation with the drafter
    and without.
    """
    questions = [q for family in FAMILIES for q in held_out(family, num_questions, seed, tokenizer)]
    length = block_length or trunk.config.block_size
    with torch.inference_mode():
        greedy = greedy_answers(trunk, [q.prompt for q in questions])
        diffused = [block_diffusion(trunk, q.prompt, length) for q in questions]
        base = [linear_speculation(trunk, q.prompt, length, drafter=False) for q in questions]
        drafted = [linear_speculation(trunk, q.prompt, length, drafter=True) for q in questions]
    names = [q.family for q in questions]
    return Evaluation(
        num_questions=num_questions,
        exact_match=_exact_match(questions, greedy),
        diffusion_exact_match=_exact_match(questions, [d.tokens for d in diffused]),
        diffusion_tokens_per_forward=sum(len(d.tokens) for d in diffused)
        / sum(d.nfe for d in diffused),
        acceptance_length=acceptance_length(drafted),
        acceptance_length_base=acceptance_length(base),
        acceptance_length_per_family={
            f: (_of_family(base, names, f), _of_family(drafted, names, f)) for f in FAMILIES
        },
        num_unlike=sum(
            not (answer == b.tokens == d.tokens)
            for answer, b, d in zip(greedy, base, drafted, strict=True)
        ),
    )


def _exact_match(
    questions: Sequence[EncodedExample], answers: Sequence[list[int]]
) -> dict[str, float]:
    """Return the share of right answers in each family."""
    right: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    for question, answer in zip(questions, answers, strict=True):
        right[question.family].append(answer in question.expected)
    return {family: sum(found) / len(found) for family, found in right.items()}


def held_out(family: str, count: int, seed: int, tokenizer: Tokenizer) -> list[EncodedExample]:
    """Draw held-out questions of a family, as token ids."""
    return [
        _question(example, tokenizer)
        for example in islice(examples(seed, "held-out", [family]), count)
    ]


def greedy_answers(
    trunk: TriModeTrunk, prompts: Sequence[list[int]], max_new_tokens: int = MAX_NEW_TOKENS
) -> list[list[int]]:
    """Write the greedy answer to each prompt, cut after its end token.

    Prompts of one length go together.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for _, group in groupby(order, key=lambda i: len(prompts[i])):
        indices = list(group)
        answers.update(
            zip(
                indices,
                _greedy_batch(trunk, [prompts[i] for i in indices], max_new_tokens),
                strict=True,
            )
        )
    return [answers[i] for i in range(len(prompts))]


def block_diffusion(
    trunk: TriModeTrunk, prompt: list[int], block_length: int, max_new_tokens: int = MAX_NEW_TOKENS
) -> Diffusion:
    """Denoise block after block at :data:`THRESHOLD`, by the runtime's own algorithm."""
    options, counters = (
        DecodeOptions(
            max_new_tokens=max_new_tokens, block_length=block_length, threshold=THRESHOLD
        ),
        Counters(),
    )
    sequence = DecodedSequence(TorchSession(trunk), _model_info(trunk, block_length), prompt)
    return Diffusion(
        [token for tokens in decode_diffusion(sequence, options, counters) for token in tokens],
        counters.nfe,
    )


def linear_speculation(
    trunk: TriModeTrunk,
    prompt: list[int],
    block_length: int,
    *,
    drafter: bool,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Speculation:
    """Draft blocks and verify them, greedily.

    One forward drafts a block, another verifies it. What the verifier agrees with is kept, and its
    next token.
    """
    cache, end = GrowingCacheAttention(), SPECIAL_IDS[IM_END]
    tokens = [_rows(trunk, cache, prompt)[-1]]
    num_cycles = 0
    while end not in tokens and len(tokens) < max_new_tokens:
        past = cache.length
        block = [tokens[-1]] + [trunk.config.mask_token_id] * (block_length - 1)
        cache.is_causal = cache.writes_cache = False
        block[1:] = _rows(trunk, cache, block, 1.0 if drafter else None)[1:]
        cache.is_causal = cache.writes_cache = True
        verified = _rows(trunk, cache, block)
        # accepted = 1 + the number of leading i with verified[i] == block[i + 1]
        accepted = 1 + next(
            (i for i in range(block_length - 1) if verified[i] != block[i + 1]), block_length - 1
        )
        tokens += verified[:accepted]
        cache.crop(past + accepted)
        num_cycles += 1
    return Speculation(
        tokens[: tokens.index(end) + 1] if end in tokens else tokens[:max_new_tokens], num_cycles
    )


def acceptance_length(speculations: Sequence[Speculation]) -> float:
    """Count tokens per cycle.

    The first token of an answer comes from the prompt's forward and is not counted.
    """
    num_cycles = sum(s.num_cycles for s in speculations)
    return sum(len(s.tokens) - 1 for s in speculations) / num_cycles if num_cycles else 0.0


def _of_family(speculations: Sequence[Speculation], names: Sequence[str], family: str) -> float:
    return acceptance_length(
        [s for s, name in zip(speculations, names, strict=True) if name == family]
    )


def _model_info(trunk: TriModeTrunk, block_length: int) -> ModelInfo:
    config = trunk.config
    return ModelInfo(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mask_token_id=config.mask_token_id,
        bos_token_id=SPECIAL_IDS[BOS],
        eos_token_ids=(SPECIAL_IDS[IM_END],),
        block_size=config.block_size,
        max_length=trunk.rope.cos.shape[0] - block_length,
        max_block_length=block_length,
        has_drafter=True,
    )


def _question(example: Example, tokenizer: Tokenizer) -> EncodedExample:
    expected = [tokenizer.encode(answer + IM_END).ids for answer in example.answers]
    return EncodedExample(
        example.family, tokenizer.encode(render_prompt(example.prompt)).ids, expected
    )


def _greedy_batch(
    trunk: TriModeTrunk, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[list[int]]:
    cache, ids = GrowingCacheAttention(), torch.tensor(prompts, device=device_of(trunk))
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        positions = (cache.length + torch.arange(ids.shape[1], device=ids.device)).expand(ids.shape)
        ids = trunk.head(trunk(ids, positions, cache)[:, -1:]).argmax(-1)
        for answer, token in zip(answers, ids[:, 0].tolist(), strict=True):
            if not answer or answer[-1] != SPECIAL_IDS[IM_END]:
                answer.append(token)
        if all(answer[-1] == SPECIAL_IDS[IM_END] for answer in answers):
            break
    return answers


def _rows(
    trunk: TriModeTrunk,
    cache: GrowingCacheAttention,
    tokens: list[int],
    drafter_scale: float | None = None,
) -> list[int]:
    """Return the greedy token of each row."""
    ids = torch.tensor([tokens], device=device_of(trunk))
    positions = (cache.length + torch.arange(len(tokens), device=ids.device))[None]
    greedy: list[int] = (
        trunk.head(trunk(ids, positions, cache, drafter_scale)).argmax(-1)[0].tolist()
    )
    return greedy

"""Quadratic self-speculation against the independent decoders, token for token and forward for
forward.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from checkpoints import SHAPES, config_of, write_checkpoint
from conftest import Built

from trimode.cli.parse import parse_mode
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.errors import UsageError
from trimode.runtime import TriModeModel


def prompt_of(length: int, vocab_size: int) -> list[int]:
    return np.random.default_rng(length).integers(12, vocab_size, length).tolist()


@pytest.mark.parametrize("block_length", [1, 2, 5, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_and_every_other_mode(
    quadratic: Callable[[str], Built], shape: str, block_length: int
) -> None:
    it = quadratic(shape)
    for length in (1, 7, 150):  # 150 is more than twice the original rope length of 64
        prompt = prompt_of(length, it.model.model.vocab_size)
        expected, nfe, cycles = reference.quadratic_spec(it.reference, prompt, 20, block_length)
        stream = it.model.stream(
            [prompt], "quadratic_spec", max_new_tokens=20, block_length=block_length
        )
        chunks = [chunk.token_ids for chunk in stream]
        result = stream.result
        assert result.token_ids == expected
        assert [len(chunk) for chunk in chunks[:-1]] == cycles[:-1]
        assert (result.nfe, result.acceptance_length) == (nfe, sum(cycles) / len(cycles))
        assert (result.forwards.prefill, result.forwards.draft, result.forwards.quadratic) == (
            1,
            1,
            len(cycles),
        )
        assert [prompt + expected] == it.model.ar_generate([prompt], max_new_tokens=20)[0].tolist()
        assert [prompt + expected] == it.model.linear_spec_generate(
            [prompt], max_new_tokens=20, block_length=block_length
        )[0].tolist()


def test_drafts_are_accepted_where_the_model_repeats_itself(
    quadratic: Callable[[str], Built],
) -> None:
    """Random weights rarely agree with their own drafts; somewhere they must, or the tests above
    would see acceptance 1 alone.
    """
    it = quadratic("plain")
    longest = 0
    for length in range(2, 22):
        prompt = prompt_of(length, it.model.model.vocab_size)
        expected, nfe, cycles = reference.quadratic_spec(it.reference, prompt, 12, 5)
        out, got_nfe = it.model.self_spec_generate([prompt], max_new_tokens=12, block_length=5)
        assert (out.tolist(), got_nfe) == ([prompt + expected], nfe)
        longest = max(longest, *cycles)
    assert longest >= 2


def test_ends_at_an_end_token_and_at_the_limit(quadratic: Callable[[str], Built]) -> None:
    it = quadratic("plain")
    for length in (3, 8, 14):
        prompt = prompt_of(length, it.model.model.vocab_size)
        tokens = it.model.ar_generate([prompt], max_new_tokens=12)[0][0, length:].tolist()
        for limit in range(1, 8):
            out, _ = it.model.quadratic_spec_generate(
                [prompt], max_new_tokens=limit, block_length=5
            )
            assert out[0, length:].tolist() == tokens[:limit]
        for end in set(tokens):
            stream = it.model.stream(
                [prompt], "quadratic_spec", max_new_tokens=12, block_length=5, eos_token_ids=(end,)
            )
            assert [t for chunk in stream for t in chunk.token_ids] == tokens[
                : tokens.index(end) + 1
            ]
            assert stream.result.finish_reason == "stop"


def test_goes_on_after_other_modes_and_they_after_it(quadratic: Callable[[str], Built]) -> None:
    it = quadratic("three_kv_heads")
    prompt = prompt_of(70, it.model.model.vocab_size)
    expected = it.model.ar_generate([prompt], max_new_tokens=40)[0][0].tolist()
    sequence = it.model.new_sequence([prompt])
    before = 0
    for mode in (
        "quadratic_spec",
        "ar",
        "quadratic_spec",
        "linear_spec",
        "quadratic_spec",
        "quadratic_spec",
        "ar",
    ):
        for _ in it.model.continue_sequence(sequence, mode, max_new_tokens=4, block_length=3):
            pass
        assert sequence.tokens == expected[: len(sequence.tokens)]
        assert sequence.cached_length in (len(sequence.tokens), len(sequence.tokens) - 1)
        before += 4
        assert len(sequence.tokens) == len(prompt) + before
    assert sequence.forwards.prefill == 1


def test_a_rule_that_follows_reads_the_right_logits(quadratic: Callable[[str], Built]) -> None:
    """The token after the drafts is known without a forward of its own: what other modes then ask
    about it comes from the same row.
    """
    it = quadratic("plain")
    prompt = prompt_of(9, it.model.model.vocab_size)
    expected = (
        it.model.stream([prompt], "ar", max_new_tokens=24, eos_token_ids=(), logprobs=3)
        .finish()
        .logprobs
    )
    assert expected is not None
    for first in range(1, 9):
        sequence = it.model.new_sequence([prompt])
        it.model.continue_sequence(
            sequence, "quadratic_spec", max_new_tokens=first, block_length=4, eos_token_ids=()
        ).finish()
        rest = (
            it.model.continue_sequence(
                sequence, "ar", max_new_tokens=6, eos_token_ids=(), logprobs=3
            )
            .finish()
            .logprobs
        )
        assert rest is not None
        for found, other in zip(rest, expected[first:], strict=False):
            assert found.token_id == other.token_id
            assert found.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_what_only_other_modes_do_is_refused(quadratic: Callable[[str], Built]) -> None:
    model = quadratic("plain").model
    refused: list[dict[str, Any]] = [
        {"temperature": 0.7},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"logit_bias": {12: 1.0}},
        {"min_new_tokens": 2},
        {"logprobs": 0},
        {"max_thinking_tokens": 3, "end_think_token_id": 12},
    ]
    for options in refused:
        with pytest.raises(
            UsageError, match=f"quadratic self-speculation, no {next(iter(options))}, found it"
        ):
            model.stream([[5]], "quadratic_spec", **options)
    with pytest.raises(
        UsageError, match="no temperature and no min_new_tokens, found them"
    ) as both:
        model.self_spec_generate([[5]], temperature=1.0, min_new_tokens=3)
    assert "linear_spec" in both.value.hint
    one, two = (
        model.self_spec_generate([[5]], 6, 3, **options)[0].tolist()
        for options in ({}, {"top_k": 4, "seed": 2})
    )
    assert one == two  # without a temperature these change no mode


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> TriModeModel:
    """Texts of 992 tokens at most: the shortest for which blocks of 32 are possible."""
    folder = tmp_path_factory.mktemp("short")
    write_checkpoint(folder / "checkpoint", config_of(num_hidden_layers=1))
    build_bundle(
        folder / "checkpoint", folder / "bundle", BuildOptions(max_length=992, quadratic=True)
    )
    return TriModeModel.from_pretrained(folder / "bundle", num_threads=1)


@pytest.mark.parametrize("block_length", [1, 16, 32])
def test_slots_beyond_the_longest_text_have_positions(
    short: TriModeModel, block_length: int
) -> None:
    for length in (985, 991):
        prompt = prompt_of(length, 109)
        expected = short.ar_generate([prompt], max_new_tokens=30, eos_token_id=())[0].tolist()
        assert len(expected[0]) == 992
        assert (
            short.self_spec_generate([prompt], 30, block_length, eos_token_id=())[0].tolist()
            == expected
        )


def test_refusals(
    quadratic: Callable[[str], Built], built: Callable[[str], Built], tmp_path: Path
) -> None:
    assert parse_mode("quadratic-spec") == "quadratic_spec"
    with pytest.raises(UsageError, match="found one without") as missing:
        built("plain").model.self_spec_generate([[5]])
    assert "--quadratic" in missing.value.hint
    with pytest.raises(UsageError, match="block length from 1 to 32, found 33"):
        quadratic("plain").model.self_spec_generate([[5]], block_length=33)
    with pytest.raises(UsageError, match="found one without"):
        build_bundle(built("plain").checkpoint, built("plain").bundle, BuildOptions(quadratic=True))
    with pytest.raises(UsageError, match="block length up to 32, found 48"):
        build_bundle(
            built("plain").checkpoint,
            tmp_path / "b",
            BuildOptions(("sm89",), quadratic=True, block_lengths=(48, 64)),
        )
    lengths = {
        n: built("plain").model.model.model_copy(update={"max_length": n}).max_quadratic_length
        for n in (48, 991, 992, 32768)
    }
    # 10 * 11 rows fit position tables of 48 + 64
    assert lengths == {48: 10, 991: 31, 992: 32, 32768: 32}

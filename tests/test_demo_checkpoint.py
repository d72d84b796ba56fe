"""The demo checkpoint: the public layout, and the same tokens from every greedy way of decoding
it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
from reference import Reference

from trimode.calib.demo.tasks import FAMILIES, Example, examples
from trimode.calib.sampler.scorer import TorchScorer
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.formats.sampler import load_sampler_record
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.identity import SourceDigest
from trimode.graphs.sampler.trace import load_sampler
from trimode.runtime import TriModeModel
from trimode.runtime.decode.algorithms import Counters, decode_diffusion
from trimode.runtime.decode.options import DecodeOptions

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
CHECKPOINT, SAMPLER = ARTIFACTS / "nld-tiny", ARTIFACTS / "nld-tiny-sampler"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TriModeModel:
    bundle = tmp_path_factory.mktemp("demo") / "bundle"
    build_bundle(CHECKPOINT, bundle, BuildOptions(quadratic=True))
    return TriModeModel.from_pretrained(bundle, num_threads=1)


def questions(count: int) -> Iterator[Example]:
    """``count`` held-out questions of each family."""
    return itertools.islice(examples(11, "held-out"), count * len(FAMILIES))


def ask(model: TriModeModel, question: Example) -> list[list[int]]:
    return [model.codec.encode_chat([{"role": "user", "content": question.prompt}])]


def test_layout_and_quirks() -> None:
    names = {p.relative_to(CHECKPOINT).as_posix() for p in CHECKPOINT.rglob("*") if p.is_file()}
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "linear_spec_lora/adapter_config.json",
        "linear_spec_lora/adapter_model.safetensors",
    } <= names
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert (config["mask_token_id"], config["eos_token_id"], config["tie_word_embeddings"]) == (
        100,
        11,
        False,
    )
    assert (
        config["rope_parameters"]["factor"],
        config["rope_parameters"]["llama_4_scaling_beta"],
    ) == (16.0, 0.1)
    assert sum(p.stat().st_size for p in CHECKPOINT.rglob("*") if p.is_file()) <= 20e6


def test_linear_spec_equals_ar_on_every_family(model: TriModeModel) -> None:
    lengths: dict[bool, list[float]] = {True: [], False: []}
    for question in questions(4):
        ids = ask(model, question)
        expected = model.ar_generate(ids, max_new_tokens=192)[0].tolist()
        for use_drafter, block_length in itertools.product((True, False), (5, 32)):
            options: dict[str, Any] = {
                "max_new_tokens": 192,
                "block_length": block_length,
                "use_drafter": use_drafter,
            }
            stream = model.stream(ids, "linear_spec", **options)
            assert ids[0] + [t for chunk in stream for t in chunk.token_ids] == expected[0]
            if block_length == 32:
                lengths[use_drafter].append(stream.result.acceptance_length or 0)
    with_drafter, without = (sum(values) / len(values) for values in lengths.values())
    # a floor, not the claim: the measured table is in docs/results/measurements-2026-11.md
    assert with_drafter > 1.1 * without > 12


def test_quadratic_spec_equals_linear_spec_and_ar(model: TriModeModel) -> None:
    lengths = []
    for question in questions(1):
        ids = ask(model, question)
        expected = model.ar_generate(ids, max_new_tokens=96)[0].tolist()
        assert (
            model.linear_spec_generate(ids, max_new_tokens=96, block_length=16)[0].tolist()
            == expected
        )
        for block_length in (5, 16):
            result = model.stream(
                ids, "quadratic_spec", max_new_tokens=96, block_length=block_length
            ).finish()
            assert ids[0] + result.token_ids == expected[0]
            lengths.append(result.acceptance_length or 0)
    assert sum(lengths) / len(lengths) > 3


def test_stop_strings_end_quadratic_spec(model: TriModeModel) -> None:
    for question in questions(1):
        ids = ask(model, question)
        answer = model.codec.decode(
            model.ar_generate(ids, max_new_tokens=96)[0][0, len(ids[0]) :].tolist()
        )
        stop = answer[len(answer) // 2 :][:2]
        results = [
            model.stream(ids, mode, max_new_tokens=96, stop=stop).finish()
            for mode in ("ar", "quadratic_spec")
        ]  # type: ignore[arg-type]
        assert results[0].token_ids == results[1].token_ids
        assert results[1].finish_reason == "stop"


def test_the_modes_equal_the_independent_model(model: TriModeModel) -> None:
    independent = Reference(CHECKPOINT)
    for question in questions(1):
        ids = ask(model, question)
        for threshold in (0.3, 0.9):
            expected, nfe = reference.diffusion(independent, ids[0], 128, 32, threshold)
            out, got = model.generate(ids, max_new_tokens=128, block_length=32, threshold=threshold)
            assert (out[0, len(ids[0]) :].tolist(), got) == (expected, nfe)
        expected, nfe = reference.linear_spec(independent, ids[0], 128, 32, 0.0, drafter=True)
        out, got = model.linear_spec_generate(ids, max_new_tokens=128)
        assert (out[0, len(ids[0]) :].tolist(), got) == (expected, nfe)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear_spec", "quadratic_spec"])
def test_batches_equal_single_runs(model: TriModeModel, mode: Any) -> None:
    prompts = [ask(model, question)[0] for question in questions(1)]
    alone = [model.stream([prompt], mode, max_new_tokens=96).finish() for prompt in prompts]
    for size in (2, 3, 5, 8):
        found = model.generate_batch(prompts, mode, max_rows=size, max_new_tokens=96)
        assert [replace(one, elapsed_s=0) for one in found] == [
            replace(one, elapsed_s=0) for one in alone
        ]


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear_spec"])
@pytest.mark.parametrize("count", [1, 3, 10, 17])
def test_a_turn_after_a_cut_block_equals_a_fresh_start(
    model: TriModeModel, mode: Any, count: int
) -> None:
    """Many drafts are accepted at once here, so a limit cuts inside a block whose rest is already
    in the cache.
    """
    turn = [40, 41, 42, 43, 44, 45, 46, 47, 48]
    for question in questions(1):
        sequence = model.new_sequence(ask(model, question))
        first = [
            t
            for c in model.continue_sequence(sequence, mode, max_new_tokens=count)
            for t in c.token_ids
        ]
        sequence.append(turn)
        assert sequence.cached_length < len(sequence.tokens)
        got = [
            t
            for c in model.continue_sequence(sequence, "ar", max_new_tokens=12)
            for t in c.token_ids
        ]
        fresh = model.ar_generate([ask(model, question)[0] + first + turn], max_new_tokens=12)[0]
        assert sequence.tokens == fresh[0].tolist()
        assert got == fresh[0, -len(got) :].tolist()


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_most_questions_are_answered_right(model: TriModeModel, mode: Any) -> None:
    """A floor, not the claim: the measured table is in docs/results/measurements-2026-11.md."""
    asked = list(questions(6))
    answers = [
        model.codec.decode(model.stream(ask(model, q), mode, max_new_tokens=192).finish().token_ids)
        for q in asked
    ]
    assert sum(answer in q.answers for answer, q in zip(answers, asked, strict=True)) >= 0.9 * len(
        asked
    )


def test_the_learned_sampler_needs_fewer_forwards_for_answers_as_good(model: TriModeModel) -> None:
    """A floor, not the claim: the measured curve is in docs/reference/sampler.md. The network runs
    in PyTorch; its graph has tests of its own.
    """
    record = load_sampler_record(SAMPLER)
    scorer, digest = (
        TorchScorer(load_sampler(SAMPLER, record)),
        SourceDigest(open_checkpoint(CHECKPOINT)),
    )
    list(digest.read_all())
    assert record.source_sha256 == digest.base_hexdigest()
    policies = (
        DecodeOptions(192, 32, 0.9),
        DecodeOptions(192, 32, record.threshold, sampler="learned", scorer=scorer),
    )
    asked, forwards, right = list(questions(6)), [], []
    for options in policies:
        counters, answers = [Counters() for _ in asked], []
        for question, counter in zip(asked, counters, strict=True):
            sequence = model.new_sequence(ask(model, question))
            answers.append(
                model.codec.decode(
                    [t for tokens in decode_diffusion(sequence, options, counter) for t in tokens]
                )
            )
        forwards.append(sum(counter.nfe for counter in counters))
        right.append(
            sum(answer in question.answers for answer, question in zip(answers, asked, strict=True))
        )
    assert right[1] >= right[0] - 2 >= 0.9 * len(asked) - 2
    assert forwards[1] < 0.95 * forwards[0]

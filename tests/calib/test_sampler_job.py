"""A sampler's training as a job: the states, what is right in them, what it learns, what it writes,
and that it can be interrupted.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from checkpoints import config_of, write_checkpoint, write_int8_calibration
from jobs import Quiet, some_texts
from reference import Reference
from safetensors.torch import load_file

from trimode.calib.data.prompts import Prompts, split_texts
from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.calib.sampler import measure
from trimode.calib.sampler.job import SamplerJob
from trimode.calib.sampler.measure import auc, calibration_error, choose_threshold, cross_entropy
from trimode.calib.sampler.settings import SamplerJobSettings
from trimode.calib.sampler.training import SamplerTraining, new_sampler, validation_loss
from trimode.calib.sampler.trajectories import StateRecorder, States, join, write_states
from trimode.calib.training.budget import Budget
from trimode.calib.training.run_state import state_file
from trimode.errors import BuildError, CheckpointError, UsageError
from trimode.formats.sampler import (
    RECORD,
    WEIGHTS,
    DenoisingRecord,
    SamplerFile,
    load_sampler_record,
)
from trimode.graphs.checkpoint import describe_model, open_checkpoint
from trimode.graphs.sampler.network import SamplerShape, token_semantics
from trimode.graphs.sampler.trace import load_sampler

CONFIG = {"block_size": 8, "eos_token_id": 11}
SETTINGS: dict[str, Any] = {
    "steps": 8,
    "max_new_tokens": 11,
    "num_held_out": 3,
    "block_lengths": (3, 8),
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward": 12,
    "batch_size": 96,
}
MASK = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sampler") / "it", config_of(**CONFIG))


def train(
    folder: Path,
    output: Path,
    *,
    resume: bool = False,
    calibration: Path | None = None,
    progress: Quiet | None = None,
    **changes: Any,
) -> SamplerFile:
    settings, checkpoint = SamplerJobSettings(**{**SETTINGS, **changes}), open_checkpoint(folder)
    prompts = Prompts(some_texts(), "0" * 64)
    return SamplerJob(
        checkpoint,
        describe_model(checkpoint, 512),
        prompts,
        output,
        settings,
        progress or Quiet(),
        calibration=calibration,
        resume=resume,
    ).run()


def session_of(folder: Path) -> TorchSession:
    return TorchSession(load_trunk(open_checkpoint(folder), 600))


def states_of(folder: Path, prompt: list[int], length: int, target: Any, count: int = 11) -> States:
    recorder = StateRecorder(session_of(folder))
    return write_states(
        recorder,
        describe_model(open_checkpoint(folder), 512),
        prompt,
        length,
        count,
        target,
        random.Random(3),
    )


# States


def leftmost(model: Reference, prompt: list[int], count: int, length: int) -> list[int]:
    """Denoising from left to right, which ends where the model chooses the mask token."""
    eos, out = model.eos_token_id, list[int]()
    while len(out) < count and eos not in out:
        block = [model.pick(model.logits(prompt + out)[-1])] + [MASK] * (length - 1)
        # a random model may choose it for the first slot, too
        for slot in range(block[0] != MASK, length):
            if eos in block or MASK in block[:slot]:
                break
            block[slot] = model.pick(
                model.logits(prompt + out + block, block=length)[slot - length]
            )
        out += block
    return (out[: out.index(eos) + 1] if eos in out else out)[:count]


@pytest.mark.parametrize("target", ["serial", "leftmost", "ar"])
@pytest.mark.parametrize("length", [2, 3, 8])
def test_states_are_blocks_of_the_targets_text_with_some_slots_masked(
    folder: Path, length: int, target: Any
) -> None:
    """Every state is denoised anew by the independent model, behind every place where it may have
    come from.
    """
    model = Reference(folder)
    for prompt in some_texts(3):
        if target == "ar":
            text, _ = reference.ar(model, prompt, 11)
        elif target == "leftmost":
            text = leftmost(model, prompt, 11, length)
        else:
            text, _ = reference.diffusion(model, prompt, 11, length, 2.0)
        states = states_of(folder, prompt, length, target)
        assert (
            len(
                {
                    (block.tobytes(), t.tobytes())
                    for block, t in zip(states.blocks.numpy(), states.targets.numpy(), strict=True)
                }
            )
            > 1
        )
        blocks_of_text = {
            start: text[start : start + length] for start in range(0, len(text), length)
        }
        labels, counts = states.labels(MASK)
        seen: set[int] = set()
        for n, (block, ids, p, goal) in enumerate(
            zip(*(tensor.tolist() for tensor in states), strict=True)
        ):
            # a block may come twice in a text
            starts = [
                start for start, known in blocks_of_text.items() if goal[: len(known)] == known
            ]
            forwards = {
                start: model.logits(prompt + text[:start] + block, block=length)[-length:]
                .softmax(-1)
                .topk(5)
                for start in starts
            }
            agreeing = {
                start for start, best in forwards.items() if np.allclose(p, best.values, atol=1e-5)
            }
            assert agreeing
            seen |= agreeing
            assert [row[0] for row in ids] == forwards[min(agreeing)].indices[:, 0].tolist()
            for slot in range(length):
                assert block[slot] in (goal[slot], MASK) or goal[slot] == MASK
                assert counts[n, slot] == (block[slot] == MASK and goal[slot] != MASK)
                assert labels[n, slot] == (ids[slot][0] == goal[slot])
        assert seen == set(blocks_of_text)


def test_each_state_of_a_block_comes_once_and_the_first_is_all_masks(folder: Path) -> None:
    states = states_of(folder, some_texts(1)[0], 8, "serial", count=8)
    blocks = [tuple(block) for block in states.blocks.tolist()]
    assert len(set(blocks)) == len(blocks) >= 7  # serial denoising alone has seven
    assert blocks[0].count(MASK) == 7


# Training


def test_training_learns_what_the_probability_does_not_tell_and_by_its_own_seed(
    folder: Path,
) -> None:
    """What is right depends on the candidate's id alone, which the probability does not tell."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(
        rng.permuted(np.tile(np.arange(MASK), (300 * 5, 1)), axis=1)[:, :5]
        .reshape(300, 5, 5)
        .astype(np.int32)
    )
    p = torch.full((300, 5, 5), 0.2)
    targets = torch.where(ids[..., 0] % 2 == 0, ids[..., 0], ids[..., 1])
    states = States(torch.full((300, 5), MASK, dtype=torch.int32), ids, p, targets)
    table = token_semantics(load_trunk(open_checkpoint(folder), 64).encoder.embed_tokens.weight)
    losses = []
    for _ in range(2):
        sampler = new_sampler(SamplerShape(32, 1, 2, 32), table, {5: states}, MASK, 3)
        training = SamplerTraining(
            sampler, {5: states}, {5: states}, MASK, learning_rate=5e-3, batch_size=500, seed=1
        )
        done = training.run(Budget(steps=150))
        losses.append(validation_loss(sampler, states, MASK))
        torch.manual_seed(99)
    assert losses[0] == losses[1] == done.best_loss
    share = float((ids[..., 0] % 2 == 0).double().mean())
    assert done.untrained_loss == pytest.approx(
        -share * math.log(0.2) - (1 - share) * math.log(0.8), rel=1e-5
    )
    assert done.best_loss < 0.05


def test_features_are_standardised_over_the_states(folder: Path) -> None:
    states = states_of(folder, some_texts(1)[0], 8, "serial")
    table = token_semantics(load_trunk(open_checkpoint(folder), 64).encoder.embed_tokens.weight)
    sampler = new_sampler(SamplerShape(8, 1, 1, 8), table, {8: states}, MASK, 0)
    features = sampler.features(
        states.blocks.long(), states.blocks == MASK, states.ids.long(), states.probabilities
    ).double()
    scaled = ((features - sampler.feature_mean) / sampler.feature_std).flatten(0, 1)
    constant = features.flatten(0, 1).std(0) < 1e-4
    assert scaled.mean(0).abs().max() < 1e-3
    assert (scaled.std(0, correction=0)[~constant] - 1).abs().max() < 1e-3
    assert (sampler.feature_std[constant] == 1).all()


def test_what_is_written(folder: Path, tmp_path: Path) -> None:
    record = train(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {RECORD, WEIGHTS}
    assert load_sampler_record(tmp_path / "out") == record
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert tensors["token_table"].dtype == torch.float16
    assert tensors["token_table"].shape == (109, 32)
    assert record.num_parameters == sum(
        t.numel() for name, t in tensors.items() if name.split("_")[0] not in ("token", "feature")
    )
    assert (
        record.prompts.num_train,
        record.prompts.num_validation,
        record.prompts.num_held_out,
    ) == (11, 1, 3)
    assert [one.block_length for one in record.scores] == [3, 8]
    assert (
        len(record.held_out)
        == len(record.validation)
        == 2 * (len(measure.CONFIDENCES) + len(measure.SCORES))
    )
    assert record.training.best_loss <= record.training.untrained_loss
    assert record.threshold in measure.SCORES
    sampler = load_sampler(tmp_path / "out", record)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in sampler.state_dict().items())


def test_the_texts_of_the_record_are_those_of_the_decoder(folder: Path, tmp_path: Path) -> None:
    """The rule's rows, by the independent model."""
    record = train(folder, tmp_path / "out", block_lengths=(3,))
    model = Reference(folder)
    settings = SamplerJobSettings(**SETTINGS)
    held_out = split_texts(
        some_texts(), None, 3, settings.seed, describe_model(open_checkpoint(folder), 512)
    ).held_out
    for row in record.held_out:
        if row.sampler == "threshold":
            texts = [
                reference.diffusion(model, prompt, 11, 3, row.threshold) for prompt in held_out
            ]
            serial = [reference.diffusion(model, prompt, 11, 3, 2.0)[0] for prompt in held_out]
            assert (row.num_tokens, row.num_forwards) == (
                sum(len(t) for t, _ in texts),
                sum(n for _, n in texts),
            )
            assert (
                row.same_as_target
                == sum(t == s for (t, _), s in zip(texts, serial, strict=True)) / 3
            )


def test_answers_that_are_known_decide_what_is_right(folder: Path, tmp_path: Path) -> None:
    """Of three held-out prompts one has the answer of a threshold of 0.5, one a wrong one, and one
    none.
    """
    checkpoint, settings, prompts = (
        open_checkpoint(folder),
        SamplerJobSettings(**SETTINGS),
        some_texts(),
    )
    model = describe_model(checkpoint, 512)
    known, wrong, open_ended = split_texts(prompts, None, 3, 0, model).held_out
    reference_model, options = Reference(folder), (11, 8)
    bold = {
        confidence: reference.diffusion(reference_model, known, *options, confidence)[0]
        for confidence in measure.CONFIDENCES
    }
    target = reference.diffusion(reference_model, open_ended, *options, 2.0)[0]
    agreeing = {
        confidence: reference.diffusion(reference_model, open_ended, *options, confidence)[0]
        == target
        for confidence in measure.CONFIDENCES
    }
    answers = {tuple(known): ("something else", str(bold[0.5])), tuple(wrong): ("nothing",)}
    job = partial(
        SamplerJob,
        checkpoint,
        model,
        output=tmp_path / "it",
        settings=settings,
        progress=Quiet(),
    )
    record = job(prompts=Prompts(prompts, "0" * 64, answers, str)).run()
    rows = {
        row.threshold: row
        for row in record.held_out
        if (row.sampler, row.block_length) == ("threshold", 8)
    }
    assert {confidence: row.exact_match for confidence, row in rows.items()} == {
        c: ((bold[c] == bold[0.5]) + agreeing[c]) / 3 for c in measure.CONFIDENCES
    }
    assert all(row.exact_match is None for row in record.validation)
    assert record.sampler_sha256 == job(prompts=Prompts(prompts, "0" * 64)).run().sampler_sha256


def test_seed_and_target_decide(folder: Path, tmp_path: Path) -> None:
    first, again, other, ar = (
        train(folder, tmp_path / name, block_lengths=(3,), **changes)
        for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"target": "ar"}))
    )
    assert first.sampler_sha256 == again.sampler_sha256
    assert len({first.sampler_sha256, other.sampler_sha256, ar.sampler_sha256}) == 3
    assert ar.target == "ar"


def test_a_training_that_diverges(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SamplerTraining, "_step", lambda *_: math.nan)
    with pytest.raises(BuildError, match="learning_rate"):
        train(folder, tmp_path / "out", block_lengths=(3,))
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint(folder: Path, tmp_path: Path) -> None:
    calibration = write_int8_calibration(folder, tmp_path / "cal")
    record = train(folder, tmp_path / "out", calibration=calibration, block_lengths=(3,))
    assert record.calibration is not None
    assert (record.calibration.precision, record.calibration.name) == ("int8", "cal")
    assert (
        record.sampler_sha256
        != train(folder, tmp_path / "dense", block_lengths=(3,)).sampler_sha256
    )


# Measuring


def test_figures_over_scores() -> None:
    rng = np.random.default_rng(5)
    values, right = rng.integers(0, 12, 200) / 11, rng.random(200) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in values[right] for b in values[~right]]
    assert auc(values, right) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert auc(values, np.ones(200, bool)) is None
    clipped = np.clip(values, 1e-7, 1 - 1e-7)
    assert cross_entropy(values, right) == pytest.approx(
        -np.mean([math.log(v if r else 1 - v) for v, r in zip(clipped, right, strict=True)])
    )
    total = 0.0
    for low in range(10):
        inside = [
            i
            for i, v in enumerate(values)
            if low / 10 <= v < (low + 1) / 10 or (low == 9 and v == 1)
        ]
        if inside:
            total += abs(sum(values[i] for i in inside) - sum(right[i] for i in inside))
    assert calibration_error(values, right) == pytest.approx(total / 200)


def test_the_threshold_is_the_fastest_that_is_as_good() -> None:
    def row(sampler: str, threshold: float, same: float, speed: float) -> DenoisingRecord:
        return DenoisingRecord(
            block_length=8,
            sampler=sampler,
            threshold=threshold,
            num_texts=10,
            same_as_target=same,
            num_tokens=round(100 * speed),
            num_forwards=100,
            tokens_per_forward=speed,
        )

    rule = row("threshold", 0.9, 0.8, 5.0)
    speeds = {
        value: row("learned", value, 0.5 + 0.3 * (value >= 0.8), 8 - 3 * value)
        for value in measure.SCORES
    }
    assert choose_threshold([rule, *speeds.values()]) == 0.8
    speeds[0.95] = row("learned", 0.95, 0.8, 7.0)
    assert choose_threshold([rule, *speeds.values()]) == 0.95
    assert choose_threshold([row("threshold", 0.9, 0.9, 5.0), *speeds.values()]) == max(
        measure.SCORES
    )
    known = [
        one.model_copy(update={"exact_match": float(one.threshold == 0.99), "same_as_target": 1.0})
        for one in speeds.values()
    ]
    assert choose_threshold([rule, *known]) == 0.99


def test_the_threshold_gives_away_at_most_one_standard_error_of_the_best_score() -> None:
    def row(value: float, block_length: int, same: float, speed: int) -> DenoisingRecord:
        return DenoisingRecord(
            block_length=block_length,
            sampler="learned",
            threshold=value,
            num_texts=50,
            same_as_target=same,
            num_tokens=100 * speed,
            num_forwards=100,
            tokens_per_forward=speed,
        )

    rule = [
        row(0.9, length, 0.5, 5).model_copy(update={"sampler": "threshold"}) for length in (8, 32)
    ]
    # of 100 texts: 0.9 has a standard error of 0.03
    shares = (0.6, 0.7, 0.8, 0.85, 0.86, 0.9, 0.9, 0.89, 0.88)
    rows = [
        row(value, length, same, 20 - i)
        for i, (value, same) in enumerate(zip(measure.SCORES, shares, strict=True))
        for length in (8, 32)
    ]
    assert choose_threshold([*rule, *rows]) == 0.9
    shorter = [
        row.model_copy(
            update={"same_as_target": row.same_as_target + (0.03 if row.block_length == 8 else 0)}
        )
        for row in rows
        if row.threshold == 0.8
    ]
    assert choose_threshold([*rule, *(r for r in rows if r.threshold != 0.8), *shorter]) == 0.8


# Interruptions


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """As in a terminal; a runner may have started the tests with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupted_run_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole = train(folder, tmp_path / "whole")
    for stage, at in (("write states", 4), ("train", 50)):

        def press(name: str, done: int, stage: str = stage, at: int = at) -> None:
            if (name, done) == (stage, at):
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            train(folder, tmp_path / "parts", resume=stage == "train", progress=Quiet(press))
        assert not (tmp_path / "parts").exists()
    state = torch.load(state_file(tmp_path / "parts"), weights_only=True)
    assert (len(state["written"]), state["training"]["progress"]["step"]) == (15, 4)
    with pytest.raises(UsageError, match="found one that was interrupted"):
        train(folder, tmp_path / "parts")
    with pytest.raises(UsageError, match=r"a run with target ar, found one with serial"):
        train(folder, tmp_path / "parts", target="ar", resume=True)
    parts = train(folder, tmp_path / "parts", resume=True)
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (
        tmp_path / "whole" / WEIGHTS
    ).read_bytes()

    def without_time(record: SamplerFile) -> SamplerFile:
        return record.model_copy(
            update={"training": record.training.model_copy(update={"seconds": 0.0})}
        )

    assert without_time(parts) == without_time(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts"}


# Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_held_out": 14},
            "expected at least 16 different prompts, 14 of them held out, found 15",
        ),
        ({"steps": 0}, "`steps` of at least 1"),
        ({"minutes": math.nan}, "`minutes` above 0"),
        ({"learning_rate": 2.0}, "`learning_rate` above 0 and up to 1"),
        (
            {"block_lengths": ()},
            "`block_lengths` with one or several different lengths, found none",
        ),
        (
            {"block_lengths": (8, 8)},
            "`block_lengths` with one or several different lengths, found 8,8",
        ),
        ({"block_lengths": (8, 65)}, "`block_lengths` from 2 to 64, found 65"),
        ({"block_lengths": (1,)}, "`block_lengths` from 2 to 64, found 1"),
        (
            {"d_model": 18, "num_heads": 2},
            r"`d_model` that is a multiple of twice the heads \(4\), found 18",
        ),
        ({"num_layers": 0}, "`num_layers` of at least 1"),
        ({"target": "greedy"}, "a `target` among serial, leftmost, ar, found 'greedy'"),
        ({"dtype": "fp32"}, "`dtype` float32, bfloat16, float16"),
        ({"device": "tpu"}, "`device` cpu or cuda"),
    ],
)
def test_settings_that_cannot_be_used(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(folder, tmp_path / "out", **changes)
    assert not any(tmp_path.iterdir())


def test_only_an_earlier_output_is_replaced(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="something else"):
        train(folder, folder)
    first = train(folder, tmp_path / "out", block_lengths=(2,), steps=1)
    assert train(folder, tmp_path / "out", block_lengths=(2,), steps=2) != first


def test_a_sampler_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "out", block_lengths=(2,), steps=1)
    with pytest.raises(CheckpointError, match="found none"):
        load_sampler_record(tmp_path)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    for changes, message in (
        ({"schema_version": 9}, "schema version 1, found 9"),
        ({"extra": 1}, "can be read"),
        ({"sampler_sha256": "0"}, "found another"),
    ):
        (tmp_path / "out" / RECORD).write_text(json.dumps({**record, **changes}))
        with pytest.raises(CheckpointError, match=message):
            load_sampler_record(tmp_path / "out")
    (tmp_path / "out" / RECORD).write_text(
        json.dumps({**record, "shape": {**record["shape"], "d_model": 20}})
    )
    with pytest.raises(CheckpointError, match="expected the tensors that"):
        load_sampler(tmp_path / "out", load_sampler_record(tmp_path / "out"))


def test_texts_join() -> None:
    parts = [
        States(*(torch.full(shape, float(n)) for shape in ((n, 2), (n, 2, 5), (n, 2, 5), (n, 2))))
        for n in (1, 3)
    ]
    assert [tuple(tensor.shape) for tensor in join(parts)] == [(4, 2), (4, 2, 5), (4, 2, 5), (4, 2)]

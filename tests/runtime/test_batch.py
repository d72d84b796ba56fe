"""Rows of a batch equal their single runs, token for token and counter for counter, whatever their
neighbours do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
from checkpoints import SHAPES
from conftest import Built
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

from trimode.errors import UsageError
from trimode.runtime import Batch, BatchRow, Chunk, Generation
from trimode.runtime.auto.policy import StepCosts
from trimode.runtime.auto.prior import AcceptanceHistory
from trimode.runtime.decode.forward import Forward
from trimode.runtime.engine.batch import BatchRequest
from trimode.runtime.engine.grouping import PATIENCE, Waiting, choose_group, join_forwards
from trimode.runtime.model import TriModeModel
from trimode.runtime.sessions.ort.session import OrtSession
from trimode.runtime.text.codec import TextCodec

MODES = ("ar", "diffusion", "linear_spec", "quadratic_spec", "auto")
SIZES = (1, 2, 3, 5, 8)
COSTS = StepCosts(
    (64,),
    (1.0,),
    {4: (1.3,), 8: (1.6,), 16: (2.1,)},
    {4: (1.2,), 8: (1.4,), 16: (1.9,)},
    AcceptanceHistory(0.5),
)
PIECES = ["a", "b", "ab", "ba", "c", "abc", " ", "\n", "\n\n", "x\n", "bca"]


@pytest.fixture(scope="module")
def model(
    quadratic: Callable[[str], Built], tmp_path_factory: pytest.TempPathFactory
) -> TriModeModel:
    """Random weights, all modes, and a vocabulary of few and short texts, so that stop strings
    appear in every way.
    """
    return with_texts(quadratic("three_kv_heads").model, tmp_path_factory.mktemp("codec"))


def with_texts(model: TriModeModel, folder: Path) -> TriModeModel:
    texts = {
        (PIECES[i % len(PIECES)] + "\u200b" * (i // len(PIECES))): i
        for i in range(model.model.vocab_size)
    }
    tokenizer = Tokenizer(WordLevel(texts, unk_token="a"))
    tokenizer.decoder = Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    with_codec = TriModeModel(model.bundle, model.session)
    with_codec.__dict__["codec"] = TextCodec(folder)
    return with_codec


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((length, seed)).integers(12, 99, length).tolist()


def random_options(rng: random.Random, mode: str) -> dict[str, Any]:
    """Of every kind that there is; some end tokens do appear in texts of random weights."""
    options: dict[str, Any] = {
        "max_new_tokens": rng.randint(1, 45),
        "eos_token_ids": tuple(rng.sample(range(99), rng.choice([0, 1, 4, 10]))),
        "stop": rng.choice([(), (), ("ab\u200b",), ("b\n", "\u200bc a")]),
        "block_length": rng.choice([1, 2, 5, 16]),
    }
    if mode not in ("quadratic_spec", "auto"):
        options["threshold"] = rng.choice([0.0, 0.1, 0.9])
    if mode == "auto":
        options["costs"] = COSTS
    if mode in ("linear_spec", "auto"):
        options["use_drafter"] = rng.random() < 0.5
    if mode != "quadratic_spec" and rng.random() < 0.5:
        options |= {
            "temperature": rng.choice([0.0, 1.0]),
            "repetition_penalty": rng.choice([1.0, 1.3]),
            "presence_penalty": rng.choice([0.0, 0.0, 1.5]),
            "frequency_penalty": rng.choice([0.0, 0.0, 0.7, -0.4]),
            "logit_bias": rng.choice([None, {30: 4.0, 31: -100.0}])
            if mode != "diffusion"
            else None,
            "seed": rng.randint(0, 9),
            "min_new_tokens": rng.randint(0, min(5, options["max_new_tokens"]))
            if mode != "diffusion"
            else 0,
            "logprobs": rng.choice([None, 0, 2]),
        }
    return options


def facts(result: Generation) -> dict[str, Any]:
    """All of a result but its time, and log-probabilities as far as rounding lets them be the
    same.
    """
    logprobs = [
        (one.token_id, pytest.approx(one.logprob, abs=1e-4), [token for token, _ in one.top])
        for one in result.logprobs or ()
    ]
    return {**vars(result), "elapsed_s": None, "logprobs": logprobs}


# --- whole texts


@pytest.mark.parametrize("size", SIZES)
def test_rows_equal_their_single_runs(model: TriModeModel, size: int) -> None:
    """Ragged prompts in all modes at once, ending at different times and for every reason."""
    rng = random.Random(size)
    lengths = [1, 600, *(rng.choice([1, 2, 7, 31, 100, 250, 513]) for _ in range(10))]
    modes = [MODES[i % len(MODES)] for i in range(len(lengths))]
    options = [random_options(rng, mode) for mode in modes]
    expected = [
        model.stream([prompt_of(n)], m, **o)
        for n, m, o in zip(lengths, modes, options, strict=True)
    ]
    chunks: list[list[Chunk]] = [[] for _ in lengths]
    rows: dict[int, BatchRow] = {}
    batch = model.new_batch(size)
    for number, row, chunk in batch.answer_all(requests(lengths, modes, options)):
        chunks[number].append(chunk)
        rows[number] = row
    assert sorted(rows) == list(range(len(lengths)))
    for number, stream in enumerate(expected):
        assert chunks[number] == list(stream), (modes[number], options[number])
        assert facts(rows[number].result) == facts(stream.result), (modes[number], options[number])
        assert rows[number].result.elapsed_s > 0
    assert {rows[number].result.finish_reason for number in rows} == {"stop", "length"}
    assert batch.num_free == size


def requests(
    lengths: Sequence[int], modes: Sequence[Any], options: Sequence[dict[str, Any]]
) -> Iterator[BatchRequest]:
    for length, mode, chosen in zip(lengths, modes, options, strict=True):
        yield BatchRequest(prompt_of(length), mode, chosen)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_independent_decoders(built: Callable[[str], Built], shape: str) -> None:
    it = built(shape)
    prompts = [prompt_of(n) for n in (1, 150, 7, 40, 2)]
    for use_drafter in (True, False):
        expected = [
            reference.linear_spec(it.reference, p, 20, 8, 0.0, use_drafter) for p in prompts
        ]
        found = it.model.generate_batch(
            prompts,
            "linear_spec",
            max_new_tokens=20,
            block_length=8,
            use_drafter=use_drafter,
            max_rows=3,
        )
        assert [(one.token_ids, one.nfe) for one in found] == expected
    assert [
        (g.token_ids, g.nfe) for g in it.model.generate_batch(prompts, "ar", max_new_tokens=20)
    ] == [reference.ar(it.reference, p, 20) for p in prompts]
    assert [
        (g.token_ids, g.nfe)
        for g in it.model.generate_batch(
            prompts, "diffusion", max_new_tokens=19, block_length=8, threshold=0.3
        )
    ] == [reference.diffusion(it.reference, p, 19, 8, 0.3) for p in prompts]


def test_each_prompt_may_have_its_own_seed_and_limit(model: TriModeModel) -> None:
    prompts = [prompt_of(n) for n in (3, 90, 12)]
    limits, seeds = [5, 30, 1], [7, 8, 9]
    found = model.generate_batch(
        prompts, "linear_spec", max_new_tokens=limits, seed=seeds, temperature=1.0, eos_token_ids=()
    )
    for prompt, limit, seed, one in zip(prompts, limits, seeds, found, strict=True):
        alone = model.stream(
            [prompt],
            "linear_spec",
            max_new_tokens=limit,
            seed=seed,
            temperature=1.0,
            eos_token_ids=(),
        ).finish()
        assert facts(one) == facts(alone)
        assert (len(one.token_ids), one.seed) == (limit, seed)
    drawn = model.generate_batch(prompts, "ar", max_new_tokens=3, temperature=1.0)
    assert len({one.seed for one in drawn}) == 3
    assert model.generate_batch([], "ar") == []
    with pytest.raises(UsageError, match=r"one prompt a|one a prompt \(3\), found 2"):
        model.generate_batch(prompts, "ar", seed=[1, 2])


def test_text_comes_in_pieces(model: TriModeModel) -> None:
    """A row's chunks make its text as a single stream's do, up to a stop string."""
    batch = model.new_batch(3)
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_ids": (), "stop": "ab\u200b"}
    rows = [batch.add(prompt_of(n), "linear_spec", **options) for n in (3, 9, 21)]
    texts = {row: row.stream.new_text() for row in rows}
    pieces: dict[BatchRow, list[str]] = {row: [] for row in rows}
    for row, chunk in batch:
        pieces[row].append(texts[row].push(chunk.token_ids))
    for row, length in zip(rows, (3, 9, 21), strict=True):
        expected = list(model.stream([prompt_of(length)], "linear_spec", **options).text())
        assert [*pieces[row], texts[row].finish()] == expected


def test_a_prompt_is_read_while_others_decode(model: TriModeModel) -> None:
    """Two prompts of like length are read in one forward, and their decoding steps are shared."""
    forwards = counted(model)
    batch = TriModeModel(model.bundle, forwards).new_batch(4)
    rows = [
        batch.add(prompt_of(n), "ar", max_new_tokens=10, eos_token_ids=()) for n in (100, 70, 120)
    ]
    finish(batch)
    assert forwards.count == [("ar", 3, 120), *[("ar", 3, 1)] * 9]
    assert [row.result.nfe for row in rows] == [10, 10, 10]


# --- rows come and go


def finish(batch: Batch) -> dict[BatchRow, list[int]]:
    tokens: dict[BatchRow, list[int]] = {}
    for row, chunk in batch:
        tokens.setdefault(row, []).extend(chunk.token_ids)
    return tokens


class Counted:
    """A session that notes the forwards of batches."""

    def __init__(self, session: Any) -> None:
        self._session, self.count = session, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_rows(self, graph_name: Any, cache: Any, rows: range, ids: Any, *rest: Any) -> Any:
        assert ids.shape[0] == len(rows)
        self.count.append((graph_name, *ids.shape))
        return self._session.run_rows(graph_name, cache, rows, ids, *rest)


def counted(model: TriModeModel) -> Any:
    return Counted(model.session)


@dataclass
class Shadow:
    """A row, and the same text alone in the world: a sequence of its own, and what it says next."""

    row: BatchRow
    sequence: Any
    stream: Any
    is_exact: bool = True
    """Whether counters agree, too: a row that was interrupted may have run forwards that the other
    one had not begun.
    """
    ended: bool = field(default=False)

    def check(self, chunk: Chunk) -> None:
        assert chunk == next(self.stream, None)
        self.ended = chunk.finish_reason is not None
        if self.ended:
            assert facts(self.row.result)["token_ids"] == self.stream.result.token_ids
            if self.is_exact:
                assert facts(self.row.result) == facts(self.stream.result)


class Game:
    """Random moves of a batch, each repeated by the shadows."""

    def __init__(self, model: TriModeModel, rng: random.Random, size: int) -> None:
        self.model, self.rng, self.size = model, rng, size
        self.batch = model.new_batch(size)
        self.shadows: list[Shadow] = []
        self.moves = {"join": 0, "step": 0, "leave": 0, "resume": 0, "interrupt": 0}

    def play(self, moves: int) -> None:
        for _ in range(moves):
            names = (
                ["step"] * 6
                + ["join"] * 2 * (len(self.shadows) < self.size)
                + ["leave", "resume", "resume", "interrupt"] * bool(self.shadows)
            )
            name = self.rng.choice(names)
            getattr(self, name)()
            self.moves[name] += 1
        for row, chunk in self.batch:
            self.of(row).check(chunk)
        for shadow in self.shadows:
            assert shadow.row.sequence.tokens == shadow.sequence.tokens

    def of(self, row: BatchRow) -> Shadow:
        return next(shadow for shadow in self.shadows if shadow.row is row)

    def choice(self) -> tuple[Any, dict[str, Any]]:
        mode = self.rng.choice(MODES)
        return mode, random_options(self.rng, mode)

    def join(self) -> None:
        prompt, (mode, options) = (
            prompt_of(self.rng.choice([1, 2, 3, 20, 200, 255, 600]), self.rng.randint(0, 5)),
            self.choice(),
        )
        sequence = self.model.new_sequence([prompt])
        row = self.batch.add(prompt, mode, **options)
        self.shadows.append(
            Shadow(row, sequence, self.model.continue_sequence(sequence, mode, **options))
        )

    def step(self) -> None:
        for row, chunk in self.batch.step():
            self.of(row).check(chunk)

    def leave(self) -> None:
        shadow = self.shadows.pop(self.rng.randrange(len(self.shadows)))
        self.batch.finish(shadow.row)

    def resume(self) -> None:
        """Of a text that has ended: cut it or add a turn, and go on in some mode."""
        if ended := [shadow for shadow in self.shadows if shadow.ended]:
            self.go_on(self.rng.choice(ended))

    def interrupt(self) -> None:
        """Like resume, wherever the text stands."""
        shadow = self.rng.choice(self.shadows)
        shadow.is_exact = shadow.is_exact and shadow.ended
        self.batch.pause(shadow.row)
        self.go_on(shadow)

    def go_on(self, shadow: Shadow) -> None:
        change, mode_options = self.rng.choice(["cut", "turn", "none"]), self.choice()
        kept, turn = (
            self.rng.randint(1, len(shadow.sequence.tokens)),
            prompt_of(self.rng.randint(1, 40)),
        )
        for sequence in (shadow.sequence, shadow.row.sequence):
            if change == "cut":
                sequence.truncate(kept)
            elif change == "turn":
                sequence.append(turn)
        mode, options = mode_options
        self.batch.resume(shadow.row, mode, **options)
        shadow.stream, shadow.ended = (
            self.model.continue_sequence(shadow.sequence, mode, **options),
            False,
        )


@pytest.mark.parametrize("free_tokens", [0, 8, 10_000])
@pytest.mark.parametrize("size", SIZES)
def test_any_series_of_moves(
    model: TriModeModel, monkeypatch: pytest.MonkeyPatch, size: int, free_tokens: int
) -> None:
    """Rows join, end, leave, are cut back and go on in other modes, at any time, next to any
    neighbours, with much padding and without.
    """
    monkeypatch.setattr(model.session, "free_tokens", free_tokens)
    game = Game(model, random.Random(100 * size + free_tokens), size)
    game.play(300)
    assert min(game.moves.values()) > 0


def test_rows_stay_neighbours(model: TriModeModel) -> None:
    """Whoever is last takes a free place, and loses nothing by that."""
    forwards = counted(model)
    batch = TriModeModel(model.bundle, forwards).new_batch(5)
    rows = [
        batch.add(prompt_of(50 + n), "ar", max_new_tokens=30, eos_token_ids=()) for n in range(5)
    ]
    batch.step()
    for gone in (0, 2):
        batch.finish(rows[gone])
    finish(batch)
    assert forwards.count[1:] == [("ar", 3, 1)] * 29
    for n in (1, 3, 4):
        assert facts(rows[n].result) == facts(
            model.stream([prompt_of(50 + n)], "ar", max_new_tokens=30, eos_token_ids=()).finish()
        )


def test_a_row_that_has_left(model: TriModeModel) -> None:
    batch = model.new_batch(1)
    row = batch.add([20, 30], "ar", max_new_tokens=4, eos_token_ids=())
    with pytest.raises(UsageError, match="found all 1 taken"):
        batch.add([20], "ar")
    finish(batch)
    batch.finish(row)
    assert len(row.result.token_ids) == 4
    for call in (
        batch.finish,
        batch.pause,
        lambda row: batch.resume(row, "ar"),
        lambda row: row.sequence.run(row.sequence.predict()),
    ):
        row.sequence.append([20])
        with pytest.raises(UsageError, match="that has left"):
            call(row)
    assert batch.step() == []


def test_a_row_can_run_alone(model: TriModeModel) -> None:
    """Its sequence takes everything that a sequence takes, between two steps."""
    batch = model.new_batch(3)
    rows = [
        batch.add(prompt_of(n), "linear_spec", max_new_tokens=9, eos_token_ids=())
        for n in (30, 31, 32)
    ]
    finish(batch)
    alone = list(
        model.continue_sequence(
            rows[1].sequence, "diffusion", max_new_tokens=12, block_length=8, eos_token_ids=()
        )
    )
    assert alone == list(
        model.stream(
            [rows[1].sequence.tokens[:40]],
            "diffusion",
            max_new_tokens=12,
            block_length=8,
            eos_token_ids=(),
        )
    )
    batch.resume(rows[2], "ar", max_new_tokens=5, eos_token_ids=())
    assert (
        finish(batch)[rows[2]]
        == model.stream([rows[2].sequence.tokens[:41]], "ar", max_new_tokens=5, eos_token_ids=())
        .finish()
        .token_ids
    )


def test_no_row_waits_for_ever(model: TriModeModel) -> None:
    """One row in a mode of its own, among many that always outnumber it, one of which always
    follows another.
    """
    batch = model.new_batch(5)
    alone = batch.add(
        prompt_of(5), "linear_spec", max_new_tokens=60, block_length=2, eos_token_ids=()
    )
    others = [
        batch.add(prompt_of(6 + n), "ar", max_new_tokens=1000, eos_token_ids=()) for n in range(4)
    ]
    steps = 0
    while alone.is_at_work:
        batch.step()
        steps += 1
        assert steps < 60 * 2 * (PATIENCE + 1)
    assert all(len(row.result.token_ids) > 30 for row in others)


def test_at_the_longest_text(model: TriModeModel) -> None:
    """Padding reaches neither beyond the position tables nor beyond the text's end, however long
    the neighbour's chunk is.
    """
    limit = model.model.max_length
    for free_tokens in (8, 10_000):
        session = counted(model)
        session.free_tokens = free_tokens
        batch = TriModeModel(model.bundle, session).new_batch(4)
        long = [
            batch.add(
                prompt_of(limit - n),
                "linear_spec",
                max_new_tokens=50,
                block_length=16,
                eos_token_ids=(),
            )
            for n in (3, 300, 324)
        ]
        finish(batch)
        long[1].sequence.append(prompt_of(limit - len(long[1].sequence.tokens) - 5))
        batch.resume(long[1], "ar", max_new_tokens=50, eos_token_ids=())
        short = batch.add(prompt_of(450), "ar", max_new_tokens=3, eos_token_ids=())
        found = finish(batch)
        assert (
            found[long[1]]
            == model.stream(
                [long[1].sequence.tokens[:-5]], "ar", max_new_tokens=50, eos_token_ids=()
            )
            .finish()
            .token_ids
        )
        assert (
            found[short]
            == model.stream([prompt_of(450)], "ar", max_new_tokens=3, eos_token_ids=())
            .finish()
            .token_ids
        )
        assert facts(long[0].result) == facts(
            model.stream(
                [prompt_of(limit - 3)],
                "linear_spec",
                max_new_tokens=50,
                block_length=16,
                eos_token_ids=(),
            ).finish()
        )
        batch.resume(long[0], "ar", max_new_tokens=5)
        assert [(row, chunk) for row, chunk in batch] == [(long[0], Chunk([], "length"))]


def test_padding_follows_a_row_that_has_just_gone_on(model: TriModeModel) -> None:
    """Two long texts whose chunks cannot be padded to that of the row between them run after it,
    and take it along: behind where it is by then.
    """
    session = counted(model)
    session.free_tokens = 10_000
    batch = TriModeModel(model.bundle, session).new_batch(3)
    options: dict[str, Any] = {"max_new_tokens": 2, "eos_token_ids": ()}
    rows = [batch.add(prompt_of(n), "ar", **options) for n in (700, 5, 701)]
    finish(batch)
    for row, turn in ((rows[0], 290), (rows[1], 450), (rows[2], 291)):
        row.sequence.append(prompt_of(turn))
        batch.resume(row, "ar", **options)
    texts = [list(row.sequence.tokens) for row in rows]
    session.count.clear()
    found = finish(batch)
    # with the last token of the first turn, which was not cached yet
    assert session.count[:2] == [("ar", 1, 451), ("ar", 3, 292)]
    assert [found[row] for row in rows] == [
        model.stream([text], "ar", **options).finish().token_ids for text in texts
    ]


def test_interrupted_within_a_prompt(model: TriModeModel) -> None:
    """What the first chunk predicts is not the prompt's next token."""
    batch = model.new_batch(1)
    row = batch.add(prompt_of(600), "ar", max_new_tokens=9, eos_token_ids=())
    assert batch.step() == []
    batch.resume(row, "linear_spec", max_new_tokens=9, eos_token_ids=())
    assert (
        finish(batch)[row]
        == model.stream([prompt_of(600)], "ar", max_new_tokens=9, eos_token_ids=())
        .finish()
        .token_ids
    )


def test_a_text_that_outgrows_the_cache_ends_alone(model: TriModeModel) -> None:
    session = OrtSession(model.bundle, None, 1)
    session._capacity = 300
    batch = TriModeModel(model.bundle, session).new_batch(2)
    long, short = (
        batch.add(prompt_of(n), "ar", max_new_tokens=40, eos_token_ids=()) for n in (290, 40)
    )
    with pytest.raises(UsageError, match="at most 300 tokens"):
        finish(batch)
    assert not long.is_at_work
    finish(batch)
    assert facts(short.result) == facts(
        model.stream([prompt_of(40)], "ar", max_new_tokens=40, eos_token_ids=()).finish()
    )
    assert len(long.result.token_ids) == 11


def test_what_cannot_be_a_batch(model: TriModeModel) -> None:
    with pytest.raises(UsageError, match="at least 1 row, found 0"):
        model.new_batch(0)
    single = SimpleNamespace(new_cache=None)
    with pytest.raises(UsageError, match="runs several texts"):
        TriModeModel(model.bundle, single).new_batch(2)  # type: ignore[arg-type]
    for ids, found in (
        ([[1, 2]], r"shape \(n,\)"),
        ([], "empty prompt"),
        ([1.5], "whole numbers"),
        ([999], "from 0 to"),
        ([[1], [2, 3]], "different"),
    ):
        with pytest.raises(UsageError, match=found):
            model.generate_batch([[20, 30], ids], "ar")
    with pytest.raises(UsageError, match="expected a mode"):
        model.generate_batch([[20]], "fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_new_tokens"):
        model.generate_batch([[20], [30]], "ar", max_new_tokens=[3, 0])


# --- the schedule


WAITING = st.lists(
    st.tuples(
        st.sampled_from(["ar", "draft", "verify"]),
        st.sampled_from([1, 2, 3, 5, 8, 13, 70]),
        st.integers(0, 900),
        st.integers(0, 30),
        st.booleans(),
    ),
    min_size=1,
    max_size=9,
)


def waiting_of(drawn: list[Any]) -> list[Waiting]:
    return [
        Waiting(
            row,
            Forward(
                graph_name, np.zeros(count, np.int64), past, float(scale and graph_name == "draft")
            ),
            since,
        )
        for row, (graph_name, count, past, since, scale) in enumerate(drawn)
    ]


@given(
    drawn=WAITING,
    gaps=st.sets(st.integers(0, 8)),
    free=st.sampled_from([0, 4, 16, 10_000]),
    limit=st.sampled_from([980, 2000]),
)
def test_joint_forwards(drawn: list[Any], gaps: set[int], free: int, limit: int) -> None:
    """Each member exactly once, in its own row, and nobody beyond the limit who would not have been
    there anyway.
    """
    waiting = [one for one in waiting_of(drawn) if one.row not in gaps]
    if not waiting:
        return
    lengths = [past for _, _, past, _, _ in drawn]
    now = max(one.since for one in waiting)
    group = choose_group(waiting, now)
    joints = list(
        join_forwards(group, lengths.__getitem__, lambda past, count: past + count <= limit, free)
    )
    members = [member for joint in joints for member in joint.members]
    assert sorted(member.row for member in members) == sorted(one.row for one in group)
    for joint in joints:
        inside = {member.row: member for member in joint.members}
        assert {joint.rows.start, joint.rows.stop - 1} <= set(inside)
        idle = [row for row in joint.rows if row not in inside]
        assert all(lengths[row] + joint.num_tokens <= limit for row in idle)
        for row, after in zip(sorted(inside), sorted(inside)[1:], strict=False):
            assert (after - row - 1) * joint.num_tokens <= free
        for member in inside.values():
            assert (member.forward.graph_name, member.forward.drafter_scale) == (
                joint.graph_name,
                joint.drafter_scale,
            )
            assert member.num_tokens <= joint.num_tokens < 2 * member.num_tokens
            assert member.num_tokens == joint.num_tokens or (
                joint.graph_name == "ar" and lengths[member.row] + joint.num_tokens <= limit
            )


@given(drawn=WAITING)
def test_the_largest_group_comes_first_unless_somebody_has_waited_long(drawn: list[Any]) -> None:
    waiting = waiting_of(drawn)
    oldest = min(one.since for one in waiting)
    counts: dict[Any, int] = {}
    for one in waiting:
        size = (
            int(np.ceil(np.log2(one.num_tokens)))
            if one.forward.graph_name == "ar"
            else one.num_tokens
        )
        counts[one.forward.graph_name, size, one.forward.drafter_scale] = (
            counts.get((one.forward.graph_name, size, one.forward.drafter_scale), 0) + 1
        )
    assert len(choose_group(waiting, oldest + PATIENCE - 1)) == max(counts.values())
    assert oldest in {one.since for one in choose_group(waiting, oldest + PATIENCE)}

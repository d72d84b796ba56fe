"""Sampled decoding has the distribution it should have, counted against exact probabilities of the
independent model.

The algorithms run over that model itself, every forward of which is remembered: thousands of texts
in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, cast

import numpy as np
import pytest
from checkpoints import config_of, write_checkpoint
from conftest import Built
from reference import Reference
from sampling_reference import (
    FALSE_ALARM,
    WRONG_RULES,
    chi_squared_p_value,
    exact_match,
    with_penalties,
    with_transformers,
    without_penalties,
)
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from trimode.calib.reference.torch_session import accepted_lengths
from trimode.formats.contract import GraphName, Mode, ModelInfo
from trimode.runtime.decode import algorithms, token_choice
from trimode.runtime.decode.algorithms import MODES, Counters
from trimode.runtime.decode.options import DecodeOptions, make_options
from trimode.runtime.decode.sampling import SamplingOptions
from trimode.runtime.decode.sequence import Sequence
from trimode.runtime.grammar.compile import CompiledOutputs, GrammarCompiler
from trimode.runtime.grammar.spec import read_structured_outputs
from trimode.runtime.grammar.vocabulary import Vocabulary
from trimode.runtime.sessions.base import Session

VOCABULARY, MASK = 10, 9
PROMPT = [3, 5, 4]
TEXTS = 4000
TEMPERATURE = 2.5
"""The random model is sure of itself; flatter distributions tell rules better apart."""


class Cache(list[int]):
    """Tokens whose keys and values would be cached."""


class RememberedSession:
    """The independent model as a session; a forward over the same tokens is done once."""

    max_prefill_rows = None

    def __init__(self, model: Reference) -> None:
        self.model = model
        self.forwards: dict[Any, tuple[np.ndarray, ...]] = {}

    def new_cache(self) -> Cache:
        return Cache()

    def run(
        self,
        graph_name: GraphName,
        cache: Cache,
        input_ids: np.ndarray,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[np.ndarray, ...]:
        assert past_length <= len(cache)
        rows = input_ids[0].tolist()
        tokens = cache[:past_length] + rows
        if graph_name != "draft":
            cache[past_length:] = rows
        key = (graph_name, tuple(tokens), len(rows), drafter_scale)
        if key not in self.forwards:
            self.forwards[key] = self._forward(graph_name, tokens, len(rows), drafter_scale)
        return self.forwards[key]

    def _forward(
        self, graph_name: GraphName, tokens: list[int], rows: int, scale: float
    ) -> tuple[np.ndarray, ...]:
        logits = self.model.logits(
            tokens, rows if graph_name == "draft" else 0, drafter=scale != 0
        )[-rows:]
        if graph_name == "ar":
            return logits[-1:].argmax(-1).numpy(), logits[-1:].numpy()
        if graph_name == "verify":
            greedy = logits.argmax(-1)[None].numpy()
            return (
                greedy,
                accepted_lengths(greedy, np.array([tokens[-rows:]])),
                logits[None].numpy(),
            )
        best = logits.softmax(-1).topk(5)
        return best.indices[None].numpy(), best.values[None].numpy()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> RememberedSession:
    config = config_of(
        vocab_size=VOCABULARY, mask_token_id=MASK, eos_token_id=2, num_hidden_layers=1
    )
    return RememberedSession(
        Reference(write_checkpoint(tmp_path_factory.mktemp("small"), config, rank=4, seed=2))
    )


MODEL = ModelInfo(
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=16,
    mask_token_id=MASK,
    bos_token_id=1,
    eos_token_ids=(2,),
    block_size=4,
    max_length=64,
    max_block_length=16,
    has_drafter=True,
)


def texts(
    session: RememberedSession,
    mode: Mode,
    count: int = TEXTS,
    most: int = 3,
    ends: tuple[int, ...] = (),
    **options: Any,
) -> Iterator[tuple[list[int], Counters]]:
    """Sampled texts of three tokens, or up to one of ``ends``, one a seed."""
    for seed in range(count):
        sequence, counters = Sequence(cast("Session", session), MODEL, PROMPT), Counters()
        chosen = make_options(
            max_new_tokens=most, block_length=3, eos_token_ids=ends, seed=seed, **options
        )
        for _ in MODES[mode](sequence, chosen, counters):
            pass
        yield sequence.tokens[len(PROMPT) :], counters


def count_texts(session: RememberedSession, mode: Mode, **options: Any) -> tuple[np.ndarray, float]:
    """How often each text ``(V, V, V)``, and tokens a cycle."""
    counts, cycles, tokens = np.zeros((VOCABULARY,) * 3, int), 0, 0
    for text, counters in texts(session, mode, **options):
        counts[tuple(text)] += 1
        cycles, tokens = cycles + counters.cycles, tokens + counters.cycle_tokens
    return counts, tokens / max(1, cycles)


def exact_ar(model: Reference, sampling: SamplingOptions) -> np.ndarray:
    """Probability of each text under autoregression ``(V, V, V)``, with transformers'
    processors.
    """
    table = np.zeros((VOCABULARY,) * 3)
    conditional: dict[tuple[int, ...], np.ndarray] = {}
    for text in product(range(VOCABULARY), repeat=3):
        value = 1.0
        for i, token in enumerate(text):
            prefix = text[:i]
            if prefix not in conditional:
                logits = model.logits([*PROMPT, *prefix])[-1].double().numpy()
                conditional[prefix] = with_transformers(
                    with_penalties(logits, sampling, PROMPT, prefix),
                    without_penalties(sampling),
                    np.zeros(VOCABULARY, bool),
                )
            value *= conditional[prefix][token]
        table[text] = value
    return table


CASES: dict[str, dict[str, Any]] = {
    "plain": {"temperature": TEMPERATURE, "threshold": 0.0},
    "several draft forwards": {"temperature": TEMPERATURE, "threshold": 1.0},
    "every processor": {
        "temperature": TEMPERATURE,
        "threshold": 0.0,
        "top_k": 7,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.5,
    },
    "every penalty": {
        "temperature": TEMPERATURE,
        "threshold": 0.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.9,
        "logit_bias": {4: 2.5, 7: -100.0, 1: -1.0},
    },
}


def sampling_of(case: str) -> SamplingOptions:
    named = {name: value for name, value in CASES[case].items() if name != "threshold"}
    return make_options(**named).sampling


@pytest.mark.parametrize("case", CASES)
def test_linear_spec_has_the_distribution_of_ar(session: RememberedSession, case: str) -> None:
    counts, _ = count_texts(session, "linear_spec", **CASES[case])
    assert chi_squared_p_value(counts, exact_ar(session.model, sampling_of(case))) > FALSE_ALARM


@pytest.mark.parametrize("case", ["every processor", "every penalty"])
def test_ar_has_the_distribution_of_ar(session: RememberedSession, case: str) -> None:
    counts, _ = count_texts(session, "ar", **CASES[case])
    assert chi_squared_p_value(counts, exact_ar(session.model, sampling_of(case))) > FALSE_ALARM


@pytest.mark.parametrize("left_out", ["presence_penalty", "frequency_penalty", "logit_bias"])
def test_each_penalty_is_told_from_none(session: RememberedSession, left_out: str) -> None:
    options = {name: value for name, value in CASES["every penalty"].items() if name != left_out}
    counts, _ = count_texts(session, "ar", **options)
    assert chi_squared_p_value(counts, exact_ar(session.model, sampling_of("every penalty"))) < 1e-6


class ByTheLastStep:
    """The wildest policy there can be: every choice depends on what was accepted before, and
    verification stops at what is wanted.
    """

    def __init__(self, cut: int = 0) -> None:
        self._last, self._length, self._cut = 1, 1, cut

    def choose(self, past: int, left: int) -> int:
        self._length = {1: 3, 2: 1, 3: 2}[self._last]
        return self._length

    def rows_to_verify(self, num_wanted: int, confidence: np.ndarray | None) -> int:
        assert confidence is None  # of a draw it may not know anything
        return max(1, num_wanted - (self._cut if num_wanted < self._length else 0))

    def record(self, num_tokens: int) -> None:
        self._last = num_tokens


@pytest.mark.parametrize("case", ["plain", "every processor", "every penalty"])
def test_auto_has_the_distribution_of_ar(
    session: RememberedSession, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithms, "make_policy", lambda *_, **__: ByTheLastStep())
    counts, _ = count_texts(session, "auto", **CASES[case])
    assert chi_squared_p_value(counts, exact_ar(session.model, sampling_of(case))) > FALSE_ALARM


@pytest.mark.parametrize("cut", [0, 1])
def test_auto_may_stop_verifying_at_a_drawn_end_and_not_before_it(
    session: RememberedSession, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which token was drawn decides how much is verified; that this is no bias holds for an end
    that is verified itself, and only then.
    """
    monkeypatch.setattr(algorithms, "make_policy", lambda *_, **__: ByTheLastStep(cut))
    ends = (2, 4, 7)
    counts = np.zeros((VOCABULARY,) * 3, int)
    for text, _ in texts(
        session, "auto", 2 * TEXTS, most=5, temperature=TEMPERATURE, threshold=0.0, ends=ends
    ):
        counts[tuple((text + [MASK] * 3)[:3])] += 1
    expected = exact_ar(session.model, SamplingOptions(TEMPERATURE))
    for first in range(VOCABULARY):
        for second in range(VOCABULARY):
            if first in ends or second in ends:  # all texts with this beginning are one
                rest = expected[first, second].sum()
                expected[first, second] = 0
                expected[(first, MASK, MASK) if first in ends else (first, second, MASK)] += rest
    p_value = chi_squared_p_value(counts, expected)
    assert p_value > FALSE_ALARM if cut == 0 else p_value < 1e-6


@pytest.mark.parametrize("rule", WRONG_RULES)
def test_a_wrong_rule_is_told(
    session: RememberedSession, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_choice, "accept_or_replace", rule)
    counts, _ = count_texts(session, "linear_spec", **CASES["plain"])
    assert chi_squared_p_value(counts, exact_ar(session.model, SamplingOptions(TEMPERATURE))) < 1e-6


def test_more_is_accepted_than_by_exact_match(
    session: RememberedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = count_texts(session, "linear_spec", **CASES["plain"])
    monkeypatch.setattr(token_choice, "accept_or_replace", exact_match)
    counts, theirs = count_texts(session, "linear_spec", **CASES["plain"])
    assert (
        chi_squared_p_value(counts, exact_ar(session.model, SamplingOptions(TEMPERATURE)))
        > FALSE_ALARM
    )
    assert ours - 1 > 1.5 * (theirs - 1)  # one token a cycle comes without a draft


@pytest.mark.parametrize(
    "penalties", [{}, {"presence_penalty": -2.0, "frequency_penalty": 1.5}], ids=["none", "both"]
)
def test_diffusion_draws_from_the_candidates(
    session: RememberedSession, penalties: dict[str, float]
) -> None:
    """Two slots: the first from the causal row, the second from the five candidates, penalised,
    processed and normalised, without the mask token.
    """
    sampling = {"temperature": 2.0, "top_p": 0.9, **penalties}
    counts, _ = count_texts(session, "diffusion", threshold=0.0, **sampling)
    first = with_transformers(
        session.model.logits(PROMPT)[-1].double().numpy(),
        SamplingOptions(**sampling),
        np.zeros(VOCABULARY, bool),
    )
    expected = np.zeros((VOCABULARY,) * 3)
    for a in range(VOCABULARY):
        rows = session.model.logits([*PROMPT, a, MASK, MASK], block=3)[-2:].double().softmax(-1)
        slots = []
        for row in rows:
            ids = [i for i in row.topk(5).indices.tolist() if i != MASK]
            slots.append(np.zeros(VOCABULARY))
            changed = with_penalties(row.log().numpy(), SamplingOptions(**sampling), PROMPT, [a])
            slots[-1][ids] = with_transformers(
                changed[ids], SamplingOptions(**sampling), np.zeros(len(ids), bool)
            )
        expected[a] = first[a] * slots[0][:, None] * slots[1]
    # a first token that is the mask token leaves its slot to the denoiser
    keep = np.arange(VOCABULARY) != MASK
    assert counts[keep].sum() > 0.8 * TEXTS
    assert chi_squared_p_value(counts[keep], expected[keep] / expected[keep].sum()) > FALSE_ALARM


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear_spec"])
def test_a_seed_reproduces_a_text_and_is_reported(built: Callable[[str], Built], mode: Any) -> None:
    model = built("three_kv_heads").model
    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_ids": (), "temperature": 1.0}
    drawn = model.stream([[20, 30]], mode, **options).finish()
    assert drawn.seed is not None
    again = model.stream([[20, 30]], mode, seed=drawn.seed, **options).finish()
    assert drawn.token_ids == again.token_ids
    # two seeds may draw the same text, and five hardly
    seeds = range(drawn.seed + 1, drawn.seed + 6)
    others = [model.stream([[20, 30]], mode, seed=seed, **options).finish() for seed in seeds]
    assert any(other.token_ids != drawn.token_ids for other in others)
    # greedy: nothing is drawn
    assert model.stream([[20, 30]], mode, seed=3, max_new_tokens=3).finish().seed is None


def test_the_end_of_sampling_is_greedy(built: Callable[[str], Built]) -> None:
    """top_k 1 takes the most probable token by way of sampling; so does a temperature close to
    0.
    """
    model = built("one_kv_head").model
    for mode in ("ar", "linear_spec"):
        greedy = model.stream([[20, 30]], mode, max_new_tokens=25, eos_token_ids=()).finish()  # type: ignore[arg-type]
        for options in ({"temperature": 1.0, "top_k": 1}, {"temperature": 1e-6}):
            result = model.stream(
                [[20, 30]], mode, max_new_tokens=25, eos_token_ids=(), **options
            ).finish()  # type: ignore[arg-type]
            assert result.token_ids == greedy.token_ids


def test_drawn_drafts_are_filled_from_the_left() -> None:
    masked = np.array([False, True, True, True, True])
    for confidence, slots in (
        ([0, 0.1, 0.9, 0.9, 0.2], [1, 2, 3]),
        ([0, 0.9, 0.1, 0.9, 0.9], [1]),
        ([0, 0.5, 0.5, 0.5, 0.5], [1, 2, 3, 4]),
    ):
        assert (
            np.flatnonzero(algorithms._leading(masked, np.array(confidence), 0.5)).tolist() == slots
        )
    assert not algorithms._leading(np.zeros(3, bool), np.ones(3), 0.5).any()


def test_plain_options_read_no_logits() -> None:
    assert DecodeOptions().is_plain
    assert not make_options(temperature=0.5).is_plain


LETTERS = "abcdef"
EXPRESSION = "a[bd-f][a-f]|[c-f][ace][b-f]|b[a-f]f"
"""Of three letters, which are the tokens 3 to 8; the last one is decided after b."""


def grammar_of_letters() -> CompiledOutputs:
    names = ["?", "<s>", "</s>", *LETTERS, "<mask>"]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(["?", "<s>", "</s>", "<mask>"])
    compiler = GrammarCompiler(Vocabulary(tokenizer, MODEL))
    return compiler.compile(read_structured_outputs({"regex": EXPRESSION}))


def exact_constrained(model: Reference, options: DecodeOptions) -> np.ndarray:
    """Probability of each text that matches, with transformers' processors over what may come
    next, which is read off all these texts.
    """
    table, sampling = np.zeros((VOCABULARY,) * 3), options.sampling
    texts = map("".join, product(LETTERS, repeat=3))
    matching = [text for text in texts if re.fullmatch(EXPRESSION, text)]
    wanted = {tuple(3 + LETTERS.index(letter) for letter in text) for text in matching}
    for text in wanted:
        value = 1.0
        for i, token in enumerate(text):
            prefix = text[:i]
            next_ids = sorted({one[i] for one in wanted if one[:i] == prefix})
            logits = model.logits([*PROMPT, *prefix])[-1].double().numpy()
            changed = with_penalties(logits, sampling, PROMPT, prefix)[next_ids]
            kept = with_transformers(
                changed, without_penalties(sampling), np.zeros(len(next_ids), bool)
            )
            value *= kept[next_ids.index(token)]
        table[text] = value
    return table


CONSTRAINED = {
    "plain": CASES["plain"],
    "several draft forwards": CASES["several draft forwards"],
    "top_k": {"temperature": TEMPERATURE, "threshold": 0.0, "top_k": 2},
    "every penalty": CASES["every penalty"],
}


@pytest.mark.parametrize("mode", ["ar", "linear_spec"])
@pytest.mark.parametrize("case", CONSTRAINED)
def test_a_constrained_text_has_the_conditional_distribution(
    session: RememberedSession, mode: Mode, case: str
) -> None:
    options = {**CONSTRAINED[case], "structured_outputs": grammar_of_letters()}
    counts, _ = count_texts(session, mode, count=2000, **options)
    expected = exact_constrained(session.model, make_options(**options))
    assert np.isclose(expected.sum(), 1)
    assert chi_squared_p_value(counts, expected) > FALSE_ALARM


@pytest.mark.parametrize("rule", WRONG_RULES)
def test_a_wrong_rule_is_told_under_a_grammar(
    session: RememberedSession, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_choice, "accept_or_replace", rule)
    options = {**CASES["plain"], "structured_outputs": grammar_of_letters()}
    counts, _ = count_texts(session, "linear_spec", count=2000, **options)
    expected = exact_constrained(session.model, make_options(**options))
    assert chi_squared_p_value(counts, expected) < 1e-6

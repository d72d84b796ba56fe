"""Grammars of one text: what may come, what must come, and what is refused."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trimode.errors import DependencyError, UsageError
from trimode.runtime.grammar import library
from trimode.runtime.grammar.compile import GrammarCompiler
from trimode.runtime.grammar.spec import StructuredOutputs, read_structured_outputs
from trimode.runtime.grammar.state import GrammarState
from trimode.runtime.grammar.vocabulary import Vocabulary

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny" / "tokenizer.json"
END, MASK = 11, 100


def model_of(size: int, ends: tuple[int, ...] = (END,)) -> Any:
    return SimpleNamespace(vocab_size=size, eos_token_ids=ends, mask_token_id=MASK)


def byte_level() -> Tokenizer:
    """A byte-level vocabulary with merges, trained on this file; ids 0 to 101 are control."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [f"<c{i}>" for i in range(102)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([__file__], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def demo_compiler() -> GrammarCompiler:
    return GrammarCompiler(Vocabulary(Tokenizer.from_file(str(DEMO)), model_of(125)))


@pytest.fixture(scope="module")
def bytes_compiler() -> GrammarCompiler:
    return GrammarCompiler(Vocabulary(byte_level(), model_of(1000)))


def begun(compiler: GrammarCompiler, *ends: int, **asked: Any) -> GrammarState:
    compiled = compiler.compile(read_structured_outputs(asked))
    return compiled.compiled.start(frozenset(ends or (END,)))


def test_tokens_write_what_the_tokenizer_decodes() -> None:
    for tokenizer, anchor in ((Tokenizer.from_file(str(DEMO)), "a"), (byte_level(), "a")):
        vocabulary = Vocabulary(tokenizer, model_of(tokenizer.get_vocab_size() + 3))
        table, before = vocabulary.table, tokenizer.token_to_id(anchor)
        for token in range(tokenizer.get_vocab_size()):
            if token not in table.special_token_ids:
                text = (anchor.encode() + table.tokens[token]).decode(errors="replace")
                assert tokenizer.decode([before, token]) == text
        for text in ("a b", 'say "user", system', "ünïcödé 🙂", "</s><|im_end|> <c11><think>"):
            if tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text:
                assert b"".join(table.tokens[i] for i in table(text)) == text.encode()
                assert not set(table(text)) & set(table.special_token_ids)


def test_true_vocabulary() -> None:
    """At 131,072 ids, where mistral-common ships them: bytes as it has them itself."""
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    convert = pytest.importorskip("transformers.integrations.mistral.tokenizer").MistralConverter
    file = Path(sys.modules["mistral_common"].__file__ or "").parent / "data" / "tekken_240911.json"
    compiler = GrammarCompiler(Vocabulary(convert(str(file)).converted(), model_of(131_072, (2,))))
    table, tekken = compiler._vocabulary.table, mistral.Tekkenizer.from_file(str(file))
    assert len(table.tokens) == tekken.n_words == 131_072
    special = set(table.special_token_ids)
    assert special == set(range(1000))
    for token in range(1000, 131_072, 17):
        assert table.tokens[token] == tekken.id_to_byte_piece(token)
    schema = {"type": "object", "properties": {"größe": {"enum": ["名前 [INST]", "名"]}}}
    state = begun(
        compiler,
        2,
        json={**schema, "additionalProperties": False, "required": ["größe"]},
        disable_any_whitespace=True,
    )
    text = b""
    while (token := state.forced()) is not None:
        text += table.tokens[token]
        state.advance(token)
    assert text.decode() == '{"größe":"'
    written = table('名前 [INST]"}')
    for token in written:
        assert state.allows(token)
        state.advance(token)
    assert state.forced() == 2


def random_choices(rng: random.Random) -> tuple[str, ...]:
    """Texts with common beginnings, some of which begin others."""
    parts = ("", "a", "ab", "the ", "user", "system", "x", "0")
    found = {"".join(rng.choices(parts, k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 9))}
    return tuple(sorted(found - {""})) or ("a",)


@pytest.mark.parametrize("name", ["demo_compiler", "bytes_compiler"])
def test_what_may_come_is_what_the_choices_go_on_with(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Against the obvious: a token may come if some choice begins with the text and it."""
    compiler = request.getfixturevalue(name)
    tokens, rng = compiler._vocabulary.table.tokens, random.Random(5)
    silent = {*compiler._vocabulary.table.special_token_ids, MASK}
    for _ in range(60):
        choices = [text.encode() for text in random_choices(rng)]
        state = begun(compiler, choice=[text.decode() for text in choices])
        text = b""
        while not state.has_ended:
            left = {one[len(text) :] for one in choices if one.startswith(text)}
            expected = {
                i
                for i, token in enumerate(tokens)
                if i not in silent and any(one.startswith(token) for one in left)
            }
            expected |= {END} if b"" in left else set()
            forced = state.forced()
            mask = set(np.flatnonzero(state.mask()).tolist())
            assert mask == {i for i in range(len(tokens)) if state.allows(i)}
            if forced is None:
                assert mask == expected
            else:
                assert mask == {forced} <= expected
                written = b"" if forced == END else tokens[forced]
                assert all(one.startswith(written) for one in left)
                assert forced != END or left == {b""}
            token = rng.choice(sorted(mask))
            text += tokens[token] if token != END else b""
            state.advance(token)
        assert text in choices


@pytest.mark.parametrize("name", ["demo_compiler", "bytes_compiler"])
def test_what_is_forced_depends_on_the_tokens_alone(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Not on what was asked before, nor on copies that went their own way."""
    compiler, rng = request.getfixturevalue(name), random.Random(2)
    schema = {
        "type": "object",
        "properties": {"identity": {"enum": ["alpha", "alphabet"]}, "n": {"type": "integer"}},
        "required": ["identity", "n"],
        "additionalProperties": False,
    }
    for _ in range(20):
        asked = {"json": schema, "disable_any_whitespace": rng.random() < 0.5}
        state, other = begun(compiler, **asked), begun(compiler, **asked)
        for _ in range(60):
            if state.has_ended:
                break
            astray = state.copy()
            for _ in range(3):
                if not astray.has_ended:
                    astray.advance(int(rng.choice(np.flatnonzero(astray.mask()))))
            forced = state.forced()
            token = forced if forced is not None else int(rng.choice(np.flatnonzero(state.mask())))
            assert other.forced() == forced
            state.advance(token)
            other.advance(token)


def test_forced_tokens_are_the_tokenizers(bytes_compiler: GrammarCompiler) -> None:
    text = "def test_tokens_write_what_the_tokenizer_decodes() -> None: return state.forced()"
    state, found = begun(bytes_compiler, choice=[text]), []
    while (token := state.forced()) != END:
        assert token is not None
        found.append(token)
        state.advance(token)
    assert found == byte_level().encode(text).ids
    assert len(found) < len(text) / 2


def test_an_end_comes_where_the_grammar_accepts(demo_compiler: GrammarCompiler) -> None:
    state = begun(demo_compiler, 11, 31, regex="[ab]{1,2}")  # 31 is a
    a, b = 31, 32
    assert not state.allows(11)
    assert not state.allows(a)  # an end token is never text
    state.advance(b)
    assert state.allows(11)
    assert state.allows(a)
    assert not state.allows(11, may_end=False)
    state.advance(b)
    assert state.forced() is None  # two ends
    assert state.allows(11, may_end=False)  # nothing else is left
    assert np.flatnonzero(state.mask(may_end=False)).tolist() == [11, 31]
    assert not state.is_over
    without = demo_compiler.compile(read_structured_outputs({"choice": ["b"]}))
    over = without.compiled.start(frozenset())
    over.advance(b)
    assert over.is_over


def test_thinking_is_free_but_for_the_end(demo_compiler: GrammarCompiler) -> None:
    compiled = demo_compiler.compile(read_structured_outputs({"choice": ["yes"]}))
    state = compiled.compiled.start(frozenset({END}), end_think=13)
    assert state.is_thinking
    assert state.forced() is None
    assert not state.allows(END)
    assert not state.allows(MASK)
    assert np.flatnonzero(~state.mask()).tolist() == [END, MASK]
    for token in (60, 20, 13):
        state.advance(token)
    assert state.forced() == 55  # y


BAD: dict[str, tuple[Any, str]] = {
    "two": ({"json": {}, "regex": "a"}, "found json and regex"),
    "none": ({}, "found none"),
    "none but a flag": ({"json_object": False}, "found none"),
    "unknown": ({"jsn": {}}, "found 'jsn'"),
    "no JSON": ({"json": '{"type": '}, "found no JSON"),
    "no schema": ({"json": "[1]"}, "a JSON schema, which is an object, found"),
    "not finite": ({"json": {"const": float("nan")}}, "what JSON can write"),
    "no text": ({"regex": 3}, "regex: expected a text, found 3"),
    "empty": ({"regex": ""}, "regex: expected a text"),
    "no choices": ({"choice": []}, "choice: expected 1 to 4096 texts"),
    "empty choice": ({"choice": ["a", ""]}, "choice: expected"),
    "half a pair": ({"choice": ["\ud800"]}, "half a surrogate pair"),
    "long": ({"regex": "a" * 70_000}, "at most 65,536 bytes, found 70,000"),
    "flag": ({"regex": "a", "after_thinking": 1}, "after_thinking: expected True or False"),
    "options": ({"grammar": 'start: "a"\n%llguidance {}'}, "rules alone, found %llguidance"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_request_is_refused(demo_compiler: GrammarCompiler, case: str) -> None:
    asked, message = BAD[case]
    with pytest.raises(UsageError) as caught:
        demo_compiler.compile(read_structured_outputs(asked))
    assert caught.value.message.startswith("structured_outputs")
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def expanding() -> dict[str, Any]:
    return {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(6)]}
            for i in range(10)
        ]
    }


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "deep": ({"json": nested(70)}, "at most 64 levels"),
    "regex": ({"regex": "(a"}, "unclosed group"),
    "look-around": ({"regex": "a(?=b)"}, "look-around"),
    "type": ({"json": {"type": "integr"}}, "Invalid type: integr"),
    "unknown format": ({"json": {"type": "string", "format": "no"}}, "Unknown format"),
    "not built": ({"json": {"not": {"type": "null"}}}, 'Unimplemented keys: ["not"]'),
    "elsewhere": ({"json": {"$ref": "file:///etc/passwd"}}, "not present"),
    "itself": ({"json": {"$ref": "#"}}, "none that goes on"),
    "grammar": ({"grammar": 'start: "a" nope'}, 'unknown name: "nope"'),
    "gbnf": ({"grammar": 'root ::= "a" ('}, "GBNF"),
    "other letters": ({"choice": ["é"]}, "none that goes on"),
    "too large": ({"json": expanding()}, "schema too large"),
    "doubling": (
        {
            "grammar": 'start: T9\nT0: "a" "b"?\n'
            + "\n".join(f"T{i}: {4 * f'T{i - 1} '}" for i in range(1, 10))
        },
        "too big",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_grammar_is_refused(demo_compiler: GrammarCompiler, case: str) -> None:
    asked, message = WRONG[case]
    with pytest.raises(UsageError) as caught:
        demo_compiler.compile(read_structured_outputs(asked))
    assert message in caught.value.message
    assert len(caught.value.message) < 400
    assert "\n" not in caught.value.message


HOSTILE: dict[str, dict[str, Any]] = {
    "long forced text": {"regex": "a{1000000}"},
    "longer": {"regex": "(a{1000}){1000}"},
    "repeated literal": {
        "json": {"type": "array", "minItems": 10**6, "items": {"const": "a" * 50_000}}
    },
    "states": {"regex": "[ab]*a[ab]{22}"},
    "ambiguous": {"grammar": 'start: a\na: a a | "x" | '},
    "many ways": {"regex": "(a?){300}a{300}"},
    "wide": {"json": {"properties": {f"p{i}": {} for i in range(1500)}}},
    "many terminals": {"grammar": "start: " + " | ".join(f"/[a-z]*{i}/" for i in range(2500))},
    "many readings": {"grammar": 'start: x{50}\nx: "a" | "aa" | "aaa" | y\ny: "a" | "aa" | x x'},
    "long string": {"json": {"type": "string", "minLength": 10**9}},
    "doubling rules": {
        "grammar": 'start: r20\nr0: "a"\n'
        + "\n".join(f"r{i}: r{i - 1} r{i - 1}" for i in range(1, 21))
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_grammar_costs_little_a_token(demo_compiler: GrammarCompiler, case: str) -> None:
    """Whatever it is, no call takes long: processor time, so that other work does not matter."""
    rng, worst = random.Random(0), 0.0
    start = time.thread_time()
    state = begun(demo_compiler, **HOSTILE[case])
    assert time.thread_time() - start < 2
    for _ in range(150):
        start = time.thread_time()
        try:
            token = state.forced()
            if token is None:
                token = int(rng.choice(np.flatnonzero(state.mask())))
            state.advance(token)
        except UsageError:
            break
        finally:
            worst = max(worst, time.thread_time() - start)
        if state.has_ended:
            break
    assert worst < 0.5


def test_equal_grammars_are_compiled_once(demo_compiler: GrammarCompiler) -> None:
    spec = {"json": {"type": "integer"}}
    first = demo_compiler.compile(read_structured_outputs(spec))
    again = demo_compiler.compile(read_structured_outputs({"json": '{"type" : "integer"}'}))
    assert first.compiled is again.compiled
    later = read_structured_outputs(
        StructuredOutputs(json={"type": "integer"}, after_thinking=True)
    )
    assert demo_compiler.compile(later).compiled is first.compiled
    assert demo_compiler.find(read_structured_outputs({"regex": "never seen"})) is None


def test_gbnf_is_read(demo_compiler: GrammarCompiler) -> None:
    state = begun(demo_compiler, grammar='root ::= "a" | "b" num\nnum ::= [0-9]+')
    assert np.flatnonzero(state.mask()).tolist() == [31, 32]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DependencyError, match="found not installed") as caught:
        library.load_llguidance()
    assert caught.value.hint == "pip install 'trimode[grammar]'"

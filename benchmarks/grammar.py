"""Answers that follow grammars: how many validate, what they cost, and how many tokens are forced.

    PYTHONPATH=src:tests python -m benchmarks.grammar BUNDLE [--schemas 1000] [--only demo]

Every grammar is random (`tests/grammars.py`) and followed in AR, self-speculation and block
diffusion; every second schema without blanks. Half of the schemas run on the bundle, the others on
a random model with a byte-level vocabulary, whose schemas have texts in other scripts. An answer
that has ended is checked by jsonschema, or by Python's `re`; answers cut at --max-new-tokens are
counted apart. A part of the answers comes from an engine too. Costs are processor time of the
calls to the grammar, since the machine is shared.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mistral_common
import numpy as np
from checkpoints import config_of, write_checkpoint
from grammars import follows_regex, follows_schema, random_regex, random_schema
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.integrations.mistral.tokenizer import MistralConverter

from benchmarks.common import arguments_of, median, save
from trimode import Engine, TriModeModel, UsageError
from trimode.compiler.pipeline import build_bundle
from trimode.runtime.grammar.compile import GrammarCompiler
from trimode.runtime.grammar.spec import read_structured_outputs
from trimode.runtime.grammar.vocabulary import Vocabulary

MODES: tuple[Any, ...] = ("ar", "linear_spec", "diffusion")
ENGINE_EVERY = 20


class Followed:
    """Counts answers of one kind of grammar.

    Attributes:
        refused: Grammars that the library does not take, by reason.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {mode: Counter() for mode in (*MODES, "engine")}
        self.refused: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.equal: Counter[bool] = Counter()

    def add(self, mode: str, asked: Any, found: Any, is_right: bool) -> None:
        count = self.counts[mode]
        count["texts"] += 1
        count["tokens"] += len(found.token_ids)
        count["forced"] += found.forced_tokens
        count["forwards"] += sum(vars(found.forwards).values())
        count[found.finish_reason] += 1
        if found.finish_reason == "stop":
            count["valid" if is_right else "invalid"] += 1
            if not is_right:
                self.wrong.append({"mode": mode, "asked": str(asked), "ids": found.token_ids})

    def summary(self) -> dict[str, Any]:
        return {
            "modes": {mode: dict(count) for mode, count in self.counts.items()},
            "refused": dict(self.refused),
            "linear_spec_equals_ar": {str(equal): n for equal, n in self.equal.items()},
            "wrong": self.wrong[:20],
        }


def follow(
    model: TriModeModel,
    engine: Engine,
    grammars: list[tuple[dict[str, Any], Callable[[str], bool]]],
    most: int,
) -> dict[str, Any]:
    """Follow each grammar in each mode, after prompts of other texts."""
    found = Followed()
    for number, (asked, follows) in enumerate(grammars):
        ids = prompt_of(model, number)
        try:
            model.grammars.compile(read_structured_outputs(asked))
        except UsageError as error:
            found.refused[error.message[:160]] += 1
            continue
        options: dict[str, Any] = {"structured_outputs": asked, "max_new_tokens": most}
        results = {}
        for mode in MODES:
            result = results[mode] = model.stream([ids], mode, **options).finish()
            found.add(mode, asked, result, follows(model.codec.decode(result.token_ids)))
        found.equal[results["ar"].token_ids == results["linear_spec"].token_ids] += 1
        if number % ENGINE_EVERY == 0:
            mode = MODES[number // ENGINE_EVERY % len(MODES)]
            first = engine.submit(ids, mode=mode, n=2, **options)
            for handle in first.choices:
                result = handle.result(120)
                assert result.token_ids == results[mode].token_ids
                is_right = follows(model.codec.decode(result.token_ids))
                found.add("engine", asked, result, is_right)
    return found.summary()


def prompt_of(model: TriModeModel, number: int) -> list[int]:
    text = f"JSON: Ada {number} from Oslo is {number % 90} years old."
    if model.codec.has_chat_template:
        return model.codec.encode_chat([{"role": "user", "content": text}])
    return model.codec.encode(text)


def costs(compiler: GrammarCompiler, end: int, grammars: list[Any], seed: int) -> dict[str, Any]:
    """Microseconds of processor time a call, on random walks; the median and 99% of calls."""
    spent: dict[str, list[float]] = {name: [] for name in ("compile", "forced", "allows", "mask")}
    rng = random.Random(seed)

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.thread_time_ns()
        value = call()
        spent[name].append((time.thread_time_ns() - start) / 1000)
        return value

    ends = frozenset({end})
    for asked, _ in grammars:
        spec = read_structured_outputs(asked)
        if compiler.find(spec) is not None:
            continue
        try:
            compiled = timed("compile", lambda spec=spec: compiler.compile(spec))
        except UsageError:
            continue
        state = compiled.compiled.start(ends)
        for _ in range(60):
            token = timed("forced", state.forced)
            if token is None:
                token = int(rng.choice(np.flatnonzero(timed("mask", state.mask))))
                timed("allows", lambda state=state, token=token: state.allows(token))
            state.advance(token)
            if state.has_ended:
                break
    return {
        name: {"calls": len(us), "median_us": median(us), "p99_us": float(np.quantile(us, 0.99))}
        for name, us in spent.items()
    }


def tekken_compiler() -> GrammarCompiler:
    """For the true vocabulary of 131,072 ids, as mistral-common ships it."""
    file = Path(mistral_common.__file__ or "").parent / "data" / "tekken_240911.json"
    model: Any = SimpleNamespace(vocab_size=131_072, eos_token_ids=(2,), mask_token_id=100)
    return GrammarCompiler(Vocabulary(MistralConverter(str(file)).converted(), model))


def byte_level_bundle(folder: Path) -> Path:
    """A random model whose vocabulary writes all bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [f"<control {number}>" for number in range(102)]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([__file__], trainer)
    config = config_of(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=2048)
    checkpoint = write_checkpoint(folder / "checkpoint", config, rank=4)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    build_bundle(checkpoint, folder / "bundle")
    return folder / "bundle"


def schemas(count: int, *, unicode: bool) -> list[tuple[dict[str, Any], Callable[[str], bool]]]:
    made = [random_schema(random.Random(seed), unicode=unicode) for seed in range(count)]
    return [
        ({"json": schema, "disable_any_whitespace": number % 2 == 1}, follows_schema(schema))
        for number, schema in enumerate(made)
    ]


def regexes(count: int) -> list[tuple[dict[str, Any], Callable[[str], bool]]]:
    made = [random_regex(random.Random(seed)) for seed in range(count)]
    return [({"regex": one}, follows_regex(one)) for one in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--regexes", type=int, default=200)
    parser.add_argument("--only", choices=("demo", "bytes", "tekken"))
    parser.add_argument("--max-new-tokens", type=int, default=160)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    suffix = f"_{arguments.only}" if arguments.only else ""
    half, most = arguments.schemas // 2, arguments.max_new_tokens
    if arguments.only in (None, "tekken"):
        asked = schemas(half, unicode=True)[::5]
        results["tekken costs"] = costs(tekken_compiler(), 2, asked, 1)
        save(f"grammar{suffix}", {**arguments_of(vars(arguments)), **results})
    with tempfile.TemporaryDirectory() as temporary:
        opened = {"demo": arguments.bundle, "bytes": byte_level_bundle(Path(temporary))}
        for name, bundle in opened.items():
            if arguments.only not in (None, name):
                continue
            model = TriModeModel.from_pretrained(bundle, num_threads=1)
            count = half if name == "demo" else arguments.schemas - half
            kinds = {
                "schemas": schemas(count, unicode=name == "bytes"),
                "regexes": regexes(arguments.regexes) if name == "demo" else [],
            }
            with model, Engine(model, max_rows=4) as engine:
                asked = [*kinds["schemas"], *kinds["regexes"]]
                results[f"{name} costs"] = costs(
                    model.grammars, model.model.eos_token_ids[0], asked[::10], 1
                )
                for kind, grammars in kinds.items():
                    if grammars:
                        found = follow(model, engine, grammars, most)
                        results[f"{name} {kind}"] = found
                        print(name, kind, found, flush=True)
                        save(f"grammar{suffix}", {**arguments_of(vars(arguments)), **results})


if __name__ == "__main__":
    main()
